"""Caches pushed to a store, or pulled from one or from a web server that stalls, fails, truncates or changes bytes."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from fastofa.cli import main
from fastofa.runs.run import open_run
from fastofa.system.errors import BadInput
from fastofa.system.files import filling, load_tensors, save_tensors
from fastofa.system.remote import Patience
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_files import VAL, view_file
from fastofa.teacher.cache_header import HEADER
from fastofa.teacher.fidelity import FIDELITY
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.push_pull import pull, push
from fastofa.teacher.reference_images import SEEN
from fastofa.teacher.staged_cache import open_cache
from fastofa.training.loop import train
from runs import command_line, make_cache, same_run
from web_server import Site, serving

QUICK = Patience(attempts=3, wait_s=0.01, timeout_s=20)  # a busy machine answers late
STALLED = Patience(attempts=4, wait_s=0.01, timeout_s=0.5)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture(scope="module")
def long(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five views. Tests must not change it."""
    folder = tmp_path_factory.mktemp("long")
    cache = make_cache(str(photos), 2, folder, topk=2)
    return precompute(PrecomputeConfig(str(photos), str(folder / "teacher"), cache.path, 5, 2, workers=0)).path


@pytest.fixture
def cache(photo_cache: TeacherCache) -> Path:
    """Two views. Tests must not change it."""
    return photo_cache.path


class Flaky(MemoryFileSystem):
    """A store in memory that fails: `faults` contains the number of failures left of each operation."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[dict[str, int]] = {}
    written: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def _fail(self, operation: str) -> None:
        if self.faults.get(operation, 0) > 0:
            self.faults[operation] -= 1
            raise TimeoutError(f"the store did not answer ({operation})")

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            self._fail("open")
        return super().open(path, mode, **options)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        if self.faults.get("half", 0) > 0:
            self.faults["half"] -= 1
            self.pipe_file(rpath, Path(lpath).read_bytes()[:100])
            return
        self._fail("put_file")
        super().put_file(lpath, rpath, **options)
        self.written.append(rpath)

    def size(self, path: str) -> int:
        self._fail("size")
        return super().size(path)


@pytest.fixture
def store() -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    for kept in (Flaky.store, Flaky.faults, Flaky.written):
        kept.clear()
    yield Flaky
    Flaky.store.clear()


def at(store: type[Flaky], name: str) -> bytes:
    return store().cat_file(f"/bucket/cache/{name}")


URL = "flaky://bucket/cache"


# --- A store ----------------------------------------------------------------------------------------------------------


def test_a_cache_pushed_and_pulled_is_the_same(cache, tmp_path, capsys):
    """By the commands, through memory://; every file, byte for byte."""
    url = "memory://test/pushed"
    main(["cache", "push", str(cache), url])
    main(["cache", "pull", url, str(tmp_path / "pulled")])
    assert f"{url}: 2 views and the validation predictions of {cache}" in capsys.readouterr().out
    assert files(tmp_path / "pulled") == files(cache)
    TeacherCache.open(tmp_path / "pulled").verify()


def test_a_folder_on_this_machine_is_a_url_too(cache, tmp_path):
    push(cache, f"file://{tmp_path}/there")
    assert files(tmp_path / "there") == files(cache)
    assert files(pull(f"file://{tmp_path}/there", tmp_path / "here").path) == files(cache)


def test_only_what_is_missing_is_pushed(cache, store):
    push(cache, URL, QUICK)
    assert len(store.written) == len(files(cache))
    push(cache, URL, QUICK)
    assert len(store.written) == len(files(cache))
    store().rm_file(f"/bucket/cache/{view_file(1)}")
    push(cache, URL, QUICK)
    assert len(store.written) == len(files(cache)) + 1
    assert {name: at(store, name) for name in files(cache)} == files(cache)


def test_failures_of_a_store_are_retried(cache, store, tmp_path, capsys):
    """Of each operation, and uploads of which only a part arrives; nothing but the files remains there."""
    store.faults.update(put_file=1, size=2, half=1)
    push(cache, URL, QUICK)
    assert sorted(Path(name).name for name in store().find("/bucket/cache")) == sorted(files(cache))
    store.faults.update(open=1, size=1)
    assert files(pull(URL, tmp_path / "pulled", QUICK).path) == files(cache)
    assert "the store did not answer (open); trying again in 0.02 s" in capsys.readouterr().err.replace("\n", " ")


