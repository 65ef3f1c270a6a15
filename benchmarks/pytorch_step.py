"""A training step of ours beside the same step in PyTorch, on the two cores of this machine.

    python benchmarks/pytorch_step.py [--only cnn|resnet] [--steps 30] [--rounds 3] [--rows TEXT ...]

The net is the same: before anything is timed, weights are copied, and logits in training mode, the number of parameters
and the weights after three steps are compared, in float64. So are the batch of 128 images and the optimizer: SGD,
Nesterov momentum 0.9, decoupled weight decay. PyTorch's step is eager, float32, on two threads, from pixels that lie
ready as a tensor. Ours is the step of `manyeyes train`, input pipeline included. All rows take turns, each turn in a
fresh process; the ratio is that of the best turns. The goal is 1.3 for the default precision.

PyTorch is a peer that is measured, not something that Manyeyes uses. `pip install --group bench` brings it; on Linux
with 3 GB of CUDA, without which that wheel does not load, though nothing here uses it (so `--no-deps` is no way around
it). The wheels without CUDA are in PyTorch's own index. To keep it out of the project's environment, make another one
for it and add `import site; site.addsitedir("…/.venv/lib/python3.11/site-packages")` as a .pth file.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import statistics
import tempfile
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np
from allreduce import BATCH, WARMUP_STEPS, time_steps, write_dataset
from rich.console import Console
from rich.table import Table

from manyeyes.data.dataset import Dataset
from manyeyes.engines.base import GangContext
from manyeyes.engines.registry import create_engine
from manyeyes.training import backend
from manyeyes.training.settings import TrainSettings

GOAL = 1.3
LEARNING_RATE, WEIGHT_DECAY = 0.05, 3e-3
MODELS = {
    "cnn": (28, ["model.name=cnn"]),
    "resnet": (32, ["model.name=resnet18", "model.options={width=16}"]),
}
# Memory format, and whether autocast computes in bfloat16.
PYTORCH = {
    "PyTorch float32": ("contiguous_format", False),
    "PyTorch float32, channels last": ("channels_last", False),
    "PyTorch bfloat16, channels last": ("channels_last", True),
}
# Workers, and settings.
OURS: dict[str, tuple[int, list[str]]] = {
    "1 worker, auto": (1, []),
    "1 worker, float32": (1, ["train.precision=float32"]),
    "1 worker, auto, XLA": (1, ["train.xla=true"]),
    "2 workers, auto, own norms": (2, ["strategy.sync_norms=false"]),
    "2 workers, auto, synchronized norms": (2, ["strategy.sync_norms=true"]),
    "2 workers, float32, own norms": (2, ["train.precision=float32", "strategy.sync_norms=false"]),
    "2 workers, float32, synchronized norms": (2, ["train.precision=float32", "strategy.sync_norms=true"]),
}
RECIPE = [
    "optimizer.name=sgd",
    f"optimizer.learning_rate={LEARNING_RATE}",
    "optimizer.momentum=0.9",
    "optimizer.nesterov=true",
    f"optimizer.weight_decay={WEIGHT_DECAY}",
    "schedule.name=constant",
    "schedule.warmup_epochs=0",
    f"train.global_batch_size={BATCH}",
]


def make_strategy(dataset: str, assignments: list[str], context: GangContext) -> Any:
    settings = TrainSettings.load(None, [*RECIPE, *assignments])
    backend.prepare(0, None, context, deterministic=not settings.train.xla)
    import keras

    from manyeyes.training.building import build_allreduce
    from manyeyes.training.collective import connect
    from manyeyes.training.run import describe_run

    keras.utils.set_random_seed(0)
    data = Dataset(dataset)
    return build_allreduce(describe_run(data, "", settings), settings, data, connect(context))


def time_ours(dataset: str, assignments: list[str], num_steps: int, context: GangContext) -> float:
    """Median seconds of a step, in one worker."""
    return time_steps(make_strategy(dataset, assignments, context), num_steps)


def torch_net(name: str) -> Any:
    """The models `cnn` and `resnet18` (width 16) for one channel and ten classes; modules have the layers' names."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Net(nn.Module):
        """From uint8 (n, 1, H, W) to logits (n, 10)."""

        def add(self, name: str, num_in: int, num_out: int, size: int = 3, stride: int = 1) -> None:
            # TensorFlow pads at the end only where a 3 x 3 window takes two steps at once; see `conv_norm`.
            padding = size // 2 if stride == 1 else 0
            self.add_module(f"{name}_conv", nn.Conv2d(num_in, num_out, size, stride, padding, bias=False))
            self.add_module(f"{name}_norm", nn.BatchNorm2d(num_out, eps=1e-5, momentum=0.1))

        def conv_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
            conv = self.get_submodule(f"{name}_conv")
            if conv.stride == (2, 2) and conv.kernel_size == (3, 3):
                x = functional.pad(x, (0, 1, 0, 1))
            return self.get_submodule(f"{name}_norm")(conv(x))

        def normalised(self, images: torch.Tensor) -> torch.Tensor:
            return (images * (1 / 127.5) - 1).to(self.logits.weight.dtype)

        def head(self, x: torch.Tensor) -> torch.Tensor:
            return self.logits(x.mean((2, 3)))

    class Cnn(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers_of_stages = [["stage0_0"], ["stage1_0", "stage1_1"], ["stage2_0", "stage2_1"]]
            for name, sizes in {
                "stage0_0": (1, 16), "stage1_0": (16, 32), "stage1_1": (32, 32), "stage2_0": (32, 64),
                "stage2_1": (64, 64),
            }.items():  # fmt: skip
                self.add(name, *sizes)
            self.logits = nn.Linear(64, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.normalised(images)
            for stage, layers in enumerate(self.layers_of_stages):
                x = functional.max_pool2d(x, 2) if stage else x
                for layer in layers:
                    x = functional.relu(self.conv_norm(layer, x), inplace=True)
            return self.head(x)

    class ResNet18(Net):
        def __init__(self) -> None:
            super().__init__()
            self.add("stem", 1, 16)
            num_in, self.blocks = 16, []
            for stage, width in enumerate((16, 32, 64, 128)):
                for index in range(2):
                    stride, name = 2 if stage and not index else 1, f"stage{stage}_{index}"
                    self.add(f"{name}_a", num_in, width, 3, stride)
                    self.add(f"{name}_b", width, width)
                    if stride > 1:
                        self.add(f"{name}_shortcut", num_in, width, 1, stride)
                    self.blocks.append((name, stride))
                    num_in = width
            self.logits = nn.Linear(128, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = functional.relu(self.conv_norm("stem", self.normalised(images)), inplace=True)
            for name, stride in self.blocks:
                residual = functional.relu(self.conv_norm(f"{name}_a", x), inplace=True)
                residual = self.conv_norm(f"{name}_b", residual)
                x = self.conv_norm(f"{name}_shortcut", x) if stride > 1 else x
                x = functional.relu(residual.add_(x), inplace=True)
            return self.head(x)

    return Cnn() if name == "cnn" else ResNet18()


class TorchStep:
    """The eager step: forwards, cross-entropy, backwards, SGD with decoupled weight decay on kernels."""

    def __init__(self, net: Any, *, bfloat16: bool = False) -> None:
        import torch

        self.net = net
        self._torch = torch
        self._bfloat16 = bfloat16
        self._kernels = [parameter for parameter in net.parameters() if parameter.ndim > 1]
        self._optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True)

    def __call__(self, images: Any, labels: Any) -> float:
        torch = self._torch
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            loss = torch.nn.functional.cross_entropy(self.net(images), labels)
        loss.backward()
        with torch.no_grad():
            torch._foreach_mul_(self._kernels, 1 - LEARNING_RATE * WEIGHT_DECAY)
        self._optimizer.step()
        return float(loss.detach())


def time_torch(name: str, memory_format: str, bfloat16: bool, num_steps: int, context: GangContext) -> float:
    """Median seconds of a step on two threads."""
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    laid_out = getattr(torch, memory_format)
    step = TorchStep(torch_net(name).to(memory_format=laid_out), bfloat16=bfloat16)
    size = MODELS[name][0]
    images = torch.randint(0, 256, (BATCH, 1, size, size), dtype=torch.uint8).to(memory_format=laid_out)
    labels = torch.arange(BATCH) % 10
    times = []
    for _ in range(num_steps + WARMUP_STEPS):
        start = time.perf_counter()
        step(images, labels)
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARMUP_STEPS:])


