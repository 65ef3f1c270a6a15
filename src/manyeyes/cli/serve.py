"""`manyeyes serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from manyeyes.cli import common

if TYPE_CHECKING:
    from manyeyes.recognition.predictor import Predictor


def command(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="The bundle to serve.", show_default=False)],
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    backend: Annotated[str | None, typer.Option(help="auto, openvino or onnxruntime; default: the bundle's.")] = None,
) -> None:
    """Answer over HTTP: the bytes of an image in, the likeliest classes out, and a page to try it.

    Example: `manyeyes serve bundles/fashion --port 8000`
    """
    from manyeyes.serving.app import serve

    serve(bundle, host=host, port=port, backend=backend, on_start=_announce)  # type: ignore[arg-type]


def _announce(url: str, predictor: Predictor) -> None:
    info = predictor.bundle.info
    console = common.console()
    console.print(
        f"Serving {info.name} ({len(info.class_names)} classes, version {info.fingerprint}) "
        f"by {predictor.backend.name} in {predictor.backend.precision} at {url}",
        soft_wrap=True,
    )
    console.print(f"Try:  curl --data-binary @photo.jpg '{url}/v1/recognize?top_k=3'", soft_wrap=True)
    console.print("Stop: Ctrl-C", soft_wrap=True)
