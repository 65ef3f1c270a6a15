"""The server's log: one line an event, as text for people or as JSON for machines, with the id of the request."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any, Literal

LogFormat = Literal["text", "json"]
_OF_A_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class _Formatter(logging.Formatter):
    """Fields that were given by `extra` are shown behind the message, or as keys."""

    def __init__(self, log_format: LogFormat) -> None:
        super().__init__()
        self._json = log_format == "json"

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        when = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = {name: value for name, value in vars(record).items() if name not in _OF_A_RECORD}
        failure = self.formatException(record.exc_info) if record.exc_info else ""
        if self._json:
            content: dict[str, Any] = {
                "time": when,
                "level": record.levelname.lower(),
                "message": record.getMessage(),
                **fields,
            }
            if failure:
                content["traceback"] = failure
            return json.dumps(content, ensure_ascii=False, default=str)
        # What a client sent may hold line breaks or worse; a line of the log stays a line.
        shown = "".join(f" {name}={_in_a_word(value)}" for name, value in fields.items())
        text = f"{when} {record.levelname.lower():7} {record.getMessage()}{shown}"
        return f"{text}\n{failure}" if failure else text


def _in_a_word(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


def set_up(log_format: LogFormat) -> None:
    """Send the log of this package to standard error, from level INFO."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(log_format))
    log = logging.getLogger("manyeyes.serving")
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
