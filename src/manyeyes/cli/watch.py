"""`manyeyes watch`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyeyes.cli import common

if TYPE_CHECKING:
    from manyeyes.recognition.stream import StreamResult
    from manyeyes.recognition.stream_sources import Frame

_TERMINAL_SECONDS = 0.25
_LOG_SECONDS = 10.0


def command(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="The bundle that recognises.", show_default=False)],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A camera (0, /dev/video0), a video file, an rtsp:// or http:// URL, or a folder that fills.",
            show_default=False,
        ),
    ],
    top_k: Annotated[int, typer.Option(help="Classes in each line.", min=1)] = 3,
    smooth: Annotated[
        int,
        typer.Option(
            help="Smooth probabilities over about so many frames: an exponential mean, in which a new frame has the "
            "weight 2 / (N + 1).",
            metavar="N",
            min=1,
        ),
    ] = 1,
    every: Annotated[
        float, typer.Option(help="Of a camera or video: one frame in so many seconds; 0 is all.", min=0)
    ] = 0.0,
    max_frames: Annotated[int | None, typer.Option(help="End after so many answers.", min=1)] = None,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Play a video file at its own speed and drop frames like a camera.")
    ] = False,
    state: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Of a folder: remembers which files were done, so that a restart leaves them out."
        ),
    ] = None,
    preview: Annotated[
        int | None, typer.Option(metavar="PORT", help="Show frames and answers on a page; 0 takes a free port.", min=0)
    ] = None,
    preview_host: Annotated[
        str, typer.Option(help="Where the page is served; 0.0.0.0 lets everybody in the network look on.")
    ] = "127.0.0.1",
    backend: Annotated[str | None, typer.Option(help="auto, openvino or onnxruntime; default: the bundle's.")] = None,
) -> None:
    """Recognise what a camera, a video or a folder shows, as it comes: one JSON line an image on standard output.

    A camera or network stream drops frames rather than lag behind; of a video file or folder every image is recognised.
    Ends with the source, or by Ctrl-C; rates and latencies are told on standard error.

    Example: `manyeyes watch bundles/fashion 0 --smooth 5 --preview 8001`

    More: `manyeyes watch bundles/fashion incoming/ --state done.jsonl`, `manyeyes watch bundles/fashion
    rtsp://camera/stream --every 1`
    """
    from manyeyes.errors import DataError
    from manyeyes.recognition.predictor import Predictor
    from manyeyes.recognition.preview import Preview
    from manyeyes.recognition.stream import StreamStatistics, watch
    from manyeyes.recognition.stream_sources import open_stream

    frames = open_stream(source, every_seconds=every, state=state)
    predictor = Predictor.load(bundle, backend)  # type: ignore[arg-type]
    console = common.console()
    info = predictor.bundle.info
    console.print(
        f"Watching {frames.name} by {info.name} ({len(info.class_names)} classes) on {predictor.backend.name} in "
        f"{predictor.backend.precision}. Stop: Ctrl-C",
        soft_wrap=True,
        markup=False,
    )
    statistics = StreamStatistics()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stop_by_signal())
        page = None
        if preview is not None:
            page = stack.enter_context(Preview(preview, statistics, preview_host))
            console.print(f"Preview: {page.url}", soft_wrap=True)
        shown = stack.enter_context(console.status("Waiting for the first image …")) if console.is_terminal else None
        last_told = time.perf_counter()

        def tell(result: StreamResult, frame: Frame) -> None:
            nonlocal last_told
            try:
                sys.stdout.write(json.dumps(_line(result), ensure_ascii=False) + "\n")
                sys.stdout.flush()
            except BrokenPipeError:
                # Nobody reads any more (`manyeyes watch … | head`): an end like any other.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                stop.set()
            if page is not None:
                page.show(result, frame)
            now = time.perf_counter()
            if now - last_told >= (_TERMINAL_SECONDS if shown else _LOG_SECONDS):
                last_told = now
                told = statistics.told(now=True)
                if shown:
                    shown.update(told)
                else:
                    console.print(told, soft_wrap=True)

        try:
            watch(
                predictor,
                frames,
                on_result=tell,
                top_k=top_k,
                smooth=smooth,
                max_frames=max_frames,
                realtime=realtime,
                stop=stop,
                statistics=statistics,
            )
        finally:
            if shown:
                shown.stop()
            console.print(f"Watched {frames.name}: {statistics.told()}.", soft_wrap=True, markup=False)
    if statistics.num_failed and not statistics.num_recognised and not stop.is_set():
        raise DataError(f"None of the {statistics.num_failed:,} images of {frames.name} could be recognised.")


def _line(result: StreamResult) -> dict[str, Any]:
    where: dict[str, Any] = {"frame": result.frame, "time": round(result.time_seconds, 3)}
    if result.name:
        where["file"] = result.name
    if result.reason:
        return where | {"reason": result.reason, "detail": result.detail}
    predictions = [
        {"label": each.label, "class_name": each.class_name, "probability": round(each.probability, 6)}
        for each in result.top_k
    ]
    return where | {"predictions": predictions, "latency_ms": round(result.latency_ms, 2)}


@contextlib.contextmanager
def _stop_by_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; the second Ctrl-C ends at once."""
    stop = threading.Event()

    def leave(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