def test_parts_are_joined_at_a_url(long, store, tmp_path):
    """In any order, by two who computed them; what is pulled is the whole cache."""
    header = json.loads((long / HEADER).read_text())
    for name, views, kept in (("b", {"views": 5, "first_view": 3}, (3, 4)), ("a", {"views": 3}, (0, 1, 2))):
        part = Path(shutil.copytree(long, tmp_path / name))
        (part / HEADER).write_text(json.dumps({**header, **views}))
        for view in set(range(5)) - set(kept):
            (part / view_file(view)).unlink()
        push(part, URL, QUICK)
    pulled = pull(URL, tmp_path / "pulled", QUICK)
    pulled.verify()
    assert (pulled.first, pulled.views) == (0, 5)
    tables = {name: data for name, data in files(long).items() if name != HEADER}
    assert {name: data for name, data in files(pulled.path).items() if name != HEADER} == tables


@pytest.mark.parametrize("operation", ["put_file", "size", "half"])
def test_a_store_that_keeps_failing_is_one_line(cache, store, operation):
    """And a later push continues."""
    store.faults[operation] = 100
    with pytest.raises(BadInput, match=r"flaky://bucket/cache/.*: expected an answer, got none in 3 attempts") as error:
        push(cache, URL, QUICK)
    assert "\n" not in str(error.value)
    assert store().find("/bucket") == []
    store.faults.clear()
    push(cache, URL, QUICK)
    assert {name: at(store, name) for name in files(cache)} == files(cache)


def test_a_truncated_file_there_is_replaced(cache, store):
    push(cache, URL, QUICK)
    store().pipe_file(f"/bucket/cache/{view_file(0)}", at(store, view_file(0))[:-7])
    push(cache, URL, QUICK)
    assert at(store, view_file(0)) == (cache / view_file(0)).read_bytes()


def test_another_cache_is_refused_in_both_directions(cache, store, tmp_path):
    """With the fields that differ; neither side changes."""
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    header = json.loads((other / HEADER).read_text())
    (other / HEADER).write_text(json.dumps({**header, "seed": 7}))
    for file in (view_file(0), view_file(1), VAL):
        tensors, info = load_tensors(other / file)
        save_tensors(other / file, tensors, {**info, "cache": {**info["cache"], "seed": 7}})
    push(cache, URL, QUICK)
    there, here = dict(store.store), files(other)
    for action in (lambda: push(other, URL, QUICK), lambda: pull(URL, other, QUICK)):
        with pytest.raises(BadInput, match=r"they differ in seed \(there: \d, here: \d\)"):
            action()
    assert store.store == there
    assert files(other) == here


def test_other_predictions_there_are_refused(cache, store, tmp_path):
    """Of the same view of the same cache."""
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    tensors, info = load_tensors(other / view_file(1))
    save_tensors(other / view_file(1), {**tensors, "log_probs": tensors["log_probs"] - 0.01}, info)
    push(cache, URL, QUICK)
    with pytest.raises(BadInput, match=rf"{URL}/{view_file(1)}: expected the predictions of .*, got others"):
        push(other, URL, QUICK)


def test_other_validation_predictions_there_are_kept(cache, store, tmp_path, capsys):
    """As when parts are joined: another machine may round differently."""
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    tensors, info = load_tensors(other / VAL)
    save_tensors(other / VAL, {**tensors, "log_probs": tensors["log_probs"].flip(0)}, info)
    push(cache, URL, QUICK)
    push(other, URL, QUICK)
    assert at(store, VAL) == (cache / VAL).read_bytes()
    assert f"{URL}/{VAL}: differs from {other / VAL}, and is kept" in capsys.readouterr().err


def test_a_damaged_cache_is_not_pushed(cache, store, tmp_path):
    """Nothing of it: the header comes last."""
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    data = (other / view_file(1)).read_bytes()
    (other / view_file(1)).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BadInput, match=f"{view_file(1)}: its checksum does not match"):
        push(other, URL, QUICK)
    with pytest.raises(BadInput, match="expected a teacher cache, but found no"):
        pull(URL, tmp_path / "pulled", QUICK)
    assert not (tmp_path / "pulled").exists()


