"""Bring the demo's data: `python scripts/demo_data.py fashion-mnist|photos TARGET`; prints the source URI to ingest.

Fashion-MNIST comes from the Debian package dataset-fashion-mnist (unpacked without root if not installed), else by
Keras' own download, else scikit-learn's digits stand in, and the script says so. The photos are the ones among Debian's
tuxpaint-stamps-default, labelled by their folder.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import subprocess
import sys
from pathlib import Path

from debian_package import debian_packages

FASHION_MNIST_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

# class -> folders below stamps/; drawings (folders named cartoon) and mirror images are left out
PHOTO_CLASSES = {
    "bird": ("animals/birds",),
    "mammal": ("animals/mammals",),
    "fish": ("animals/fish", "animals/shellfish"),
    "fruit": ("food/fruit",),
    "vegetable": ("food/vegetables",),
    "flower": ("plants/flowers",),
    "vehicle": ("vehicles",),
    "coin": ("symbols/money",),
}


def say(text: str) -> None:
    print(f"demo data: {text}", file=sys.stderr)


def fashion_mnist(target: Path) -> str:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        folder = target / "debian" / "usr/share/datasets/fashion-mnist"
    if not folder.is_dir():
        say("unpacking Debian's dataset-fashion-mnist (31 MB)")
        debian_packages(["dataset-fashion-mnist"], target / "debian")
    if not folder.is_dir():
        say("the Debian package can't be had here; trying Keras' download")
        try:
            import keras

            keras.datasets.fashion_mnist.load_data()
            folder = Path(keras.config.keras_home() if hasattr(keras.config, "keras_home") else Path.home() / ".keras")
            folder = folder / "datasets" / "fashion-mnist"
        except Exception as error:
            say(f"the download failed too ({type(error).__name__})")
    if not folder.is_dir():
        return digits(target)
    (target / "class_names.txt").write_text("\n".join(FASHION_MNIST_CLASSES) + "\n")
    return str(folder)


def digits(target: Path) -> str:
    """scikit-learn's 1,797 digits as IDX files, enlarged to 28 x 28: not Fashion-MNIST, but real images."""
    import cv2
    import numpy as np

    if importlib.util.find_spec("sklearn") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "scikit-learn"], check=True)
    from sklearn.datasets import load_digits

    say("NOT Fashion-MNIST: scikit-learn's 1,797 digits stand in, and the recipe's figures don't apply")
    data = load_digits()
    images = np.stack([cv2.resize((image * 15.9375).astype(np.uint8), (28, 28)) for image in data.images])
    folder = target / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, part in (("train", slice(0, 1500)), ("t10k", slice(1500, None))):
        for kind, array in (("images-idx3", images[part]), ("labels-idx1", data.target[part].astype(np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            with gzip.open(folder / f"{prefix}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())
    (target / "class_names.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    return str(folder)


def photos(target: Path) -> str:
    stamps = Path("/usr/share/tuxpaint/stamps")
    if not stamps.is_dir():
        stamps = target / "debian" / "usr/share/tuxpaint/stamps"
    if not stamps.is_dir():
        say("unpacking Debian's tuxpaint-stamps-default (161 MB)")
        if debian_packages(["tuxpaint-stamps-default"], target / "debian") is None:
            sys.exit("demo data: Debian's tuxpaint-stamps-default can't be had here. Use a folder of your own photos.")
    table = target / "photos.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group"])
        for label, folders in PHOTO_CLASSES.items():
            for path in sorted(path for folder in folders for path in (stamps / folder).rglob("*.png")):
                if "cartoon" in path.parts or path.stem.endswith("_mirror"):
                    continue
                # Views of one thing (a coin's two sides, a cut fruit) share the first word of their name.
                writer.writerow([path.resolve(), label, f"{label}/{path.stem.replace('-', '_').split('_')[0]}"])
    return str(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("fashion-mnist", "photos"))
    parser.add_argument("target", type=Path, help="folder for what has to be unpacked")
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    source = fashion_mnist(arguments.target) if arguments.name == "fashion-mnist" else photos(arguments.target)
    (arguments.target / f"{arguments.name}.source").write_text(source)
    print(source)


if __name__ == "__main__":
    main()
