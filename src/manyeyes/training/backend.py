"""Keras on TensorFlow, made ready: quiet, deterministic, with this worker's share of the cores."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, Literal

from manyeyes.engines.base import COMMAND_VARIABLE, THREADS_VARIABLE, GangContext, threads_per_worker
from manyeyes.errors import MissingExtraError
from manyeyes.models.registry import Precision

# What a driver of NVIDIA or AMD, or Windows's for its Linux, shows.
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
# What a CPU must say to compute bfloat16 itself; others would emulate it, slower than float32.
_BFLOAT16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
# What Keras loads if it is installed, for callers that hand it tables or estimators: a third of Keras's own start.
_UNUSED_BY_US = ("matplotlib", "pandas", "sklearn")


def prepare(
    seed: int,
    num_threads: int | None = None,
    context: GangContext | None = None,
    *,
    use_gpus: bool = True,
    deterministic: bool = True,
) -> bool:
    """Load TensorFlow and fix what a result depends on: seeds, determinism of operations, number of threads, GPUs.

    A process takes memory of a GPU as it needs it, so that others find room on it. float32 is float32 on GPUs too: they
    would round factors to ten bits (TensorFloat-32), and who can do with less asks for bfloat16.

    Args:
        num_threads: for one operation; None: this process's share of the cores.
        context: of a worker in a gang: workers on one host share out its GPUs, one to each.
        use_gpus: False computes on the CPU, unless this process has used a GPU already.
        deterministic: whether operations give the same bits again; once they do, they do in this process to its end.

    Returns:
        whether operations have that number of threads: TensorFlow fixes it with the first operation of a process, and
        sums depend on it.

    Raises:
        MissingExtraError: TensorFlow or Keras is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    try:
        with _native_messages_dropped(), _quick_imports():
            tf = importlib.import_module("tensorflow")
            keras = importlib.import_module("keras")
            threads = num_threads or threads_per_worker()
            # TensorFlow refuses once it has run anything in this process; then the threads are what they are.
            with contextlib.suppress(RuntimeError):
                tf.config.threading.set_intra_op_parallelism_threads(threads)
                tf.config.threading.set_inter_op_parallelism_threads(1)
            gpus = _own_gpus(tf.config.list_physical_devices("GPU"), context) if use_gpus else []
            with contextlib.suppress(RuntimeError):
                tf.config.set_visible_devices(gpus, "GPU")
            for gpu in gpus:
                with contextlib.suppress(RuntimeError):
                    tf.config.experimental.set_memory_growth(gpu, True)
    except ModuleNotFoundError:
        raise MissingExtraError("Training", "train") from None
    keras.utils.set_random_seed(seed)
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return bool(tf.config.threading.get_intra_op_parallelism_threads() == threads)


def resolve_precision(wanted: Precision | Literal["auto"]) -> Precision:
    """What "auto" is here: bfloat16 where the first GPU or, without one, the CPU computes it, else float32."""
    if wanted != "auto":
        return wanted
    if num_gpus():
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        return "bfloat16" if capability >= (8, 0) else "float32"
    return "bfloat16" if _cpu_flags() & _BFLOAT16_CPU_FLAGS else "float32"


def versions() -> dict[str, str]:
    """Versions of what a run depends on.

    Raises:
        MissingExtraError: TensorFlow or Keras is not installed.
    """
    import manyeyes

    try:
        libraries = {name: importlib.metadata.version(name) for name in ("tensorflow", "keras", "numpy")}
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError("Training", "train") from None
    return {"manyeyes": manyeyes.__version__, "python": platform.python_version(), **libraries}


def _own_gpus(gpus: list[Any], context: GangContext | None) -> list[Any]:
    """The GPU of a worker: the one that has its number among the workers of its host. Alone, it has the first."""
    if context is None or not gpus:
        return gpus[:1]
    hosts = _hosts(context)
    local_rank = hosts[: context.rank].count(hosts[context.rank])
    return [gpus[local_rank % len(gpus)]]


def has_own_gpu(context: GangContext) -> bool:
    """Whether each worker of this host has a GPU that no other worker uses; see `prepare`."""
    import tensorflow as tf

    hosts = _hosts(context)
    return hosts.count(hosts[context.rank]) <= len(tf.config.list_physical_devices("GPU"))


def _hosts(context: GangContext) -> list[str]:
    return [address.rpartition(":")[0] for address in context.addresses] or [""]


def num_gpus() -> int:
    """GPUs of this machine that TensorFlow can use; asked without loading it where there is no driver of any."""
    if not any(Path(device).exists() for device in _GPU_DEVICES):
        return 0
    import tensorflow as tf

    return len(tf.config.list_physical_devices("GPU"))


def _cpu_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return set()
    for line in cpuinfo.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


class _NotForKeras(MetaPathFinder):
    """Finds nothing by the names of `_UNUSED_BY_US` while Keras is loaded, and is no obstacle to who asks later."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        keras = getattr(sys.modules.get("keras"), "__spec__", None)
        if name in _UNUSED_BY_US and getattr(keras, "_initializing", False):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@contextlib.contextmanager
def _quick_imports() -> Iterator[None]:
    """Halve what it takes to load TensorFlow, which is most of a worker's start: 7 s of CPU.

    The other half is a search for garbage among what is being made and there to stay, and libraries that Keras loads
    for the sake of others. Those it still gets where code of others runs: when a script or notebook of theirs trains.
    """
    is_ours = COMMAND_VARIABLE in os.environ or THREADS_VARIABLE in os.environ
    finders = [_NotForKeras()] if is_ours else []
    collects = gc.isenabled()
    gc.disable()
    sys.meta_path[:0] = finders
    try:
        yield
    finally:
        for finder in finders:
            sys.meta_path.remove(finder)
        if collects:
            gc.enable()


@contextlib.contextmanager
def _native_messages_dropped() -> Iterator[None]:
    # TensorFlow's libraries write some lines to file descriptor 2 while they load, whatever the log level is.
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
