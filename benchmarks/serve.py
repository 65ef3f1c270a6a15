"""`manyeyes serve` beside a loop over `Predictor.predict` on the same bytes, and beside other servers.

    python benchmarks/serve.py [--models small mobilenet] [--seconds 5] [--rounds 3] [--json results.json]
    python benchmarks/serve.py --bundle BUNDLE --image FILE

Server and load have a core each, the model one thread. What the rows say:

- In-process: decode + predict on the server's core, one image a call, and in lists of 32. Served: 64 connections (16
  for MobileNetV2) that always ask (wrk). They take turns, so that what else runs on the machine hits all; the median of
  the rounds counts. Efficiency is served ÷ in-process one by one (goals 0.85 for the small model, 0.95 for
  MobileNetV2). A server sees one image a request, as that loop does; it can be above 1, because requests that wait
  together are one batch. The ratio to lists of 32 is beside a program that has all its images at hand.
- Lone: one connection. Added p50 is its p50 less that of one call in-process (goal: up to 0.5 ms).
- At 70 %: an open loop at 70 % of the served rate, latency from the moment a request was due (serve_load.py); evenly
  spaced as wrk2 does it, for which the goal p99 <= 2 p50 stands, and at random moments (Poisson), where queues are part
  of the arrivals. In turn with them a responder of one thread that computes for as long as an image costs and does
  nothing else: where its p99 is far from its p50, the machine lends its cores to others for milliseconds, and
  no server could be more even. The median of the rounds counts; the note has the least and the most.
- Load alone: what wrk and the open loop reach against a responder that does nothing. Below 3 times the served rate the
  load would be part of the measurement, and the row says so.
- Peers, with --peers-python (small model only, unless --peers-models): each with its batching off and on, ours measured
  again right before it; goal: ours >= 2 times each. They are no dependencies of the project; for a throw-away
  environment of the same Python version:

      python3.11 -m venv /tmp/peers && /tmp/peers/bin/pip install litserve bentoml "ray[serve]" mosec
      python benchmarks/serve.py --peers-python /tmp/peers/bin/python

The models have their initial weights: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import http.client
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import serve_peers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from serve_load import Load, LoadError, Request, call_on, closed_loop, cores, limits, null_responder, open_loop, pool_on
from untrained import export_untrained

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

LIST = 32
SHARE = 0.7
GENERATOR_GOAL = 3.0
PEER_GOAL = 2.0
TAIL_GOAL = 2.0
ADDED_MS_GOAL = 0.5
# Name, side in pixels, channels, goal of the efficiency, connections (many images at once make a slow model no faster).
MODELS = {"small": ("cnn", 28, 1, 0.85, 64), "mobilenet": ("mobilenet_v2", 224, 3, 0.95, 16)}
SERVER_CORE, LOAD_CORE = cores()


@dataclass(frozen=True)
class Subject:
    """A bundle and the image that it is shown."""

    name: str
    bundle: str
    image: bytes
    goal: float
    connections: int


@dataclass
class Results:
    """Rows of the table."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        model: str,
        what: str,
        load: Load | None,
        measure: str,
        value: float | None,
        goal: str = "",
        note: str = "",
    ) -> None:
        row: dict[str, Any] = {"model": model, "what": what, "measure": measure, "value": value, "goal": goal}
        if load is not None:
            row |= {"per_second": load.rate, "p50_ms": load.p50 * 1e3, "p99_ms": load.p99 * 1e3, "num": load.num}
        self.rows.append(row | {"note": note})
        print(
            f"{model}: {what} {measure} {'' if value is None else f'{value:.3g}'} {note}", file=sys.stderr, flush=True
        )

    def table(self) -> Table:
        table = Table("model", "what", "a second", "p50 ms", "p99 ms", "measure", "value", "goal", "note")
        for row in self.rows:
            speeds = ["", "", ""]
            if "per_second" in row:
                speeds = [f"{row['per_second']:,.0f}", f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}"]
            value = "" if row["value"] is None else f"{row['value']:.2f}"
            table.add_row(row["model"], row["what"], *speeds, row["measure"], value, row["goal"], escape(row["note"]))
        return table


def write_photo(path: Path, draw: np.random.Generator, size: int, channels: int) -> None:
    """A smooth picture with some grain: a grey PNG of that size, or a JPEG of 500 x 375."""
    shape = (size, size) if channels == 1 else (375, 500, channels)
    small = draw.integers(0, 256, (7, 7, *shape[2:]), np.uint8)
    image = cv2.resize(small, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    image = np.clip(image + draw.integers(-8, 9, shape, np.int16), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 90] if path.suffix == ".jpg" else [])


