"""Worker processes that fill batches in parallel, in memory shared with this process.

Threads would be simpler, but with many cores they wait for the GIL. The memory is mapped before the processes fork.
PyTorch's DataLoader uses files in /dev/shm instead, of which a container has only 64 MB by default.
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
from fastofa.system.locks import close_inherited

AHEAD = 2  # batches assigned to a worker at a time
NORESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap.MAP_NORESERVE since Python 3.13
PR_SET_PDEATHSIG = 1
Fill = Callable[[int, np.ndarray], int]


@dataclass
class _Worker:
    pid: int
    connection: Connection
    exit_code: int | None = None

    def end(self) -> int:
        """End the worker. Returns its exit code, negative if a signal killed it."""
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.exit_code


def fill_batches(fill: Fill, batches: int, batch_bytes: int, workers: int) -> Generator[np.ndarray, None, None]:
    """Yield the bytes of each batch, in order; each is valid until the next one. Closing the generator ends the
    processes.

    Args:
        fill: called by a worker with the batch's number and an array uint8 [batch_bytes]; returns how many bytes it
            filled.
        batches: number of batches.
        batch_bytes: maximum bytes of a batch.
        workers: number of processes, at least 1.

    Raises:
        BadInput, OSError, MemoryError: raised by `fill` in a worker.
        RuntimeError: `fill` raised another exception, whose traceback is in the message.
        Failed: a worker was killed.
        Stopped: a signal arrived while waiting for a worker.
    """
    workers = min(workers, batches)
    if not batches:
        return
    slots = AHEAD * workers + 1  # one is in use by the caller
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | NORESERVE
    memory = np.frombuffer(mmap.mmap(-1, slots * batch_bytes, flags=flags), np.uint8).reshape(slots, batch_bytes)
    started: list[_Worker] = []
    try:
        for _ in range(workers):
            started.append(_start(fill, memory))  # noqa: PERF401 (if one fails to start, the others must be ended)
        for number in range(min(AHEAD * workers, batches)):
            _assign(started[number % workers], number)
        for number in range(batches):
            with waiting():
                count = _receive(started[number % workers])
            if number + AHEAD * workers < batches:
                _assign(started[number % workers], number + AHEAD * workers)
            yield memory[number % slots, :count]
    finally:
        for worker in started:
            worker.connection.close()
            worker.end()


def _assign(worker: _Worker, number: int) -> None:
    with suppress(BrokenPipeError):  # it was killed, which `_receive` reports
        worker.connection.send(number)


def _receive(worker: _Worker) -> int:
    """The number of bytes that a worker filled. Raises the worker's exception."""
    try:
        result = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        code = worker.end()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        raise Failed(
            f"a decoder process ended ({how}), most likely because memory ran out; use fewer --workers (0: none), a "
            "smaller --batch-size or more memory"
        ) from None
    if isinstance(result, BaseException):
        raise result
    return result


def _start(fill: Fill, memory: np.ndarray) -> _Worker:
    parent_end, worker_end = Pipe()
    parent = os.getpid()
    # Both signals are blocked during the fork, so that a worker ignores them from the start.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        pid = os.fork()
        if pid == 0:
            try:
                _begin(parent)
                parent_end.close()
                _work(fill, memory, worker_end)
            finally:
                os._exit(1)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    worker_end.close()
    return _Worker(pid, parent_end)


def _begin(parent: int) -> None:
    """Set up a worker. Ctrl-C and a cluster's SIGTERM reach every process; only the main one handles them.

    A worker is killed when its parent ends, whatever it is doing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    close_inherited()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has already ended
        os._exit(1)
    torch.set_num_threads(1)


def _work(fill: Fill, memory: np.ndarray, connection: Connection) -> None:
    while True:
        number = connection.recv()
        try:
            result: int | Exception = fill(number, memory[number % len(memory)])
        except (BadInput, OSError, MemoryError) as error:
            result = error
        except Exception as error:  # it may not be picklable
            result = RuntimeError("in a decoder process:\n" + "".join(traceback.format_exception(error)))
        connection.send(result)
