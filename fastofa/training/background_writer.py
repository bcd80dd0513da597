"""Write a run's files in a background thread, so that training continues meanwhile."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType


class Writer:
    """`with Writer() as writer:`, then `writer(job)` runs `job()` in the thread, one job after the other.

    After a job that failed, no further job runs; its exception is raised by the next call of any method, or at the end
    of the block. The end of the block waits for all jobs, except after Ctrl-C.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)  # a disk that hangs does not block the exit

    def __call__(self, job: Callable[[], None]) -> None:
        """Run the job after those before it; returns at once."""
        self.check()
        self._jobs.put(job)

    def check(self) -> None:
        """Raise the exception of a job that failed."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait for all jobs."""
        self._jobs.join()
        self.check()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    job()
            except BaseException as error:  # raised in the main thread by `check`
                self._error = error
            finally:
                self._jobs.task_done()

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._jobs.put(None)
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self._thread.join()
        if kind is None:
            self.check()
