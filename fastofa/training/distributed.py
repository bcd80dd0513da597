"""Several processes that train one student: which of them this is, and what they have to agree on.

    torchrun --no-python --nproc-per-node 8 fastofa train ...

torchrun starts a process per GPU, a *rank*, and says in the environment which one it is. Tensors on a GPU travel by
NCCL, those on the CPU by gloo. With one process nothing here does anything.
"""

import gc
import os
import signal
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


@dataclass(frozen=True)
class World:
    """This process among those that train together. Made by `join`; World() is one process on its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this host: which of its GPUs to use."""
    local_size: int = 1
    """Processes on this host, which share its cores."""
    timeout: timedelta = timedelta(minutes=10)
    """How long the ranks wait for one another."""

    @property
    def is_main(self) -> bool:
        """Rank 0 writes the files and shows the progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for the other ranks."""
        self.agree_on(0)

    @contextmanager
    def without_haste(self) -> Iterator[None]:
        """The body may take hours on one rank and a second on another: they wait for the last beyond `timeout`."""
        if self.size == 1:
            yield
            return
        with _meeting():
            group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        yield
        dist.barrier(group)
        dist.destroy_process_group(group)

    def agree_on(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        dist.broadcast(tensor, src=0)
        return int(tensor)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in a new tensor."""
        tensor = tensor.clone()
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Those of all ranks, in a new tensor [ranks, ...]."""
        each = [tensor.clone() for _ in range(self.size)]
        if self.size > 1:
            dist.all_gather(each, tensor)
        return torch.stack(each)

    def average_statistics(self, model: torch.nn.Module) -> None:
        """Running statistics of batch norm become the mean over the ranks, each of which saw its own images."""
        if self.size > 1:
            for statistic in statistics(model).values():
                dist.all_reduce(statistic)
                statistic /= self.size

    def leave(self) -> None:
        """Close the connections. What holds on to them (DDP does) must be gone: PyTorch can wait for ever otherwise."""
        if self.size > 1:
            gc.collect()
            dist.destroy_process_group()


def join(timeout_s: int) -> World:
    """The world that torchrun describes in the environment, connected; World() where there is no torchrun.

    Raises BadInput for an environment that is only half torchrun's.
    """
    timeout = timedelta(seconds=timeout_s)
    try:
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return World()
        local_rank, local_size = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        with _meeting():
            store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    except (KeyError, ValueError) as error:
        raise BadInput(
            f"WORLD_SIZE is set, but not all that torchrun sets with it ({error}); start by torchrun or unset it"
        ) from None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's own, which outlives the ranks: those that died left their addresses in it.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    global _store
    _store = store
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _meeting():
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, local_rank, local_size, timeout)


@contextmanager
def _meeting() -> Iterator[None]:
    """Around a wait for the others' addresses, which nobody ends if they are gone: Ctrl-C ends the process at once.

    Python's handler would run after the wait only.
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


def statistics(model: torch.nn.Module) -> dict[str, Tensor]:
    """The running statistics of its batch norms, by name."""
    kept = model.state_dict().keys()
    return {name: b for name, b in model.named_buffers() if name in kept and b.is_floating_point()}


def was_restarted() -> bool:
    """Did torchrun start this process in place of one that failed?"""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


_store: dist.Store | None = None  # that of `join`
REFUSED, STORE_S = "refused", 5


@contextmanager
def contact() -> Iterator[None]:
    """Turns the many errors of a broken connection into LostContact.

    Or into BadInput, where that is why another rank left: to start again would be of no use.
    """
    try:
        yield
    except BadInput:
        _in_store(lambda store: store.set(REFUSED, os.environ["RANK"]))
        raise
    except RuntimeError as error:
        text = str(error)
        if not (isinstance(error, dist.DistError) or any(name in text for name in ("gloo", "Gloo", "NCCL"))):
            raise
        other = _in_store(lambda store: store.get(REFUSED).decode() if store.check([REFUSED]) else "")
        if other:
            raise BadInput(f"rank {os.environ['RANK']}: stops, as rank {other} refused its input") from None
        reason = " ".join(text.split())[:120]
        raise LostContact(
            f"rank {os.environ.get('RANK')}: lost the other ranks ({reason}); start the same command again with "
            "--resume, or let torchrun do so by --max-restarts"
        ) from None


def _in_store(ask: Callable[[dist.Store], Any]) -> Any:
    """Its answer; None where the store is gone, or its host does not answer within seconds."""
    answers = []

    def work(store: dist.Store) -> None:
        with suppress(RuntimeError):
            answers.append(ask(store))

    if _store is not None:
        thread = threading.Thread(target=work, args=(_store,), daemon=True)
        thread.start()
        thread.join(STORE_S)
    return answers[0] if answers else None


class Vote:
    """The largest number that any rank gave, known to all ranks at the same step, without making them wait.

    What is given at one step is exchanged during the next one, on the CPU; with one rank it holds at once.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.pending: Any = None
        if world.size > 1:
            with _meeting():
                self.group = dist.new_group(backend="gloo", timeout=world.timeout)

    def __call__(self, number: int) -> int:
        if self.world.size == 1:
            return number
        agreed = self.finish()
        self.numbers = torch.tensor(number)
        self.pending = dist.all_reduce(self.numbers, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed

    def finish(self) -> int:
        """The last exchange's result; nothing is on its way then."""
        if self.pending is None:
            return 0
        self.pending.wait()
        self.pending = None
        return int(self.numbers)


def check_same(world: World, digest: str, place: str) -> None:
    """Raises BadInput on every rank if one has not at this place what rank 0 has, by its hexadecimal digest."""
    number = int(digest[:15] or "0", 16)
    differ = int(world.sum(torch.tensor(int(world.agree_on(number) != number))))
    if differ:
        raise BadInput(
            f"{place}: expected the same on all nodes, {differ} of {world.size} ranks have another than rank 0; "
            "copy it to all nodes"
        )


def check_shared(world: World, found: bool, place: str) -> None:
    """Raises BadInput on a rank that does not find what rank 0 wrote."""
    if not found:
        raise BadInput(
            f"rank {world.rank}: expected {place}, which rank 0 just wrote; --out must be on a file system that all "
            "nodes share"
        )
