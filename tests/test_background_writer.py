"""The background writer: in order, errors on the main thread, nothing lost at the end."""

import threading
import time

import pytest
import torch
from torch import nn

from fastofa.runs.checkpoint import checkpoints, save_best, save_checkpoint
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors
from fastofa.training.background_writer import Writer


def test_jobs_run_in_order_in_one_other_thread():
    done: list[tuple[int, int]] = []
    with Writer() as writer:
        for number in range(50):
            writer(lambda number=number: done.append((number, threading.get_ident())))
    assert [number for number, _ in done] == list(range(50))
    assert len({thread for _, thread in done} - {threading.get_ident()}) == 1


def test_calls_return_at_once_and_the_end_waits():
    release, done = threading.Event(), []
    with Writer() as writer:
        writer(lambda: (release.wait(60), done.append(1)))
        assert not done
        release.set()
    assert done == [1]


def test_wait_waits_for_all_jobs():
    done: list[int] = []
    with Writer() as writer:
        writer(lambda: (time.sleep(0.05), done.append(1)))
        writer(lambda: done.append(2))
        writer.wait()
        assert done == [1, 2]


@pytest.mark.parametrize("where", ["call", "check", "wait", "end"])
def test_an_error_is_raised_in_the_main_thread_and_later_jobs_do_not_run(where):
    """So nothing is logged or saved after what could not be saved."""
    done: list[int] = []

    def fail() -> None:
        raise BadInput("disk full")

    def run() -> None:
        with Writer() as writer:
            writer(fail)
            if where == "wait":
                writer.wait()
            while where in ("call", "check"):
                _ = writer.check() if where == "check" else writer(lambda: done.append(1))
                time.sleep(0.001)

    with pytest.raises(BadInput, match=r"^disk full$"):
        run()
    assert not done


@pytest.mark.parametrize(("error", "waits"), [(ValueError, True), (BadInput, True), (KeyboardInterrupt, False)])
def test_after_an_error_of_the_body_jobs_finish_but_not_after_ctrl_c(error, waits):
    done: list[int] = []
    release = threading.Event()

    def run() -> None:
        with Writer() as writer:
            writer(lambda: (release.wait(0.2 if waits else 60), done.append(1)))
            raise error("body")

    with pytest.raises(error, match="body"):
        run()
    assert done == ([1] if waits else [])
    release.set()


def test_a_checkpoint_holds_the_state_of_its_step(tmp_path):
    """Although the weights, on the same device, change before it is written; until then there is no file."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = model.weight.detach().clone()
    momentum = optimizer.state[model.weight]["momentum_buffer"].clone()
    writes = []
    save_checkpoint(tmp_path, 1, model, optimizer, None, {}, 1, when=writes.append)
    save_best(tmp_path, model, {"step": 1, "top1": 0.5}, when=writes.append)
    optimizer.step()
    assert checkpoints(tmp_path) == []
    for write in writes:
        write()
    tensors, _ = load_tensors(checkpoints(tmp_path)[0])
    assert torch.equal(tensors["student.weight"], before)
    assert torch.equal(tensors["optimizer.weight.momentum_buffer"], momentum)
    assert torch.equal(load_tensors(tmp_path / "checkpoints" / "best.safetensors")[0]["student.weight"], before)
    assert not torch.equal(model.weight, before)
