"""Stands between a driver and Hadoop's client: `python -m manyeyes.engines.hadoop.supervisor`, a process of its own.

It lives until its standard input ends, which the driver closes, or the system does when the driver dies, also by
SIGKILL. Then it ends the job if it still runs, and removes the job's folder. So no driver leaves a job behind.

Its input is JSON, one line each: `{"folder": URI, "kill": [...]}`, then once `{"command": [...]}`, the client to run.
Its output is what the client says, line by line, then `{"exit_code": ...}`.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time

# How long a client that was asked to submit a job may take to say its id, once nobody wants the job any more.
_SUBMIT_SECONDS = 60.0
# How long Hadoop may take to end a job.
_KILL_SECONDS = 60.0
# How long the client may take to end when it is asked to.
_CLIENT_SECONDS = 10.0
# The client says the id in one of these forms, as soon as the job may run.
_JOB_ID = re.compile(r"(?:Submitted application application|Running job: job)_(\d+_\d+)")
_ENDED = re.compile(r"Job job_\S+ (?:completed successfully|failed with state)")


class _Client:
    """Hadoop's client, and what it said of its job."""

    def __init__(self, command: list[str]) -> None:
        self.job_id: str | None = None
        self.ended = False
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.reader = threading.Thread(target=self._pass_on, daemon=True)
        self.reader.start()

    def _pass_on(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := _JOB_ID.search(line):
                self.job_id = f"job_{found[1]}"
            self.ended = self.ended or _ENDED.search(line) is not None
            _say(line)
        _say(json.dumps({"exit_code": self.process.wait()}) + "\n")

    def end(self, kill: list[str]) -> None:
        """End the job and the client, if they still run."""
        deadline = time.monotonic() + _SUBMIT_SECONDS
        while self.job_id is None and self.reader.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.job_id is not None and not self.ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                command = [*kill, self.job_id]
                subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_KILL_SECONDS
                )
        self.process.terminate()
        try:
            self.process.wait(_CLIENT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()


def main() -> None:
    """Run the client that the driver asks for, until the driver is gone."""
    # The driver alone decides when the job ends. Not SIG_IGN, which the client would inherit, and could not be ended.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    settings = json.loads(sys.stdin.readline() or "{}")
    if not settings:
        return
    request = sys.stdin.readline()
    client = _Client(json.loads(request)["command"]) if request else None
    sys.stdin.read()
    if client is not None:
        client.end(settings["kill"])
    from manyeyes import storage

    try:
        storage.remove(settings["folder"], recursive=True)
    except OSError as error:
        print(f"manyeyes: {settings['folder']} is left over, as it can't be removed: {error}", file=sys.stderr)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the driver is gone
        sys.stdout.write(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
