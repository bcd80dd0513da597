"""Processes that fill batches side by side, into memory that they share with this one.

Threads would be simpler, but with many cores they wait for the GIL. The memory is mapped before the processes are
forked. PyTorch's DataLoader uses files in /dev/shm instead, and a container has 64 MB of that.
"""

import ctypes
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np
import torch

from fastofa.system.errors import BadInput, Failed
from fastofa.system.interrupt import waiting

AHEAD = 2  # batches that a worker has before it when it ends one
NORESERVE = 0x4000 if sys.platform == "linux" else 0  # in Python's mmap since 3.13
PR_SET_PDEATHSIG = 1
Fill = Callable[[int, np.ndarray], int]


@dataclass
class _Worker:
    pid: int
    connection: Connection
    exit_code: int | None = None

    def end(self) -> int:
        """Its exit code, minus the signal that killed it."""
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.exit_code


def filled(fill: Fill, batches: int, batch_bytes: int, workers: int) -> Generator[np.ndarray, None, None]:
    """The bytes of each batch, in order, each valid until the next one is asked for. Closing it ends the processes.

    Args:
        fill: called by a worker with the batch's number and uint8 [batch_bytes] to fill; returns how many it filled.
        batches: how many there are.
        workers: processes, at least 1.

    Raises:
        what `fill` raised in a worker, if it is a BadInput, an OSError or a MemoryError.
        Failed: a worker was killed.
        Stopped: by a signal, while a worker does not answer.
    """
    workers = min(workers, batches)
    if not batches:
        return
    slots = AHEAD * workers + 1  # one is being used
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | NORESERVE
    memory = np.frombuffer(mmap.mmap(-1, slots * batch_bytes, flags=flags), np.uint8).reshape(slots, batch_bytes)
    team: list[_Worker] = []
    try:
        for _ in range(workers):
            team.append(_start(fill, memory))  # noqa: PERF401 (what was started has to be ended)
        for number in range(min(AHEAD * workers, batches)):
            _ask(team[number % workers], number)
        for number in range(batches):
            with waiting():
                count = _answer(team[number % workers])
            if number + AHEAD * workers < batches:
                _ask(team[number % workers], number + AHEAD * workers)
            yield memory[number % slots, :count]
    finally:
        for worker in team:
            worker.connection.close()
            worker.end()


def _ask(worker: _Worker, number: int) -> None:
    with suppress(BrokenPipeError):  # it was killed: its answer says so
        worker.connection.send(number)


def _answer(worker: _Worker) -> int:
    try:
        answer = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        code = worker.end()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        raise Failed(
            f"a process that decodes images ended ({how}), most likely because memory ran out; use fewer "
            "--workers (0: none), a smaller --batch-size or more memory"
        ) from None
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _start(fill: Fill, memory: np.ndarray) -> _Worker:
    mine, its = Pipe()
    parent = os.getpid()
    # A worker ignores both signals from its first moment on: it is forked while they are held back.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        pid = os.fork()
        if pid == 0:
            try:
                _begin(parent)
                mine.close()
                _work(fill, memory, its)
            finally:
                os._exit(1)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    its.close()
    return _Worker(pid, mine)


def _begin(parent: int) -> None:
    """Ctrl-C, or a cluster's SIGTERM, reaches every process; the main process alone answers it and ends the workers.

    A worker ends with its parent, whatever it does at that moment.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
    torch.set_num_threads(1)


def _work(fill: Fill, memory: np.ndarray, connection: Connection) -> None:
    while True:
        number = connection.recv()
        try:
            answer: int | Exception = fill(number, memory[number % len(memory)])
        except (BadInput, OSError, MemoryError) as error:
            answer = error
        except Exception as error:  # others may not be made to be sent
            answer = RuntimeError("in a process that decodes images:\n" + "".join(traceback.format_exception(error)))
        connection.send(answer)
