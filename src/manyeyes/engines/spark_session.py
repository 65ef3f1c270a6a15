"""How the Spark engine comes to its SparkContext: that of the running session, or a new one made from settings."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from manyeyes.config import flatten
from manyeyes.engines.base import MAX_ATTEMPTS, THREADS_VARIABLE
from manyeyes.engines.environment import node_python, pack_environment
from manyeyes.errors import EngineError, ManyeyesError, MissingExtraError, UsageError
from manyeyes.storage.remote import why_unreachable

if TYPE_CHECKING:
    from pyspark import SparkConf, SparkContext

# The folder of a shipped environment in an executor's working directory.
SHIPPED_ENVIRONMENT = "manyeyes-environment"
_LOOPBACK = re.compile(r"local\b|spark://(127\.[\d.]+|localhost)(:|$)")
# The session that this module made last, and from what. One that it did not make is never stopped.
_made: tuple[SparkContext, SparkSettings, int | None] | None = None
_log = logging.getLogger("manyeyes.engines")


@dataclass(frozen=True)
class SparkSettings:
    """Where and how Spark runs. A session that runs already is used as it is, and only said to differ.

    Attributes:
        master: spark://host:port, yarn, k8s://…, local[N]; default: what spark-submit says, else this machine.
        app_name: as Spark's pages show it.
        executors: how many; default: one for --workers tasks, or what the cluster gives.
        executor_cores: tasks at once in each executor; default: Spark's.
        executor_memory: of each, as Spark writes it: "4g".
        python: the interpreter on the executors; default: this one, or with `ship_env` the nodes' own python3.N.
        ship_env: send this environment's packages to executors that do not have them.
        ship_extras: the extras of Manyeyes that are sent with it; default: what ingest, evaluate and predict may need.
        pass_environment: the driver's environment variables that tasks get, by name or pattern: ["AWS_*"].
        properties: any spark.* properties; they win over all of the above.
        quiet: keep what Spark itself writes to the terminal for error messages.
    """

    master: str | None = None
    app_name: str = "manyeyes"
    executors: int | None = None
    executor_cores: int | None = None
    executor_memory: str | None = None
    python: str | None = None
    ship_env: bool = False
    ship_extras: tuple[str, ...] | None = None
    pass_environment: tuple[str, ...] = ()
    properties: dict[str, Any] = field(default_factory=dict)
    quiet: bool = True

    def __post_init__(self) -> None:
        for name in ("executors", "executor_cores"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} is below 1. Give at least 1, or leave it out.")
        for name in self.flat_properties:
            if not name.startswith("spark."):
                raise UsageError(f"{name!r} is not a property of Spark: expected a name like spark.executor.memory.")

    @property
    def named_master(self) -> str:
        """The master that these settings name; empty if they leave it to Spark's own."""
        return self.flat_properties.get("spark.master") or self.master or ""

    @property
    def flat_properties(self) -> dict[str, str]:
        """`properties` as Spark takes them: dots and sections mean the same, true is "true"."""
        return flatten(self.properties)


def connect(settings: SparkSettings, num_workers: int | None) -> SparkContext:
    """Return the context of the running session, or make one.

    A session that was made here gives way to one with other settings; a user's own never does.

    Raises:
        MissingExtraError: pyspark is not installed.
        UsageError: the address of a master has no port, or an environment can't be shipped to the running session.
        EngineError: there is no Java, or no master answers.
    """
    try:
        from pyspark import SparkContext
    except ImportError:
        raise MissingExtraError("The Spark engine", "spark") from None
    global _made
    running = SparkContext._active_spark_context
    if running is not None and not is_alive(running):
        # Java was killed, mostly for its memory; what Python still holds of it would fail at every use.
        with contextlib.suppress(Exception):
            running.stop()
        running._jsc = SparkContext._active_spark_context = running = None  # type: ignore[attr-defined]
        _end_java()
    if running is not None and (_made is None or running is not _made[0]):
        return _adopt(running, settings)
    if running is not None and _made is not None:
        if (settings, num_workers) in (_made[1:], (SparkSettings(), None)):
            return running
        stop(running)
    with tempfile.TemporaryFile() as log, _interrupts_as_they_were(), _environment(settings):
        try:
            context = _create(settings, num_workers, log if settings.quiet else None)
        except Exception as error:
            if isinstance(error, ManyeyesError):
                raise
            raise EngineError(_explain_start(error, log)) from error
        finally:
            if SparkContext._active_spark_context is None:
                _end_java()
    _made = (context, settings, num_workers)
    where = f", {context.uiWebUrl}" if context.uiWebUrl else ""
    _log.info("Spark application %s on %s%s", context.applicationId, context.master, where)
    return context