def test_a_scheme_without_adapter(cache, tmp_path):
    for action in (lambda: push(cache, "nosuch://x/y"), lambda: pull("nosuch://x/y", tmp_path / "x")):
        with pytest.raises(BadInput, match="nosuch://x/y: expected a URL that fsspec opens"):
            action()
    with pytest.raises(BadInput, match="got a web server, which can only be pulled from"):
        push(cache, "https://localhost/cache")
    assert list(tmp_path.iterdir()) == []


# --- A web server -----------------------------------------------------------------------------------------------------


@pytest.fixture
def site(cache: Path) -> Iterator[tuple[Site, str]]:
    """A server of the cache on this machine, which fails on requests for views, and its URL."""
    with serving(cache, "view") as served:
        yield served


@pytest.mark.parametrize(
    "faults",
    [[], ["503"], ["429", "500"], ["stall"], ["truncate"], ["pause"], ["damage"], ["truncate", "503", "pause"]],
)
def test_a_server_that_fails_is_retried(site, cache, tmp_path, faults):
    """Unavailable, overloaded, stalled before or within a file, cut off, with a changed byte: the same bytes arrive."""
    served, url = site
    served.faults = list(faults)
    patience = STALLED if {"stall", "pause"} & set(faults) else QUICK
    assert files(pull(url, tmp_path / "pulled", patience).path) == files(cache)
    assert served.faults == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_continues_where_it_stopped(site, cache, tmp_path, ranges):
    """From the first byte that is missing, if the server supports it."""
    served, url = site
    served.faults, served.ranges = ["truncate"], ranges
    assert files(pull(url, tmp_path / "pulled", QUICK).path) == files(cache)
    half = (cache / view_file(0)).stat().st_size // 2
    assert [span for name, span in served.requests if name == view_file(0)] == ["", f"bytes={half}-"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", "expected an answer, got none in 3 attempts .*503"),
        ("stall", "expected an answer, got none in 4 attempts .*timed out"),
        ("403", "expected access, got: HTTP 403 Forbidden; check the URL"),
        ("damage", "its checksum does not match"),
    ],
)
def test_a_server_that_keeps_failing_is_one_line(site, cache, tmp_path, fault, message):
    """What has arrived is kept, nothing half is left, and a later pull continues."""
    served, url = site
    served.faults = ["", *[fault] * 20]
    with pytest.raises(BadInput, match=f"{url}/{view_file(1)}: {message}") as error:
        pull(url, tmp_path / "pulled", STALLED if fault == "stall" else QUICK)
    assert "\n" not in str(error.value)
    assert set(files(tmp_path / "pulled")) == {HEADER, VAL, SEEN, FIDELITY, view_file(0)}
    served.faults, served.requests = [], []
    assert files(pull(url, tmp_path / "pulled", QUICK).path) == files(cache)
    assert [name for name, _ in served.requests] == [HEADER, view_file(1)]


def test_no_server_and_no_cache_there(site, tmp_path):
    served, url = site
    served.folder = tmp_path
    with pytest.raises(BadInput, match="expected a teacher cache, but found no"):
        pull(url, tmp_path / "pulled", QUICK)
    (tmp_path / HEADER).write_text("<html>log in</html>")
    with pytest.raises(BadInput, match=f"{url}/{HEADER}: expected JSON"):
        pull(url, tmp_path / "pulled", QUICK)
    with pytest.raises(BadInput, match=r"http://127.0.0.1:1/x/cache.json: expected an answer, got none .*refused"):
        pull("http://127.0.0.1:1/x", tmp_path / "pulled", QUICK)
    assert not (tmp_path / "pulled").exists()


def test_two_pulls_into_one_folder_are_refused(site, tmp_path):
    with filling(tmp_path / "pulled"), pytest.raises(BadInput, match="is writing there"):
        pull(site[1], tmp_path / "pulled", QUICK)


def test_more_views_there_are_added(site, cache, tmp_path):
    """Only those that are missing are downloaded."""
    served, url = site
    served.folder = Path(shutil.copytree(cache, tmp_path / "served"))
    kept = (served.folder / view_file(1)).rename(tmp_path / "later")
    assert pull(url, tmp_path / "pulled", QUICK).views == 1
    kept.rename(served.folder / view_file(1))
    served.requests = []
    assert files(pull(url, tmp_path / "pulled", QUICK).path) == files(cache)
    assert [name for name, _ in served.requests] == [HEADER, view_file(1)]


