"""The compiled teacher: its answers are the eager one's, for any batch; what is fetched later is in order and whole."""

import signal
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

import fastofa.teacher.cache_job
from fastofa.data.open import open_dataset
from fastofa.methods.targets import Targets
from fastofa.runs import recipes
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors
from fastofa.system.interrupt import Stopped
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_columns import as_stored, best_classes
from fastofa.teacher.cache_files import view_file
from fastofa.teacher.compiled_teacher import TopKProgram
from fastofa.teacher.downloads import Downloads
from fastofa.teacher.model import Teacher, open_teacher
from fastofa.teacher.parts import part_file
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.loop import train

SIZE, BATCH, K = 32, 8, 4
TEN = tuple("0123456789")
CPU = torch.device("cpu")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small ViT whose random weights are large enough for answers that differ; it compiles in seconds."""
    torch.manual_seed(1)
    model = timm.create_model("test_vit", num_classes=10, img_size=SIZE)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    nn.init.normal_(model.head.weight)
    folder = tmp_path_factory.mktemp("vit")
    save_for_hf(model, str(folder), safe_serialization=True, data_config={"input_size": (3, SIZE, SIZE)})
    return str(folder)


@pytest.fixture(scope="module")
def opened(vit: str) -> Teacher:
    return open_teacher(vit, TEN)


def pixels(count: int) -> Tensor:
    images = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last)


def log_prob_of_each(targets: Targets, classes: int = 10) -> Tensor:
    """fp32 [B, C]: the log-probability of each class that is among the K, and else 0."""
    return torch.zeros(len(targets.classes), classes).scatter(1, targets.classes.long(), targets.log_probs.float())


# --- The program ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("features", ["none", "pooled"])
def test_compiled_answers_are_the_eager_ones_for_every_batch_size(opened: Teacher, features: str) -> None:
    """The last batch of a table is smaller: nothing is compiled again, and padding does not show."""
    compiled, eager = (TopKProgram(opened, K, BATCH, compile_, features) for compile_ in (True, False))
    images = pixels(BATCH)
    whole, expected = compiled(images), eager(images)
    assert whole.keys() == expected.keys()
    for name, values in whole.items():
        assert (values.dtype, values.shape) == (expected[name].dtype, expected[name].shape)
    of_each = (log_prob_of_each(Targets(c["classes"], c["log_probs"])) for c in (whole, expected))
    torch.testing.assert_close(*of_each, rtol=2e-3, atol=2e-3)
    if features == "pooled":
        torch.testing.assert_close(whole["pooled"], expected["pooled"], rtol=2e-3, atol=2e-3)
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (BATCH, BATCH - 1, 1):
            for name, values in compiled(images[:count]).items():
                assert torch.equal(values, whole[name][:count])


def test_a_compiler_that_fails_is_one_notice(opened: Teacher, monkeypatch, tmp_path, capsys) -> None:
    """The program then runs uncompiled, to the bit as if it had never been compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    images = pixels(3)
    program = TopKProgram(opened, K, BATCH, compile_=True)
    capsys.readouterr()
    for _ in range(2):
        expected = best_classes(opened.log_probs(images), K)
        for name, values in program(images).items():
            assert torch.equal(values, getattr(expected, name))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # that it compiles, and that it could not
    assert "no such instruction" in lines[1]


def far_classes(device: str, classes: int, compiled: bool) -> Targets:
    """The best class of two images, above 2^15 (which int16 holds as a negative number), by way of the device."""
    log_probs = torch.full((2, classes), -20.0, device=device)
    log_probs[0, classes - 1], log_probs[1, 33_000] = -0.1, -0.2
    found = (torch.compile(best_classes) if compiled else best_classes)(log_probs, 1)
    downloads = Downloads(torch.device(device))
    (arrived,) = [*downloads.add(found._asdict()), *downloads.finish()]
    return Targets(**as_stored(arrived))


