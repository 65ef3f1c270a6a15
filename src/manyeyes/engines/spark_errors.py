"""What Java's words about a failed Spark job mean."""

from __future__ import annotations

import contextlib
import re

from manyeyes.errors import EngineError

# What is said when the session was stopped, or when its Java died: the last is Python's, of an answer cut short.
_SESSION_ENDED = (
    r"SparkContext (was shut|has been shut)|Py4JNetworkError|Answer from Java side is empty|not enough values to unpack"
)


def is_death(message: str) -> bool:
    """Whether a task ended because its Python or its executor did."""
    return "Python worker exited unexpectedly" in message or "ExecutorLostFailure" in message


def cause_of_death(message: str) -> str:
    """Why, as far as Spark knows; it does not tell signals."""
    if "ExecutorLostFailure" in message:
        reason = re.search(r"ExecutorLostFailure \((.*)\)?$", message, re.MULTILINE)
        return f"its executor was lost: {reason[1].rstrip(')')}" if reason else "its executor was lost"
    return "it was killed or crashed, mostly a lack of memory: use fewer cores per executor"


def job_error(error: Exception) -> EngineError:
    """What a job that failed by no task's fault means to the user."""
    message = message_of(error)
    if "PYTHON_VERSION_MISMATCH" in message:
        versions = re.search(r"version: (\S+) than that in driver: (\d+\.\d+)", message)
        found = f"Python {versions[1]} runs on the executors and {versions[2]} here" if versions else "Pythons differ"
        return EngineError(f"{found}. Give a Python of the same minor version by the setting python.")
    if "No module named 'manyeyes'" in message:
        return EngineError(
            "Manyeyes is not installed for the Python of the executors. Add --ship-env, or name the Python that has it "
            "by the setting python."
        )
    program = re.search(r'Cannot run program "([^"]+)"', message)
    if program:
        return EngineError(f"The executors have no {program[1]}. Name their Python by the setting python.")
    # By its name, as py4j is there with Spark only.
    lost = isinstance(error, OSError | EOFError) or type(error).__name__ == "Py4JNetworkError"
    if lost or re.search(_SESSION_ENDED, message):
        return session_ended()
    lines = [line for line in message.splitlines() if line.strip() and not line.startswith("\tat ")]
    cause = next((line for line in reversed(lines) if re.match(r"\w[\w.]*(Error|Exception)\b", line)), "")
    return EngineError(f"Spark gave the job up: {lines[0] if lines else error!r} {cause}".rstrip())


def session_ended() -> EngineError:
    """What a job that lost its session means to the user."""
    return EngineError("The Spark session ended while the job ran. Run it again; what was done stays done.")


def message_of(error: Exception) -> str:
    """What Java said, without the frames of the driver's own Java."""
    java = getattr(error, "java_exception", None)
    with contextlib.suppress(Exception):  # Java is gone
        return str(java.toString() if java is not None else error)
    return repr(error)
