"""What may be set for a server, with the defaults."""

from __future__ import annotations

from dataclasses import dataclass

from manyeyes.recognition.bundle import BackendName
from manyeyes.serving.logs import LogFormat


@dataclass(frozen=True)
class ServeSettings:
    """What a request may be, how long it may take, and how the models are run.

    Attributes:
        default_top_k: classes in an answer when the request does not say.
        max_body_bytes: of one request; more is refused unread.
        max_pixels: of one image, as its header says; more is refused before it is decoded.
        max_images: of one request (multipart, or the first axis of a tensor).
        max_queue: images that may wait for a version, with workers for any; more are refused with 503 and Retry-After.
        max_bodies_bytes: of all requests that are being read or answered.
        max_connections: open at once.
        header_timeout_seconds: for the whole head of a request.
        body_timeout_seconds: for the body, besides a second for each `min_body_bytes_per_second` of it.
        idle_timeout_seconds: between two requests of a connection.
        write_timeout_seconds: without the client taking any byte of its answer.
        drain_delay_seconds: after SIGTERM, in which /readyz says no and everything is still answered.
        drain_timeout_seconds: after that, for the requests under way.
        token: that every request but those of the probes, the page and the documentation must carry; None: no token.
        cors_origins: that may use the server from a browser's page; "*" is every one. Default: none.
        tls_cert, tls_key: PEM files; None: no TLS.
        num_workers: processes that recognise; 1: this one.
        worker_timeout_seconds: without a sign of life, after which a worker process is killed and replaced.
        job_timeout_seconds: in which a worker process answers what it was given, else it is killed and replaced.
        num_threads: that decode, and of one call of a model, in each worker; None: all cores, shared by the workers.
        backend: None: the one that the bundle prefers.
        poll_seconds: between two looks for new versions.
        keep_versions: the newest so many versions of a model are served.
        log_format: "text" or "json", for the worker processes; `logs.set_up` sets this process's.
        access_log: a line for each request, not only for those that failed.
    """

    default_top_k: int = 5
    max_body_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 50_000_000
    max_images: int = 256
    max_queue: int = 512
    max_bodies_bytes: int = 512 * 1024 * 1024
    max_connections: int = 4096
    header_timeout_seconds: float = 10.0
    body_timeout_seconds: float = 20.0
    min_body_bytes_per_second: int = 32 * 1024
    idle_timeout_seconds: float = 75.0
    write_timeout_seconds: float = 30.0
    drain_delay_seconds: float = 0.0
    drain_timeout_seconds: float = 30.0
    token: str | None = None
    cors_origins: tuple[str, ...] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    num_workers: int = 1
    worker_timeout_seconds: float = 30.0
    job_timeout_seconds: float = 300.0
    num_threads: int | None = None
    backend: BackendName | None = None
    poll_seconds: float = 5.0
    keep_versions: int = 2
    log_format: LogFormat = "text"
    access_log: bool = False
