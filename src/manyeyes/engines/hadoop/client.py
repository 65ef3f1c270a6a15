"""The driver's side of a job of Hadoop: submits it, hears of it, and ends it when the driver is through."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

# What of the client's many lines says something to people.
_URL = re.compile(r"The url to track the job: (\S+)")
_JOB = re.compile(r"Running job: (job_\S+)")
_FAILED_ATTEMPT = re.compile(r"Task Id : (attempt_\S+), Status : (FAILED|KILLED)")
_REASON = re.compile(r"Job job_\S+ failed with state (\w+) due to: (.*?)\.?\s*$")
_ERROR = re.compile(r"\b(?:[\w.]*Exception|ERROR|Error)\b.*?: (.*)")
_NO_PROGRAM = re.compile(r'Cannot run program "([^"]+)"')
_COUNTER = re.compile(r"^\s+([^=]+)=(\d+)$")


class Client:
    """A job of Hadoop, run by a supervisor process that outlives the driver and cleans up after it.

    Attributes:
        exit_code: of Hadoop's client; None until it ended.
        job_id: None until the job is submitted.
        counters: the job's, by name, when it ended.
        state: FAILED or KILLED, where the job ended so.
        reason: why the job failed, in Hadoop's words; empty if it said none.
        missing_program: what a node could not start, if there was such.
    """

    def __init__(self, folder: str, kill: Sequence[str], environment: Mapping[str, str]) -> None:
        self.exit_code: int | None = None
        self.job_id: str | None = None
        self.counters: dict[str, int] = {}
        self.state: str | None = None
        self.reason = ""
        self.missing_program: str | None = None
        self._url = ""
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "manyeyes.engines.hadoop.supervisor"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
            process_group=0,  # Ctrl-C is for the driver alone
        )
        self._send({"folder": folder, "kill": list(kill)})

    def submit(self, command: Sequence[str]) -> None:
        """Run the command that submits the job and stays with it."""
        threading.Thread(target=self._listen, daemon=True).start()
        self._send({"command": list(command)})

    def wait(self, seconds: float) -> None:
        """Return when the job ended, or after `seconds`."""
        self._ended.wait(seconds)

    def messages(self) -> list[str]:
        """What is new to say to people."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._messages.get_nowait())
        return found

    def close(self) -> None:
        """End the job if it still runs, and remove its folder."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"exit_code"'):
                self.exit_code = json.loads(line)["exit_code"]
                break
            self._hear(line.rstrip())
        else:
            self.exit_code = -1  # the supervisor died
        self._ended.set()

    def _hear(self, line: str) -> None:
        if missing := _NO_PROGRAM.search(line):
            self.missing_program = missing[1]
        if found := _REASON.search(line):
            self.state, self.reason = found[1], found[2]
        elif (found := _ERROR.search(line)) and not self.reason:
            self.reason = found[1]
        elif found := _COUNTER.search(line):
            self.counters[found[1]] = int(found[2])
        elif found := _URL.search(line):
            self._url = found[1]
        elif found := _JOB.search(line):
            self.job_id = found[1]
            self._messages.put(f"Hadoop runs {self.job_id}: {self._url}")
        elif (found := _FAILED_ATTEMPT.search(line)) and found[2] == "FAILED":
            self._messages.put(f"Hadoop says that {found[1]} failed; YARN tries it again if attempts are left.")