def write_subject(root: str, name: str) -> Subject:
    """Export a model with its initial weights, with ten classes; called in a process of its own."""
    from manyeyes.data.ingest import IngestSettings, ingest
    from manyeyes.engines.registry import create_engine
    from manyeyes.models.registry import ModelConfig, input_size

    model_name, size, channels, goal, connections = MODELS[name]
    draw = np.random.default_rng(0)
    suffix = "png" if channels == 1 else "jpg"
    photos = Path(root) / f"{name}.photos"
    for index in range(200):
        write_photo(photos / f"class{index % 10}" / f"{index:03d}.{suffix}", draw, size, channels)
    uri = f"{root}/{name}.dataset"
    settings = IngestSettings(size=(size, size), resize_short=input_size(model_name)[1], channels=channels)
    ingest(str(photos), uri, settings=settings, engine=create_engine("local", 1))
    bundle = export_untrained(
        uri,
        f"{root}/{name}",
        lambda dataset: ModelConfig(model_name, (size, size, channels), len(dataset.class_names)),
    )
    image = (photos / "class0" / f"000.{suffix}").read_bytes()
    return Subject(name, bundle, image, goal, connections)


@functools.cache
def _predictor(bundle: str, backend: str) -> Any:
    from manyeyes.recognition.predictor import Predictor

    cv2.setNumThreads(1)
    predictor = Predictor.load(bundle, backend, num_threads=1)  # type: ignore[arg-type]
    predictor.warm_up((1, LIST))
    return predictor


def in_process(bundle: str, backend: str, image: bytes, images_per_call: int, seconds: float) -> Load:
    """Images/s, and seconds of a call, of decode + predict; to be called in a process on the server's core."""
    predict = _predictor(bundle, backend).predict
    images = [image] * images_per_call
    calls = []
    started = now = time.perf_counter()
    while now - started < seconds or len(calls) < 10:
        before, _ = now, predict(images)
        now = time.perf_counter()
        calls.append(now - before)
    return Load.of(calls, images_per_call * len(calls) / (now - started))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], port: int, request: Request, more: dict[str, str] | None = None) -> Iterator[None]:
    """A server on its core, from its first right answer on.

    Raises:
        LoadError: it ended, or did not answer within two minutes.
    """
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            ["taskset", "-c", str(SERVER_CORE), *command],
            env={**os.environ, **(more or {})},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 120
            while not _answers(port, request):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = " ".join(log.read().decode(errors="replace").split())
                    raise LoadError(f"it does not answer: {said[-300:]}")
                time.sleep(0.2)
            yield
        finally:
            for how, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
                # The whole group: some leave processes behind that would take the core from the next.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, how)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)


def _answers(port: int, request: Request) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("POST", request.path, request.body, {"Content-Type": request.content_type})
        response = connection.getresponse()
        return response.status == 200 and b'"predictions"' in response.read()
    return False


@contextlib.contextmanager
def our_server(subject: Subject, backend: str) -> Iterator[tuple[int, Request]]:
    port = free_port()
    request = Request("/v1/recognize?top_k=5", subject.image)
    program = str(Path(sys.executable).with_name("manyeyes"))
    command = [program, "serve", subject.bundle, "--port", str(port), "--backend", backend, "--threads", "1"]
    with running(command, port, request):
        closed_loop(port, request, 8, 1, LOAD_CORE)
        yield port, request


def measure(subject: Subject, arguments: argparse.Namespace, results: Results) -> None:
    seconds, connections, backend = arguments.seconds, subject.connections, arguments.backend
    add = functools.partial(results.add, subject.name)
    singles, lists, served = [], [], []
    with our_server(subject, backend) as (port, request), pool_on(SERVER_CORE) as pool:
        job = functools.partial(pool.submit, in_process, subject.bundle, backend, subject.image)
        # What is under way at the end is not counted: of a thousand answers that is little.
        lasting = max(seconds, 1000 / job(1, 0.5).result().rate)
        for _ in range(arguments.rounds):
            singles.append(job(1, seconds).result())
            served.append(closed_loop(port, request, connections, lasting, LOAD_CORE))
            lists.append(job(LIST, seconds).result())
        lone = closed_loop(port, request, 1, seconds, LOAD_CORE)
        single, many, all_served = (_median(loads) for loads in (singles, lists, served))
        add("in-process, one by one", single, "", None)
        add(f"in-process, lists of {LIST}", many, "", None)
        efficiency = statistics.median(one.rate / two.rate for one, two in zip(served, singles, strict=True))
        of_lists = statistics.median(one.rate / two.rate for one, two in zip(served, lists, strict=True))
        what = f"served, {connections} connections"
        add(what, all_served, "÷ one by one", efficiency, f">= {subject.goal}")
        add(what, None, f"÷ lists of {LIST}", of_lists)
        add("served, lone", lone, "added p50, ms", (lone.p50 - single.p50) * 1e3, f"<= {ADDED_MS_GOAL}")
        rate = SHARE * all_served.rate
        # A p99 needs a thousand requests to be one.
        lasting = max(seconds, 1000 / rate)
        loads: dict[str, list[Load]] = {"even": [], "random": [], "bound": []}
        with null_responder(SERVER_CORE, 1 / all_served.rate) as bound:
            open_loop(bound, request, rate, 0.5, connections, False)
            for _ in range(arguments.rounds):
                for name, at in (("even", port), ("bound", bound), ("random", port)):
                    job = (at, request, rate, lasting, connections, name == "random")
                    loads[name].append(call_on(LOAD_CORE, open_loop, *job))
        names = {
            "even": "served at 70%, even",
            "bound": "only computes as long, even",
            "random": "served at 70%, random",
        }
        for name, shown in names.items():
            load = _median(loads[name])
            ratios = sorted(each.p99 / each.p50 for each in loads[name])
            note = f"{ratios[0]:.1f} to {ratios[-1]:.1f}" + (
                "" if load.rate > 0.95 * rate else f"; {rate:,.0f}/s were due"
            )
            goal = f"<= {TAIL_GOAL}" if name == "even" else ""
            add(shown, load, "p99 ÷ p50", statistics.median(ratios), goal, note)
    asked = GENERATOR_GOAL * all_served.rate
    for name, load in zip(("wrk", "open loop"), limits(request, asked, connections, min(seconds, 3)), strict=True):
        ratio = load.rate / all_served.rate
        # The open loop is asked for just so much, and may end some milliseconds late.
        note = "" if ratio >= 0.98 * GENERATOR_GOAL else "too slow: it is part of what it measures"
        add(f"load alone, {name}", load, "÷ served", ratio, f">= {GENERATOR_GOAL}", note)