def stop(context: SparkContext) -> None:
    """Stop a session and its Java: a new one in the same Java would find the settings of the old one."""
    context.stop()
    _end_java()


def is_alive(context: SparkContext) -> bool:
    """Whether the session was not stopped, and its Java still runs."""
    process = getattr(context._gateway, "proc", None)  # None where Java belongs to spark-submit
    return context._jsc is not None and (process is None or process.poll() is None)  # type: ignore[attr-defined]


def _end_java() -> None:
    """End Java, if Python started it."""
    from pyspark import SparkContext

    gateway = SparkContext._gateway
    process = getattr(gateway, "proc", None)
    if gateway is None or process is None:
        return
    SparkContext._gateway = SparkContext._jvm = None
    with contextlib.suppress(Exception):  # it may be dead
        gateway.shutdown()
    process.stdin.close()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()


def attempts_of_spark(context: SparkContext) -> int:
    """How often Spark itself tries a task before its job fails."""
    local = re.fullmatch(r"local(?:\[[^,\]]*(?:,\s*(\d+)\s*)?\])?", context.master or "")
    if local:
        return int(local[1] or 1)
    return int(context.getConf().get("spark.task.maxFailures", "4") or 4)


def is_local(context: SparkContext) -> bool:
    """Whether tasks run on this machine only."""
    return (context.master or "").startswith("local")


def num_slots(context: SparkContext) -> int:
    """How many tasks the executors that are there can run at once; Spark counts them so for barrier stages too."""
    scala = context._jsc.sc()  # type: ignore[attr-defined]
    return int(scala.maxNumConcurrentTasks(scala.resourceProfileManager().defaultResourceProfile()))


def _create(settings: SparkSettings, num_workers: int | None, log: IO[bytes] | None) -> SparkContext:
    from pyspark import SparkConf, SparkContext
    from pyspark.java_gateway import launch_gateway

    _check_java()
    properties = settings.flat_properties
    _check_master(settings.named_master)
    conf = SparkConf(loadDefaults=False)
    if settings.master:
        conf.set("spark.master", settings.master)
    for name, value in properties.items():
        conf.set(name, value)
    # Java's own lines, before Spark reads any setting, would be in the way of a progress bar.
    popen = {} if log is None else {"stdout": log, "stderr": log}
    SparkContext._ensure_initialized(gateway=launch_gateway(conf, popen), conf=conf)
    # Now also with what spark-submit and spark-defaults.conf say.
    conf = SparkConf(_jvm=SparkContext._jvm)
    master = settings.named_master or conf.get("spark.master", None) or "local[*]"
    for name, value in _properties(master, settings, num_workers, conf).items():
        conf.set(name, value)
    for name, value in properties.items():
        conf.set(name, value)
    return SparkContext(conf=conf)


def _properties(master: str, settings: SparkSettings, num_workers: int | None, conf: SparkConf) -> dict[str, str]:
    properties = {
        "spark.master": _local_master(master, num_workers),
        "spark.app.name": settings.app_name,
        # The same number of tries on every engine.
        "spark.task.maxFailures": str(MAX_ATTEMPTS),
        "spark.ui.showConsoleProgress": "false",
        # Many sessions on one machine look for a free port for their pages from 4040 on.
        "spark.port.maxRetries": "64",
        # A task's bytes wait up to 40 ms for each other in a TCP socket (Spark 4.1 and newer).
        "spark.python.unix.domain.socket.enabled": "true",
        f"spark.executorEnv.{THREADS_VARIABLE}": conf.get("spark.task.cpus", "1") or "1",
    }
    if _LOOPBACK.match(master):
        # No one else has to reach the driver, so no one can.
        properties |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    if not master.startswith("local"):
        properties |= _resources(master, settings, num_workers)
        if settings.ship_env:
            properties |= _shipping(settings, conf)
    elif settings.ship_env:
        _log.info("Spark runs on this machine (%s), so there is nothing to ship.", master)
    return properties


