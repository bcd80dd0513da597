"""Training one student with several processes: the rank of this process, and communication between the ranks.

    torchrun --no-python --nproc-per-node 8 fastofa train ...

torchrun starts one process per GPU, a *rank*, and sets its number in environment variables. NCCL transfers tensors on
GPUs, gloo those on CPUs. With a single process, nothing here has any effect.
"""

import gc
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastofa.system.errors import BadInput, LostContact
from fastofa.system.rendezvous import interruptible, meet


@dataclass(frozen=True)
class World:
    """This process's position among the ranks. Returned by `join`; World() is a single process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among the processes of this host, which is the number of the GPU to use."""
    local_size: int = 1
    """Processes on this host, which share its CPU cores."""
    timeout: timedelta = timedelta(minutes=10)
    """How long a rank waits for the others before it gives up."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the files and shows progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for the other ranks."""
        self.broadcast(0)

    @contextmanager
    def no_timeout(self) -> Iterator[None]:
        """Wait at the end of the body for the slowest rank, even beyond `timeout`: the body may take hours."""
        if self.size == 1:
            yield
            return
        with interruptible():
            group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        yield
        dist.barrier(group)
        dist.destroy_process_group(group)

    def broadcast(self, number: int) -> int:
        """Return rank 0's number on every rank."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        dist.broadcast(tensor, src=0)
        return int(tensor)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors as a new tensor."""
        tensor = tensor.clone()
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks as a new tensor [ranks, ...]."""
        tensors = [tensor.clone() for _ in range(self.size)]
        if self.size > 1:
            dist.all_gather(tensors, tensor)
        return torch.stack(tensors)

    def average_statistics(self, model: torch.nn.Module) -> None:
        """Replace the running statistics of batch norms by their mean over the ranks, since each saw its own images."""
        if self.size > 1:
            for name, statistic in statistics(model).items():
                if name.endswith(("running_mean", "running_var")):  # not the memories of a distillation method
                    dist.all_reduce(statistic)
                    statistic /= self.size

    def leave(self) -> None:
        """Close the connections. Drop objects that use them (DDP) first, or PyTorch may wait forever."""
        if self.size > 1:
            gc.collect()
            dist.destroy_process_group()


def join(timeout_s: int) -> World:
    """Connect to the other ranks as given by torchrun's environment variables; without torchrun, return World().

    Raises:
        BadInput: some of torchrun's environment variables are missing or wrong.
    """
    timeout = timedelta(seconds=timeout_s)
    store, place = meet(timeout)
    if place.size == 1:
        return World()
    global _store
    _store = store
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with interruptible():
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout)
    return World(*place, timeout)


def statistics(model: torch.nn.Module) -> dict[str, Tensor]:
    """Each rank's own tensors by name: running statistics of batch norms, memories of distillation methods."""
    saved = model.state_dict().keys()
    return {name: b for name, b in model.named_buffers() if name in saved and b.is_floating_point()}


def was_restarted() -> bool:
    """Whether torchrun started this process to replace one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


_store: dist.Store | None = None  # set by `join`
# What gloo and NCCL report, often as plain RuntimeErrors; some of gloo's messages do not contain its name.
CONNECTION_ERROR = re.compile(
    "gloo|NCCL|pair closure|timed out waiting|connection (closed|reset|refused)|broken pipe", re.IGNORECASE
)
REFUSED, STORE_TIMEOUT_S = "refused", 5


@contextmanager
def connection_errors() -> Iterator[None]:
    """Translate the many errors of a broken connection to other ranks into LostContact.

    If the other rank stopped because of BadInput, raise BadInput here too, so that torchrun does not restart the ranks.
    """
    try:
        yield
    except BadInput:
        _query_store(lambda store: store.set(REFUSED, os.environ["RANK"]))
        raise
    except RuntimeError as error:
        text = str(error)
        if not (isinstance(error, dist.DistError) or CONNECTION_ERROR.search(text)):
            raise
        other = _query_store(lambda store: store.get(REFUSED).decode() if store.check([REFUSED]) else "")
        if other:
            raise BadInput(f"rank {os.environ['RANK']}: stopped because rank {other} refused its input") from None
        reason = " ".join(text.split())[:120]
        raise LostContact(
            f"rank {os.environ.get('RANK')}: lost the other ranks ({reason}); run the same command again with "
            "--resume, or use torchrun --max-restarts"
        ) from None


def _query_store(query: Callable[[dist.Store], Any]) -> Any:
    """Return the query's result, or None if the store is gone or does not respond within STORE_TIMEOUT_S."""
    results = []

    def work(store: dist.Store) -> None:
        with suppress(RuntimeError):
            results.append(query(store))

    if _store is not None:
        thread = threading.Thread(target=work, args=(_store,), daemon=True)
        thread.start()
        thread.join(STORE_TIMEOUT_S)
    return results[0] if results else None


class Vote:
    """The maximum of a number over the ranks. All ranks get it at the same step, without waiting for each other.

    Numbers passed at one step are exchanged on the CPU during the next step and returned by the next call. With a
    single rank the number is returned at once.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.pending: Any = None
        if world.size > 1:
            with interruptible():
                self.group = dist.new_group(backend="gloo", timeout=world.timeout)

    def __call__(self, number: int) -> int:
        if self.world.size == 1:
            return number
        agreed = self.finish()
        self.numbers = torch.tensor(number)
        self.pending = dist.all_reduce(self.numbers, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed

    def finish(self) -> int:
        """Wait for the exchange in progress and return its result; 0 if there is none."""
        if self.pending is None:
            return 0
        self.pending.wait()
        self.pending = None
        return int(self.numbers)


def check_same(world: World, digest: str, name: str) -> None:
    """Raises BadInput on every rank if the hexadecimal digest of `name` on any rank differs from rank 0's."""
    number = int(digest[:15] or "0", 16)
    different = int(world.sum(torch.tensor(int(world.broadcast(number) != number))))
    if different:
        raise BadInput(
            f"{name}: expected the same content on all nodes, got other content than rank 0's on {different} of "
            f"{world.size} ranks; copy rank 0's to all nodes"
        )


def check_shared(world: World, exists: bool, name: str) -> None:
    """Raises BadInput on a rank where `name`, which exists on rank 0, does not."""
    if not exists:
        raise BadInput(
            f"rank {world.rank}: expected {name} as on rank 0, found none; put --out on a file system that all nodes "
            "share"
        )