@pytest.mark.parametrize("classes", [40_000, 70_000])
def test_class_numbers_survive_the_device(classes: int) -> None:
    stored = far_classes("cpu", classes, compiled=False)
    assert stored.classes.tolist() == [[classes - 1], [33_000]]
    assert stored.log_probs.dtype == torch.float32


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("classes", [40_000, 70_000])
def test_class_numbers_survive_a_gpu(classes: int, compiled: bool) -> None:
    assert far_classes("cuda", classes, compiled).classes.tolist() == [[classes - 1], [33_000]]


# --- Downloads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, 100])
def test_everything_arrives_once_and_in_order(every: int) -> None:
    """Whatever the number of batches per copy; no more than two copies are under way."""
    downloads, found = Downloads(CPU, every), []
    for number in range(10):
        arrived = downloads.add({"classes": torch.full((2, K), number), "pooled": torch.full((2,), -number)})
        found += [part["classes"] for part in arrived]
        assert all(torch.equal(part["classes"][:, 0], -part["pooled"]) for part in arrived)
        assert 2 * (number + 1) - sum(map(len, found)) <= 2 * 2 * every
    found += [part["classes"] for part in downloads.finish()]
    assert torch.cat(found)[:, 0].tolist() == [number for number in range(10) for _ in range(2)]
    assert downloads.finish() == []


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions are fetched as from a GPU: three batches at once, one copy behind."""
    monkeypatch.setattr(fastofa.teacher.cache_job, "Downloads", partial(Downloads, every=3))


def config(teacher: str, out: Path, **given) -> PrecomputeConfig:
    values = {"views": 1, "topk": K, "batch_size": 15, "scale": (0.6, 1.0), "flip": 0.0, **given}
    return PrecomputeConfig("digits:100", teacher, out, **values)


def tables(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def stopping(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """SIGTERM arrives during the batch `number`, counted from 0. Returns the sizes of the batches, as they come."""
    original, seen = TopKProgram.__call__, []

    def call(self: TopKProgram, images: Tensor) -> dict[str, Tensor]:
        if len(seen) == number:
            signal.raise_signal(signal.SIGTERM)
        seen.append(len(images))
        return original(self, images)

    monkeypatch.setattr(TopKProgram, "__call__", call)
    return seen


@pytest.mark.parametrize("features", ["none", "pooled", "pooled-int8"])
def test_a_stop_keeps_what_was_computed_though_it_was_not_fetched(vit, tmp_path, late, monkeypatch, features):
    """40 batches of validation images, then the fifth of seven of the view; no image is asked for twice."""
    reference = precompute(config(vit, tmp_path / "reference", features=features))
    seen = stopping(monkeypatch, 40 + 4)
    with pytest.raises(Stopped):
        precompute(config(vit, tmp_path / "cache", features=features))
    saved = load_tensors(tmp_path / "cache" / part_file(0, 0))[0]
    assert {len(column) for column in saved.values()} == {5 * 15}
    assert ("pooled" in saved, "pooled_scale" in saved) == (features != "none", features == "pooled-int8")
    precompute(config(vit, tmp_path / "cache", features=features))
    assert sum(seen) == 599 + 100
    assert tables(tmp_path / "cache") == tables(reference.path)


def test_an_image_without_an_answer_is_named_though_it_is_found_late(vit, tmp_path, late, monkeypatch):
    """The 50th image of the view, after the whole view was computed; what arrived before it is kept."""
    original, position = Teacher.log_probs, [0]

    def log_probs(self: Teacher, images: Tensor) -> Tensor:
        found = original(self, images).clone()
        if len(images) != 2 and len(images):  # open_teacher's trial
            spoilt = 100 + 599 + 50 - position[0]  # images held back, validation images, the view
            if 0 <= spoilt < len(images):
                found[spoilt] = torch.nan
            position[0] += len(images)
        return found

    monkeypatch.setattr(Teacher, "log_probs", log_probs)
    with pytest.raises(BadInput, match=r"in view 0 it predicts NaN for (\S+) \(1 of 45 images\)") as error:
        precompute(config(vit, tmp_path))
    assert f"NaN for {open_dataset('digits:100').names[50]} " in str(error.value)
    assert len(load_tensors(tmp_path / part_file(0, 0))[0]["classes"]) == 45
    assert not (tmp_path / view_file(0)).exists()


@pytest.mark.gpu
@NEEDS_GPU
def test_the_cpu_does_not_wait_for_a_gpu(vit):
    """For a batch or a copy; but for the copy before the last, whose event it awaits."""
    device = torch.device("cuda")
    program = TopKProgram(open_teacher(vit, TEN, device=device, bf16=True), K, BATCH, compile_=True)
    images, found = pixels(BATCH).to(device), []
    expected = program(images)
    downloads = Downloads(device, every=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for count in (BATCH, BATCH, BATCH, BATCH, 3):
            found += downloads.add(program(images[:count]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += downloads.finish()
    rows = torch.cat([part["classes"] for part in found])
    assert torch.equal(rows, torch.cat([expected["classes"]] * 4 + [expected["classes"][:3]]).cpu())


# --- Caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_cache_stopped_and_continued_is_the_same_to_the_byte(vit, tmp_path, monkeypatch):
    """And near the uncompiled one, with which it may be continued: that is no other cache."""
    straight = precompute(config(vit, tmp_path / "straight", compile="on"))
    seen = stopping(monkeypatch, 40 + 4)
    with pytest.raises(Stopped):
        precompute(config(vit, tmp_path / "cache", compile="on"))
    precompute(config(vit, tmp_path / "cache", compile="on"))
    assert sum(seen) == 599 + 100
    assert tables(tmp_path / "cache") == tables(straight.path)
    eager = precompute(config(vit, tmp_path / "eager"))
    for read in (lambda cache: Targets(*cache.targets(0)[1:]), TeacherCache.val_targets):
        # Probabilities, since a packed log-probability may fall on either side of a rounding boundary.
        a, b = (log_prob_of_each(read(cache)).exp() for cache in (straight, eager))
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    assert precompute(config(vit, tmp_path / "cache", views=2)).views == 2


def test_another_precision_is_another_cache(vit, tmp_path):
    """Also where earlier versions wrote bf16 for autocast."""
    cache = precompute(config(vit, tmp_path / "fp32"))
    before = tables(cache.path)
    with pytest.raises(BadInput, match=r"made with other arguments: teachers .*--out"):
        precompute(config(vit, cache.path, precision="bf16", views=2))
    assert tables(cache.path) == before
    cache = precompute(config(vit, tmp_path / "bf16", precision="bf16"))
    header = (cache.path / "cache.json").read_text()
    assert '"pure bf16"' in header
    (cache.path / "cache.json").write_text(header.replace('"pure bf16"', '"bf16"'))
    with pytest.raises(BadInput, match=r"made with other arguments: teachers .*--out"):
        precompute(config(vit, cache.path, precision="bf16", views=2))


@pytest.mark.gpu
@NEEDS_GPU
def test_on_a_gpu_a_bf16_cache_trains_and_agrees_with_fp32(teacher, vit, tmp_path):
    """Compiled, of a CNN and of a ViT: within bf16 of the eager fp32 cache, and not equal to it."""
    for name, folder in (("cnn", teacher), ("vit", vit)):
        fast = precompute(config(folder, tmp_path / name, device="cuda", batch_size=64))
        exact = precompute(
            config(folder, tmp_path / f"{name}-fp32", device="cuda", precision="fp32", compile="off", batch_size=64)
        )
        assert fast.header["teachers"][0]["sha256"] == exact.header["teachers"][0]["sha256"]
        for read in (lambda cache: Targets(*cache.targets(0)[1:]), TeacherCache.val_targets):
            a, b = read(fast), read(exact)
            best = a.classes[:, 0].long() == b.classes[:, 0].long()
            assert best.float().mean() > 0.9
            difference = (a.log_probs[best, 0].float() - b.log_probs[best, 0].float()).abs()
            assert 0 < difference.max() < 0.5
        run = recipes.digits(
            data="digits:100", cache=fast.path, student="test_resnet", out=tmp_path / f"run-{name}", epochs=2,
            batch_size=20, warmup_epochs=0, device="cuda",
        )  # fmt: skip
        assert 0 <= train(run).top1 <= 1
