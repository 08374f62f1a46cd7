"""Scripts in processes forked from this one, which has imported all that they need: one, or the ranks of a group."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

from .common import clean_environment


class Forked:
    """A group of processes, each of which runs the same text as its main program."""

    def __init__(self, text: str, arguments: list[str], ranks: int = 1, output: Path | None = None):
        self.output = output
        self.errors = Path(arguments[0]) / "errors"
        self.pids: list[int] = []
        port = _free_port()
        for rank in range(ranks):
            pid = os.fork()
            if not pid:
                self._run(text, arguments, rank, ranks, port)
            self.pids.append(pid)

    def _run(self, text: str, arguments: list[str], rank: int, ranks: int, port: int) -> None:
        status = 1
        try:
            with open(self.errors, "ab", buffering=0) as errors:
                os.dup2(errors.fileno(), 2)
                os.dup2(errors.fileno(), 1)
            if self.output is not None:
                sys.stdout = open(self.output, "a", buffering=1)
            environment = clean_environment() | {"OMP_NUM_THREADS": "1"}
            if ranks > 1:
                # To Lightning these say that it has not to start the others.
                environment |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_PORT": str(port)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(ranks)}
            os.environ.clear()
            os.environ.update(environment)
            sys.argv = ["script", *arguments]
            torch.set_num_threads(1)
            exec(compile(text, "script", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)  # pytest's own exit hooks have nothing to say here

    def poll(self) -> int | None:
        """How they ended, 0 where all did well; None while one runs. One that fails ends the others."""
        states = [_ended(pid) for pid in self.pids]
        if any(state not in (None, 0) for state in states):
            self.kill()
            return 1
        return None if None in states else 0

    def wait(self, timeout: float = 120) -> None:
        """Raises `AssertionError` with what they said where one fails, or they take too long."""
        until = time.monotonic() + timeout
        while (ended := self.poll()) is None and time.monotonic() < until:
            time.sleep(0.01)
        if ended is None:
            self.kill()
        assert ended == 0, f"{'failed' if ended else 'did not end in time'}:\n{self.said()}"

    def said(self) -> str:
        return self.errors.read_text()[-3000:] if self.errors.exists() else ""

    def kill(self) -> None:
        for pid in self.pids:
            if _ended(pid) is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                _endings[pid] = -signal.SIGKILL


_endings: dict[int, int] = {}


def _ended(pid: int) -> int | None:
    if pid not in _endings:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _endings[pid] = os.waitstatus_to_exitcode(status)
    return _endings.get(pid)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