def _resources(master: str, settings: SparkSettings, num_workers: int | None) -> dict[str, str]:
    properties: dict[str, str] = {}
    cores, executors = settings.executor_cores, settings.executors
    if executors is None and num_workers is not None and not master.startswith("spark://"):
        executors = -(-num_workers // (cores or 1))
    if executors is not None:
        cores = cores or 1
        properties["spark.executor.instances"] = str(executors)
        # A standalone master knows no number of executors, only of cores.
        properties["spark.cores.max"] = str(executors * cores)
    elif num_workers is not None:
        properties["spark.cores.max"] = str(num_workers)
    if cores is not None:
        properties["spark.executor.cores"] = str(cores)
    if settings.executor_memory is not None:
        properties["spark.executor.memory"] = settings.executor_memory
    return properties


def _shipping(settings: SparkSettings, conf: SparkConf) -> dict[str, str]:
    archive = pack_environment(settings.ship_extras)
    others = conf.get("spark.archives", "")
    path = conf.get("spark.executorEnv.PYTHONPATH", "")
    return {
        "spark.archives": ",".join(filter(None, [others, f"{archive}#{SHIPPED_ENVIRONMENT}"])),
        "spark.executorEnv.PYTHONPATH": os.pathsep.join(filter(None, [SHIPPED_ENVIRONMENT, path])),
    }


def _local_master(master: str, num_workers: int | None) -> str:
    """Give a local master the number of tries that clusters have; "local[4]" of Spark tries once."""
    match = re.fullmatch(r"local(?:\[([^,\]]+)\])?", master)
    if not match:
        return master
    count = match[1] or "1"
    return f"local[{num_workers if num_workers and count == '*' else count},{MAX_ATTEMPTS}]"


def _adopt(context: SparkContext, settings: SparkSettings) -> SparkContext:
    default = SparkSettings()
    # Silence is no matter of the session's.
    changed = [f.name for f in fields(settings) if getattr(settings, f.name) != getattr(default, f.name)]
    ignored = [name for name in changed if name not in ("quiet", "ship_extras", "pass_environment")]
    if settings.master == context.master and "master" in ignored:
        ignored.remove("master")
    if settings.ship_env and not is_local(context):
        raise UsageError(
            f"A Spark session runs already ({context.applicationId} on {context.master}), and an environment is "
            "shipped when a session starts. Stop it, or start it with the properties of docs/guides/spark.md."
        )
    if ignored:
        _log.info(
            "The running Spark session (%s on %s) is used as it is; without effect: %s",
            context.applicationId,
            context.master,
            ", ".join(ignored),
        )
    return context


def _check_java() -> None:
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        return  # spark-submit has started it
    home = os.environ.get("JAVA_HOME")
    mend = "Install one, e.g. apt-get install openjdk-17-jre-headless, or set JAVA_HOME to it."
    if home and not (Path(home) / "bin" / "java").exists():
        raise EngineError(f"Spark needs Java 17 or newer, and JAVA_HOME={home} has no bin/java. {mend}")
    if not home and shutil.which("java") is None:
        raise EngineError(f"Spark needs Java 17 or newer, and there is no `java` on the PATH. {mend}")


def _check_master(master: str) -> None:
    """Find out in seconds that no standalone master listens; Spark itself tries for a minute, with a job waiting."""
    if not master.startswith("spark://"):
        return
    problems = []
    for address in master.removeprefix("spark://").split(","):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise UsageError(f"The setting master is {master}; expected spark://HOST:PORT.")
        reason = why_unreachable(host, int(port))
        if reason is None:
            return
        problems.append(f"{address}: {reason}")
    raise EngineError(f"No Spark master answers at {master} ({'; '.join(problems)}). Check the setting master.")


def _explain_start(error: Exception, log: IO[bytes]) -> str:
    log.seek(0)
    text = log.read().decode(errors="replace")
    if "UnsupportedClassVersionError" in text:
        return "Spark needs Java 17 or newer, and the one found is older. Set JAVA_HOME to a newer one."
    said = [line for line in text.splitlines() if re.search(r"\b(ERROR|Exception|Error)\b", line)]
    return f"Spark can't start: {_first_line(error)}" + (f" It said: {said[-1].strip()}" if said else "")


def _first_line(error: Exception) -> str:
    java = getattr(error, "java_exception", None)
    text = str(java.toString() if java is not None else error).strip()
    return text.splitlines()[0] if text else repr(error)


@contextlib.contextmanager
def _interrupts_as_they_were() -> Iterator[None]:
    """Undo what SparkContext does to Ctrl-C: its handler cancels the jobs of everyone; the engine cancels its own."""
    previous = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def _environment(settings: SparkSettings) -> Iterator[None]:
    """What Spark takes from environment variables only, while it starts; what the user has set stays."""
    master = settings.named_master or "local[*]"
    wanted: dict[str, str] = {}
    if settings.python is not None:
        wanted["PYSPARK_PYTHON"] = settings.python
    elif "PYSPARK_PYTHON" not in os.environ:
        shipped = settings.ship_env and not master.startswith("local")
        wanted["PYSPARK_PYTHON"] = node_python() if shipped else sys.executable
    if _LOOPBACK.match(master) and "SPARK_LOCAL_IP" not in os.environ and "PYSPARK_GATEWAY_PORT" not in os.environ:
        wanted["SPARK_LOCAL_IP"] = "127.0.0.1"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