# --- Training from a URL ----------------------------------------------------------------------------------------------


def until(condition: Callable[[], bool]) -> None:
    """Wait for a thread."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def views_at(path: Path) -> set[str]:
    return {file.name for file in path.glob("view-*")}


def test_views_are_here_before_they_are_used(long, store):
    """The next one arrives while one is in use; others are removed. Each equals the local one."""
    push(long, URL, QUICK)
    cache, local = open_cache(URL, QUICK), TeacherCache.open(long)
    assert cache.views == 5
    assert cache.digests(5) == local.digests(5)
    assert views_at(cache.path) == set()
    for view in (0, 1, 2, 3, 4, 0):
        table, expected = cache.table(view), local.table(view)
        assert torch.equal(table.targets.log_probs, expected.targets.log_probs)
        assert (table.views.crop == expected.views.crop).all()
        following = (view + 1) % 5
        until(lambda following=following: (cache.path / view_file(following)).exists())
        assert views_at(cache.path) == {view_file(view), view_file(following)}
    store.faults["open"] = 10**6  # the next view, which is here, needs no network
    cache.table(1)


def test_a_view_that_could_not_be_fetched_ahead_is_fetched_when_used(long, store):
    push(long, URL, QUICK)
    cache = open_cache(URL, QUICK)
    cache.table(0)
    until(lambda: (cache.path / view_file(1)).exists())
    store.faults["open"] = 10**6
    cache.table(1)
    with pytest.raises(BadInput, match=f"{URL}/{view_file(2)}: expected an answer, got none"):
        cache.table(2)
    store.faults.clear()
    assert torch.equal(cache.table(2).targets.classes, TeacherCache.open(long).table(2).targets.classes)


def test_the_folder_with_the_views_is_removed(long, store):
    push(long, URL, QUICK)
    cache = open_cache(URL, QUICK)
    cache.table(0)
    path = cache.path
    until(lambda: (path / view_file(1)).exists())
    del cache
    until(lambda: not path.exists())


def test_a_truncated_view_at_the_url_is_refused(long, store):
    """At the start of a run, if its beginning is missing; when it is used otherwise."""
    push(long, URL, QUICK)
    data = at(store, view_file(1))
    store().pipe_file(f"/bucket/cache/{view_file(1)}", data[:50])
    with pytest.raises(BadInput, match=f"{URL}/{view_file(1)}: expected a view, got another file or part of one"):
        open_cache(URL, QUICK)
    store().pipe_file(f"/bucket/cache/{view_file(1)}", data[:-50])
    cache = open_cache(URL, QUICK)
    with pytest.raises(BadInput, match=f"{URL}/{view_file(1)}: .*truncated or damaged"):
        cache.table(1)


def test_a_run_fetches_no_file_twice(long, on_photos):
    """The beginning of each view takes two requests: for the length of its header, and for the header."""
    with serving(long, "view") as (site, url):
        train(on_photos(cache=url, epochs=2))
        counts = Counter(name for name, _ in site.requests)
    assert [counts[name] for name in (HEADER, VAL, SEEN, FIDELITY)] == [1, 1, 1, 1]
    assert [counts[view_file(view)] for view in (0, 1, 3, 4)] == [3, 3, 2, 2]  # view 2 may be on its way at the end


def test_a_student_trained_from_a_url_equals_one_trained_from_the_folder(long, on_photos, tmp_path):
    """By the command; also when it is resumed, and evaluated."""
    push(long, "memory://runs/cache")
    train(on_photos("local", cache=str(long), epochs=1))
    argv = command_line("train", on_photos("remote", cache="memory://runs/cache", epochs=1))
    main(argv)
    same_run(tmp_path / "remote", tmp_path / "local")
    run = open_run(tmp_path / "remote")
    assert run.cache == "memory://runs/cache"
    main(["train", "--resume", str(tmp_path / "remote"), "--epochs", "2"])
    main(["evaluate", str(tmp_path / "remote"), "--json", str(tmp_path / "scores.json")])
    assert json.loads((tmp_path / "scores.json").read_text())["agreement"] is not None
