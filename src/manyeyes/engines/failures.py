"""What a task's exception becomes on its way to the driver, and what the driver makes of it; shared by all engines."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from typing import Any

from manyeyes.engines.base import describe_failure
from manyeyes.errors import EngineError, ManyeyesError, TaskError


class Failure:
    """An exception of a task, in a form that always pickles.

    Attributes:
        summary: the exception's repr.
        traceback: as text, from the worker.
        error: the exception itself if it was raised on purpose (a ManyeyesError), else None.
    """

    def __init__(self, error: BaseException) -> None:
        self.summary = repr(error)
        self.traceback = "".join(traceback.format_exception(error))
        self.error = error if isinstance(error, ManyeyesError) else None

    def raise_if_on_purpose(self) -> None:
        """Raise the ManyeyesError that the task raised, if it was one: trying again would say the same."""
        if self.error is not None:
            self.error.add_note(f"In the worker:\n{self.traceback}")
            raise self.error

    def task_error(self, fn: Callable[..., Any], index: int, num_attempts: int) -> TaskError:
        """The error of a task that failed on its last attempt."""
        message = f"Task {index} ({describe_failure(fn)}) failed {num_attempts} times: {self.summary}"
        return TaskError(message, self.traceback, index)

    def gang_error(self, rank: int) -> ManyeyesError:
        """The error of a gang in which this rank failed: what was raised on purpose, else a TaskError."""
        if self.error is not None:
            self.error.add_note(f"In worker {rank} of the gang:\n{self.traceback}")
            return self.error
        return TaskError(f"Worker {rank} of the gang failed: {self.summary}", self.traceback)


def death_error(fn: Callable[..., Any], index: int, num_attempts: int, cause: str, hint: str = "") -> TaskError:
    """The error of a task that ended its worker on its last attempt; `hint`: where to look further."""
    message = f"Task {index} ({describe_failure(fn)}) ended its worker {num_attempts} times (last: {cause}). {hint}"
    return TaskError(message.rstrip(), index=index)


def pickle_value(value: Any, what: str) -> bytes:
    """Pickle a function or an item for a worker.

    Raises:
        EngineError: it can't be pickled; `what` names it.
    """
    try:
        return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise EngineError(
            f"{what} can't be sent to a worker: {error}. Use functions at the top level of a module, and plain data."
        ) from error


def pickle_item(fn: Callable[..., Any], index: int, item: Any) -> bytes:
    """Pickle an item of a job. Raises as pickle_value does."""
    return pickle_value(item, f"Item {index} of {describe_failure(fn)}")


def pickle_failure(error: BaseException) -> bytes:
    """Pickle an exception of a task as a Failure, also where the exception itself does not pickle."""
    failure = Failure(error)
    try:
        content = pickle.dumps(failure)
        pickle.loads(content)
    except Exception:
        failure.error = None
        content = pickle.dumps(failure)
    return content
