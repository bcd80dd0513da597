"""Meet the other ranks as given by torchrun's environment variables: the store that all share, and this rank's place.

The store is a small server of keys with values and counters. A process without torchrun gets a store of its own.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from fastofa.system.errors import BadInput


class Place(NamedTuple):
    """This process's position among the ranks; Place() is a single process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among the processes of this host, which is the number of the GPU to use."""
    local_size: int = 1
    """Processes on this host, which share its CPU cores."""

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0


def meet(timeout: timedelta) -> tuple[dist.Store, Place]:
    """The store that all ranks share, and this rank's place.

    Args:
        timeout: how long to wait for the other ranks.

    Raises:
        BadInput: some of torchrun's environment variables are missing or wrong.
    """
    try:
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return dist.HashStore(), Place()
        local_rank, local_size = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        with interruptible():
            store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    except (KeyError, ValueError) as error:
        raise BadInput(
            f"WORLD_SIZE: expected all environment variables of torchrun with it ({error}); start with torchrun or "
            "unset it"
        ) from None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's own store outlives the ranks and still holds the addresses of those that died.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store, Place(rank, size, local_rank, local_size)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process at once while it waits for other ranks, which takes long if they are gone.

    Python's own handler would run only after the wait.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