def _median(loads: list[Load]) -> Load:
    return sorted(loads, key=lambda load: load.p50)[len(loads) // 2]


def installed(python: str) -> dict[str, str]:
    """The peers that this Python has, and their versions; it must be of our version to share our packages."""
    code = (
        "import sys, json, importlib.metadata as m\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions() if d.metadata['Name']}\n"
        "print(json.dumps([list(sys.version_info[:2]), found]))"
    )
    version, found = json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True).stdout)
    if tuple(version) != sys.version_info[:2]:
        raise SystemExit(
            f"{python} is Python {version[0]}.{version[1]}; it must be {sys.version.split()[0]} as this is."
        )
    return {peer: found[peer] for peer in serve_peers.PEERS if peer in found}


def compare(subject: Subject, arguments: argparse.Namespace, results: Results) -> None:
    """Each peer with batching off and on, ours right before it."""
    found = installed(arguments.peers_python)
    for peer in serve_peers.PEERS:
        if peer not in found:
            results.add(subject.name, peer, None, "", None, note="not installed")
            continue
        for batching in (False, True):
            what = f"{peer} {found[peer]}, {'batches' if batching else 'no batches'}"
            with our_server(subject, arguments.backend) as (port, request):
                ours = closed_loop(port, request, subject.connections, arguments.seconds, LOAD_CORE)
            port = free_port()
            body, content_type = serve_peers.body_and_type(peer, subject.image)
            request = Request(serve_peers.PEERS[peer], body, content_type)
            more = serve_peers.environment(peer, subject.bundle, arguments.backend, port, batching)
            try:
                with running(serve_peers.command(peer, arguments.peers_python, port), port, request, more):
                    closed_loop(port, request, subject.connections, 2, LOAD_CORE)
                    theirs = closed_loop(port, request, subject.connections, arguments.seconds, LOAD_CORE)
                    lone = closed_loop(port, request, 1, arguments.seconds, LOAD_CORE)
            except LoadError as error:
                results.add(subject.name, what, None, "", None, note=f"failed: {error}")
                continue
            note = f"ours {ours.rate:,.0f}/s; lone p50 {lone.p50 * 1e3:.2f} ms"
            results.add(subject.name, what, theirs, "ours ÷ it", ours.rate / theirs.rate, f">= {PEER_GOAL}", note)


def processor() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--bundle", help="a bundle of yours instead of the models")
    parser.add_argument("--image", type=Path, help="with --bundle: what it is shown")
    parser.add_argument("--backend", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement, whole ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, help="default: 64, and 16 for mobilenet")
    parser.add_argument("--peers-python", help="of an environment that has peers; see above")
    parser.add_argument("--peers-models", nargs="+", choices=tuple(MODELS), default=["small"])
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    if (arguments.bundle is None) != (arguments.image is None):
        parser.error("--bundle and --image go together.")
    if SERVER_CORE == LOAD_CORE:
        raise SystemExit("There is one core; server and load need one each.")
    # The servers are started in another folder.
    if arguments.bundle and "://" not in arguments.bundle:
        arguments.bundle = str(Path(arguments.bundle).absolute())
    if arguments.peers_python:
        arguments.peers_python = str(Path(arguments.peers_python).absolute())
    results = Results()
    with tempfile.TemporaryDirectory() as root:
        if arguments.bundle:
            subjects = [Subject("bundle", arguments.bundle, arguments.image.read_bytes(), *MODELS["small"][3:])]
        else:
            subjects = [call_on(LOAD_CORE, write_subject, root, name) for name in arguments.models]
        for subject in subjects:
            if arguments.connections:
                subject = dataclasses.replace(subject, connections=arguments.connections)
            measure(subject, arguments, results)
            if arguments.peers_python and (arguments.bundle or subject.name in arguments.peers_models):
                compare(subject, arguments, results)
    Console(width=170).print(results.table())
    if arguments.json:
        machine = {"processor": processor(), "python": platform.python_version()}
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        content = {"machine": machine, "settings": settings, "rows": results.rows}
        arguments.json.write_text(json.dumps(content, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