def write_expected(dataset: str, name: str, file: str, context: GangContext) -> None:
    """Write what our net, with generated weights, makes of a batch in float64: an .npz for `compare`."""
    strategy = make_strategy(dataset, [*MODELS[name][1], "train.precision=float64"], context)
    replica = strategy.replica
    variables = {variable.path: variable for variable in replica.model.weights}
    draw = np.random.default_rng(0)
    for path, variable in variables.items():
        if path.endswith("gamma"):  # that of a block's last norm starts at zero and would hide the block
            variable.assign(draw.uniform(0.5, 1.5, variable.shape))
    batch = next(strategy.train_pipeline.batches(0))
    arrays = {f"before:{path}": variable.numpy() for path, variable in variables.items()}
    logits = replica.model(batch.images, training=True).numpy()
    for number in range(3):
        replica.step(batch, LEARNING_RATE, number)
    arrays |= {f"after:{path}": variable.numpy() for path, variable in variables.items() if variable.trainable}
    np.savez(file, images=batch.images, labels=batch.labels, logits=logits, **arrays)


def compare(name: str, file: str, context: GangContext) -> tuple[float, float, int, int]:
    """Do the same in PyTorch, in a process of its own: its LLVM and TensorFlow's can't be loaded in one.

    Returns:
        the largest difference of logits (training mode); that of a weight after three steps, as a share of the farthest
        that a weight of its tensor has moved; the numbers of parameters.
    """
    import torch

    expected, net = np.load(file), torch_net(name).double()
    names = {"kernel": "weight", "gamma": "weight", "beta": "bias", "moving_mean": "running_mean"}
    names["moving_variance"] = "running_var"

    def in_torch(key: str) -> Any:
        layer, _, kind = key.partition(":")[2].rpartition("/")
        return getattr(net.get_submodule(layer), names.get(kind, kind))

    def turned(array: np.ndarray) -> Any:
        return torch.from_numpy((array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T).copy())

    with torch.no_grad():
        for key in (key for key in expected if key.startswith("before:")):
            in_torch(key).copy_(turned(expected[key]))
    images = torch.from_numpy(expected["images"].transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(expected["labels"]).long()
    difference = np.abs(net(images).detach().numpy() - expected["logits"]).max()
    step = TorchStep(net)
    for _ in range(3):
        step(images, labels)
    after = [key for key in expected if key.startswith("after:")]
    moves = 0.0
    for key in after:
        ours, before = turned(expected[key]), turned(expected[key.replace("after:", "before:")])
        moves = max(moves, float((ours - in_torch(key).detach()).abs().max() / (ours - before).abs().max()))
    num_ours, num_torch = sum(expected[key].size for key in after), sum(each.numel() for each in net.parameters())
    return float(difference), moves, num_ours, num_torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3, help="turns of every row")
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--rows", nargs="*", default=[""], help="only rows with one of these texts in their names")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        print("Nothing is measured, as PyTorch is not installed: pip install --group bench")
        return
    engine = create_engine("local", 2)
    console = Console(width=110)
    for name in [arguments.only] if arguments.only else MODELS:
        size, model = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            dataset = write_dataset(folder, size)
            file = f"{folder}/expected.npz"
            engine.gang(functools.partial(write_expected, dataset, name, file), 1)
            logits, weights, num_ours, num_torch = engine.gang(functools.partial(compare, name, file), 1)[0]
            console.print(f"{name}: logits differ by {logits:.1e}, moves of weights by {weights:.1e} of themselves")
            assert logits < 1e-6 and weights < 1e-6 and num_ours == num_torch, (logits, weights, num_ours, num_torch)
            ways: dict[str, tuple[int, Any]] = {
                row: (1, functools.partial(time_torch, name, *how, arguments.steps)) for row, how in PYTORCH.items()
            }
            for row, (workers, more) in OURS.items():
                ways[row] = workers, functools.partial(time_ours, dataset, [*model, *more], arguments.steps)
            first = next(iter(PYTORCH))
            chosen = [row for row in ways if row == first or any(text in row for text in arguments.rows)]
            turns: dict[str, list[float]] = {row: [] for row in chosen}
            for _ in range(arguments.rounds):
                for row in chosen:
                    workers, measure = ways[row]
                    turns[row].append(max(engine.gang(measure, workers)))
        columns = ("step, best turn", "median turn", "images/s", "of PyTorch float32")
        table = Table(f"{name}, {size} px", *columns, caption=f"goal of the first row of ours: {GOAL}")
        for row, seconds in turns.items():
            best = min(seconds)
            table.add_row(
                row,
                f"{best * 1e3:.1f} ms",
                f"{statistics.median(seconds) * 1e3:.1f} ms",
                f"{BATCH / best:.0f}",
                f"{min(turns[first]) / best:.2f}",
            )
        console.print(table)


if __name__ == "__main__":
    main()
