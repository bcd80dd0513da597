"""Helpers for tests of several ranks: forked processes with the environment variables that torchrun sets."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed import TCPStore

from fastofa.runs.log import read_metrics
from runs import CONTEXT

PATIENCE_S = 900  # which only a rank that hangs uses up


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Ranks:
    """Processes that each call `work(rank, *arguments)`; leaving `with Ranks(...)` kills those that are left.

    Rank 0 holds the store that the ranks share; with `agent`, this process does, as torchrun does on one node.
    """

    def __init__(
        self, size: int, folder: Path, work: Callable[..., None], *arguments: Any, agent: bool = False
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        place = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        if agent:
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            place |= {"MASTER_PORT": self.store.port}
            place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0}
        self.logs = [folder / f"rank{rank}.log" for rank in range(size)]
        self.processes = [
            CONTEXT.Process(target=_rank, args=({**place, "RANK": rank, "LOCAL_RANK": rank}, log, work, arguments))
            for rank, log in enumerate(self.logs)
        ]

    def __enter__(self) -> "Ranks":
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self) -> list[int | None]:
        """Wait for all processes and return their exit codes, negative for signals."""
        end = time.monotonic() + PATIENCE_S
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0))
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, self.output()
        return codes

    def output(self) -> list[str]:
        return [log.read_text() if log.exists() else "" for log in self.logs]

    def reach(self, run: Path, step: int) -> None:
        wait_for_step(run, step, lambda: all(process.is_alive() for process in self.processes))


def _rank(place: dict[str, Any], log: Path, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    os.environ |= {name: str(value) for name, value in place.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    work(place["RANK"], *arguments)


def wait_for_step(run: Path, step: int, alive: Callable[[], bool]) -> None:
    """Wait until the step is in the log."""
    end = time.monotonic() + PATIENCE_S
    while not any(row["step"] >= step for row in read_metrics(run)):
        assert time.monotonic() < end, "waited in vain"
        assert alive(), "it ended too soon"
        time.sleep(0.005)
