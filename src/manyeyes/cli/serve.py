"""`manyeyes serve`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyeyes.cli import common
from manyeyes.errors import UsageError

if TYPE_CHECKING:
    from manyeyes.serving.server import Started

TOKEN_VARIABLE = "MANYEYES_TOKEN"
# A host may be an address of IPv6 in brackets. Browser extensions have schemes of their own.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]+)?")
_LIMITS = "Limits"
_SECURITY = "Security"
_OPERATIONS = "Operations"


def command(
    models: Annotated[
        str,
        typer.Argument(
            metavar="MODELS",
            help="A bundle, or a folder NAME/VERSION of bundles, on any URI.",
            show_default=False,
        ),
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    backend: Annotated[str | None, typer.Option(help="auto, openvino or onnxruntime; default: the bundle's.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that recognise; 1: the server's own.", min=1)] = 1,
    worker_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds without a sign of life after which a worker process is replaced.",
            min=1,
            rich_help_panel=_OPERATIONS,
        ),
    ] = 30,
    threads: Annotated[
        int | None,
        typer.Option(
            help="That decode, and of one call of a model, in each worker; default: all cores, shared by the workers.",
            min=1,
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(help="Images that may wait; more get 503.", min=1, rich_help_panel=_LIMITS)
    ] = 512,
    max_body_mb: Annotated[
        float, typer.Option(help="Of one request, in MB; more gets 413.", min=0.001, rich_help_panel=_LIMITS)
    ] = 32,
    max_megapixels: Annotated[
        float, typer.Option(help="Of one image, by its header; more gets 413.", min=0.001, rich_help_panel=_LIMITS)
    ] = 50,
    max_connections: Annotated[int, typer.Option(help="Open at once.", min=1, rich_help_panel=_LIMITS)] = 4096,
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds for a client to send its request; large bodies get more.", min=0.1, rich_help_panel=_LIMITS
        ),
    ] = 20,
    token_file: Annotated[
        str | None,
        typer.Option(
            help=f"Ask every request for the token in this file (or in the variable {TOKEN_VARIABLE}).",
            rich_help_panel=_SECURITY,
        ),
    ] = None,
    tls_cert: Annotated[
        str | None, typer.Option(help="PEM file: serve over TLS by it.", rich_help_panel=_SECURITY)
    ] = None,
    tls_key: Annotated[
        str | None, typer.Option(help="PEM file: the certificate's key.", rich_help_panel=_SECURITY)
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Pages from here may use the server in a browser, e.g. https://example.org; may be repeated.",
            rich_help_panel=_SECURITY,
        ),
    ] = None,
    poll: Annotated[
        float, typer.Option(help="Seconds between two looks for new versions.", min=0.1, rich_help_panel=_OPERATIONS)
    ] = 5,
    keep_versions: Annotated[
        int, typer.Option(help="The newest so many of each model are served.", min=1, rich_help_panel=_OPERATIONS)
    ] = 2,
    canary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL=VERSION:WEIGHT",
            help="This share of the requests goes to that version, e.g. cats=7:0.1.",
            rich_help_panel=_OPERATIONS,
        ),
    ] = None,
    shadow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL=VERSION",
            help="That version answers too; it is only compared and counted.",
            rich_help_panel=_OPERATIONS,
        ),
    ] = None,
    drain_delay: Annotated[
        float,
        typer.Option(help="Seconds after SIGTERM in which only /readyz says no.", min=0, rich_help_panel=_OPERATIONS),
    ] = 0,
    drain_timeout: Annotated[
        float, typer.Option(help="Then seconds for the requests under way.", min=0, rich_help_panel=_OPERATIONS)
    ] = 30,
    log_format: Annotated[str, typer.Option(help="text or json.", rich_help_panel=_OPERATIONS)] = "text",
    access_log: Annotated[
        bool, typer.Option("--access-log", help="A line for each request.", rich_help_panel=_OPERATIONS)
    ] = False,
) -> None:
    """Answer over HTTP: the bytes of an image in, the likeliest classes out, and a page to try it.

    Example: `manyeyes serve bundles/fashion --port 8000`
    """
    if log_format not in ("text", "json"):
        raise UsageError(f"--log-format {log_format} is not text or json.")
    traffic = read_traffic(canary or [], shadow or [])
    for origin in cors_origin or []:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise UsageError(
                f"--cors-origin {origin} is not an origin as browsers send it: scheme and host in lower case, and the "
                "port if it is not the usual one, e.g. https://example.org."
            )
    token = _read_token(token_file)

    from manyeyes.serving import logs
    from manyeyes.serving.server import serve
    from manyeyes.serving.settings import ServeSettings

    logs.set_up(log_format)  # type: ignore[arg-type]
    settings = ServeSettings(
        max_body_bytes=int(max_body_mb * 1_000_000),
        max_pixels=int(max_megapixels * 1_000_000),
        max_queue=max_queue,
        max_connections=max_connections,
        header_timeout_seconds=min(10.0, timeout),
        body_timeout_seconds=timeout,
        drain_delay_seconds=drain_delay,
        drain_timeout_seconds=drain_timeout,
        token=token,
        cors_origins=tuple(cors_origin or ()),
        tls_cert=tls_cert,
        tls_key=tls_key,
        num_workers=workers,
        worker_timeout_seconds=worker_timeout,
        num_threads=threads,
        backend=backend,  # type: ignore[arg-type]
        poll_seconds=poll,
        keep_versions=keep_versions,
        log_format=log_format,  # type: ignore[arg-type]
        access_log=access_log,
    )
    serve(models, host=host, port=port, settings=settings, traffic=traffic, on_start=_announce)


def read_traffic(canaries: list[str], shadows: list[str]) -> dict[str, dict[str, Any]]:
    """What --canary and --shadow say, by name of the model.

    Raises:
        UsageError: one can't be understood.
    """
    traffic: dict[str, dict[str, Any]] = {}
    for text in canaries:
        model, _, rest = text.partition("=")
        version, _, weight = rest.rpartition(":")
        try:
            share = float(weight)
        except ValueError:
            share = -1.0
        if not model or not version or not 0 <= share <= 1:
            raise UsageError(f"--canary {text} is not MODEL=VERSION:WEIGHT with a weight from 0 to 1, e.g. cats=7:0.1.")
        traffic.setdefault(model, {}).update(canary=version, canary_weight=share)
    for text in shadows:
        model, _, version = text.partition("=")
        if not model or not version:
            raise UsageError(f"--shadow {text} is not MODEL=VERSION, e.g. cats=8.")
        traffic.setdefault(model, {}).update(shadow=version)
    return traffic


def _read_token(path: str | None) -> str | None:
    if path is not None:
        where = f"The token file {path}"
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{where} can't be read: {error}.") from None
    else:
        where = f"The variable {TOKEN_VARIABLE}"
        text = os.environ.get(TOKEN_VARIABLE, "")
        if not text:
            return None
    token = text.strip()
    if not token.isascii() or not token or any(character.isspace() for character in token):
        raise UsageError(f"{where} must hold one word of ASCII.")
    return token


def _announce(started: Started) -> None:
    console = common.console()
    for card in started.cards:
        console.print(
            f"Serving {card.name} ({len(card.class_names)} classes, version {card.version}) "
            f"by {card.backend} in {card.precision} at {started.url}",
            soft_wrap=True,
        )
    console.print(f"Try:  curl --data-binary @photo.jpg '{started.url}/v1/recognize?top_k=3'", soft_wrap=True)
    console.print("Stop: Ctrl-C", soft_wrap=True)
