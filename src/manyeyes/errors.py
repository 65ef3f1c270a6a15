"""Every exception that Manyeyes raises on purpose, and the exit code that the command line gives it.

    ManyeyesError                    1   something failed that is not the user's mistake
    ├── StorageError                 1   a file can't be written: no space, no permission, no such place
    ├── UsageError                   2   an option, a path or a setting is wrong
    │   ├── ConfigError              2   a recipe or a setting has an unknown key or a bad value
    │   └── MissingExtraError        2   an optional part is not installed; says which extra to install
    ├── DataError                    3   input data can't be used
    │   ├── SourceError              3   the source of an ingest can't be read or understood
    │   ├── DatasetError             3   a dataset directory is missing, incomplete or damaged
    │   └── ImageError               3   one image can't be used; carries its quarantine `reason`
    ├── TrainingError                4   training can't go on
    │   ├── NonFiniteLossError       4   the loss became NaN or infinite
    │   └── CheckpointError          4   a checkpoint is missing, incomplete or of another model
    ├── BundleError                  5   a bundle is damaged, or does not do what it did when it was exported
    └── EngineError                  6   an engine can't run the job
        └── TaskError                6   a task failed on every attempt; carries the remote traceback

A message says what was received, what was expected and what to do, in one line where it is the user's mistake.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why an input is in quarantine; the value is the code that stands in quarantine rows and manifests."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_MANY_BYTES = "too_many_bytes"
    UNREADABLE = "unreadable"
    MISSING_LABEL = "missing_label"
    UNKNOWN_LABEL = "unknown_label"


class ManyeyesError(Exception):
    """Base of all errors that Manyeyes raises on purpose."""

    exit_code = 1


class StorageError(ManyeyesError, OSError):
    """A file can't be written.

    Args:
        errno, strerror: as in OSError, e.g. 28, "No space left on device".
        filename: the URI of the file.
    """

    def __str__(self) -> str:
        if self.strerror is None:
            return super().__str__()
        return f"{self.filename} can't be written: {self.strerror}. Free space there, or choose another place."


class UsageError(ManyeyesError):
    """An option, a path or a setting is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A recipe or a setting has an unknown key or a bad value."""


class MissingExtraError(UsageError):
    """An optional part is not installed.

    Args:
        what: the thing that needs it, e.g. "training".
        extra: the name of the extra that brings it, e.g. "train".
    """

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(what, extra)
        self.what = what
        self.extra = extra

    def __str__(self) -> str:
        return f"{self.what} needs an optional part that is not installed. Run: pip install 'manyeyes[{self.extra}]'"


class DataError(ManyeyesError):
    """Input data can't be used."""

    exit_code = 3


class SourceError(DataError):
    """The source of an ingest can't be read or understood."""


class DatasetError(DataError):
    """A dataset directory is missing, incomplete or damaged."""


class ImageError(DataError):
    """One image can't be used.

    Args:
        reason: the quarantine code.
        detail: what was found, for people.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value


class TrainingError(ManyeyesError):
    """Training can't go on."""

    exit_code = 4


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, incomplete or of another model."""


class BundleError(ManyeyesError):
    """A bundle is damaged, or does not do what it did when it was exported."""

    exit_code = 5


class EngineError(ManyeyesError):
    """An engine can't run the job."""

    exit_code = 6


class TaskError(EngineError):
    """A task failed on every attempt.

    Args:
        message: which task, how often, and the last error.
        remote_traceback: the traceback as text, from the worker where it happened.
        index: of the task's item; None for a worker of a gang, and where no single task is at fault.
    """

    def __init__(self, message: str, remote_traceback: str = "", index: int | None = None) -> None:
        super().__init__(message, remote_traceback, index)
        self.message = message
        self.remote_traceback = remote_traceback
        self.index = index

    def __str__(self) -> str:
        return f"{self.message}\n{self.remote_traceback}".rstrip()
