"""A .pack or .beton at a URL is downloaded once, from a store or from a web server that stalls, fails or truncates."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch

from fastofa.cli import main
from fastofa.data.open import open_dataset
from fastofa.data.staged import local_copy
from fastofa.data.write import write
from fastofa.data.write_config import WriteConfig
from fastofa.runs.run import open_run
from fastofa.system.errors import BadInput
from fastofa.system.files import read_info
from fastofa.system.in_use import unused, use
from fastofa.system.remote import Patience
from fastofa.training.loop import train
from runs import CONTEXT, command_line, same_run
from web_server import Site, serving

QUICK = Patience(attempts=3, wait_s=0.01, timeout_s=20)  # a busy machine answers late
STALLED = Patience(attempts=4, wait_s=0.01, timeout_s=0.5)
FORMS = ("photos.pack", "photos.beton")
IMAGES = "images.npy"


@pytest.fixture(scope="module")
def written(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos as a .pack and as a .beton. Tests must not change them."""
    folder = tmp_path_factory.mktemp("written")
    for name, size in zip(FORMS, (64, None), strict=True):
        write(WriteConfig(str(photos), folder / name, size=size))
    return folder


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the copies, empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user" / "fastofa" / "datasets"


@pytest.fixture
def site(written: Path) -> Iterator[tuple[Site, str]]:
    """A server of both, which fails on requests for a pack's images, and its URL."""
    with serving(written, IMAGES) as served:
        yield served


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def pack_files(written: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(written).items() if name.startswith("photos.pack")}


def spans_asked(site: Site) -> list[str]:
    return [span for name, span in site.requests if name == IMAGES]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["http", "file", "memory"])
def test_it_is_the_dataset_itself(site, written, name, kind):
    """The same identity and images, both splits; the name is the URL."""
    url = {"http": site[1], "file": f"file://{written}", "memory": "memory://data/sets"}[kind] + f"/{name}"
    if kind == "memory":
        for file, data in files(written).items():
            fsspec.filesystem("memory").pipe_file(f"/data/sets/{file}", data)
    for split in ("train", "val"):
        there, here = open_dataset(url, split), open_dataset(str(written / name), split)
        assert (there.spec, there.fingerprint, len(there)) == (url, here.fingerprint, len(here))
        assert all(torch.equal(there.read(i), here.read(i)) for i in range(len(here)))


def test_it_is_downloaded_once(site, written, copies, capsys):
    """The notice names the folder and the bytes; later, only the index's beginning is read."""
    served, url = site
    path = local_copy(f"{url}/photos.pack", QUICK)
    count = sum(len(data) for name, data in pack_files(written).items() if name.endswith(".npy"))
    assert f"downloading {count:,} of {count:,} bytes to {path}" in capsys.readouterr().err.replace("\n", "")
    assert files(path.parent) == pack_files(written)
    assert [copy for copy in copies.iterdir() if copy.is_dir()] == [path.parent]
    served.requests = []
    assert local_copy(f"{url}/photos.pack", QUICK) == path
    assert {name for name, _ in served.requests} == {"dataset.safetensors"}


def test_two_processes_download_it_once(site, written):
    """The second waits for the first."""
    served, url = site
    with ThreadPoolExecutor(2) as pool:
        paths = {*pool.map(lambda _: local_copy(f"{url}/photos.pack", QUICK), range(2))}
    assert len(paths) == 1
    assert files(paths.pop().parent) == pack_files(written)
    assert len(spans_asked(served)) == 1


def test_a_dataset_written_again_is_downloaded_again(site, written, tmp_path):
    """The old copy stays, for a run that reads it."""
    served, url = site
    old = local_copy(f"{url}/photos.pack", QUICK)
    served.folder = tmp_path / "again"
    write(WriteConfig(str(written / "photos.beton"), served.folder / "photos.pack", size=32))
    new = local_copy(f"{url}/photos.pack", QUICK)
    assert files(new.parent) == files(served.folder)
    assert files(old.parent) == pack_files(written)


@pytest.mark.parametrize("faults", [["503"], ["429", "500"], ["stall"], ["truncate"], ["pause", "503", "truncate"]])
def test_a_server_that_fails_is_retried(site, written, faults):
    served, url = site
    served.faults = list(faults)
    path = local_copy(f"{url}/photos.pack", STALLED if {"stall", "pause"} & set(faults) else QUICK)
    assert files(path.parent) == pack_files(written)
    assert served.faults == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_later_command_continues(site, written, ranges):
    """From the first byte that is missing, if the server supports it."""
    served, url = site
    served.faults, served.ranges = ["truncate", "503", "503"], ranges
    with pytest.raises(BadInput, match=f"photos.pack/{IMAGES}: expected an answer, got none in 3 attempts") as error:
        local_copy(f"{url}/photos.pack", QUICK)
    assert "\n" not in str(error.value)
    served.requests = []
    path = local_copy(f"{url}/photos.pack", QUICK)
    assert files(path.parent) == pack_files(written)
    half = (written / "photos.pack" / IMAGES).stat().st_size // 2
    assert spans_asked(served) == [f"bytes={half}-"]


def test_a_changed_byte_is_refused(site, written, copies):
    """With the image's name. Nothing is kept of it, and a later download is complete."""
    served, url = site
    served.faults = ["damage"]
    with pytest.raises(BadInput, match=r"photos.pack: 1 damaged: val/flower/005.jpg \(its checksum") as error:
        local_copy(f"{url}/photos.pack", QUICK)
    assert str(copies) not in str(error.value)
    assert not any(copy.is_dir() for copy in copies.iterdir())
    assert files(local_copy(f"{url}/photos.pack", QUICK).parent) == pack_files(written)


@pytest.mark.parametrize("name", ["photos.val.beton", "photos.beton.safetensors", "photos.beton"])
def test_every_file_has_to_be_there(written, tmp_path, name):
    there = tmp_path / "there"
    shutil.copytree(written, there)
    (there / name).unlink()
    with pytest.raises(BadInput, match=f"file://{there}/{name}.* copy all its files there together"):
        open_dataset(f"file://{there}/photos.beton")


@pytest.mark.parametrize("change", [lambda data: data[:-100], lambda data: data + bytes(100)])
def test_a_file_of_another_size_is_refused(written, tmp_path, copies, change):
    there = tmp_path / "there"
    shutil.copytree(written, there)
    file = there / "photos.val.beton"
    file.write_bytes(change(file.read_bytes()))
    size = (written / file.name).stat().st_size
    with pytest.raises(BadInput, match=rf"photos\.val\.beton.*(expected {size:,}|it ended after)"):
        local_copy(f"file://{there}/photos.beton", QUICK)
    assert {path.suffix for path in copies.iterdir() if path.is_dir()} <= {".partial"}


def test_an_index_of_another_kind_is_refused(site, tmp_path):
    """Such as the page of a proxy."""
    served, url = site
    served.folder = tmp_path / "there"
    (served.folder / "photos.pack").mkdir(parents=True)
    (served.folder / "photos.pack" / "dataset.safetensors").write_text("<html>log in</html>")
    with pytest.raises(BadInput, match=r"dataset\.safetensors: expected an index .*, got another file"):
        local_copy(f"{url}/photos.pack", QUICK)


def test_a_disk_without_the_space_is_refused(site, copies, monkeypatch):
    """Before an image is downloaded."""
    served, url = site
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(BadInput, match=rf"bytes free in {copies}, got 1; free space or set XDG_CACHE_HOME"):
        local_copy(f"{url}/photos.pack", QUICK)
    assert spans_asked(served) == []


# --- Copies that are removed ------------------------------------------------------------------------------------------


@pytest.fixture
def urls(written, tmp_path) -> dict[str, str]:
    """The pack at four places."""
    for name in "abcd":
        shutil.copytree(written / "photos.pack", tmp_path / name / "photos.pack")
    return {name: f"file://{tmp_path / name}/photos.pack" for name in "abcd"}


def _open(home: str, url: str, test: Connection) -> None:
    """A process that uses a dataset until the test closes the connection."""
    os.environ["XDG_CACHE_HOME"] = home
    local_copy(url, QUICK)
    test.send("opened")
    with suppress(EOFError):
        test.recv()


class Opens:
    """Open datasets in other processes."""

    def __init__(self, home: Path, urls: dict[str, str]) -> None:
        self.home, self.urls = home, urls

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        """A process that uses a dataset until the block ends."""
        here, there = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_open, args=(str(self.home), self.urls[name], there))
        process.start()
        there.close()
        try:
            assert here.recv() == "opened"
            yield process
        finally:
            here.close()
            process.join()

    def __call__(self, *names: str) -> None:
        """Each is opened by a process that then ends."""
        for name in names:
            with self.using(name) as process:
                pass
            assert process.exitcode == 0

    def kept(self) -> str:
        """The names of the datasets that have a copy, complete; nothing else is left."""
        copies = self.home / "fastofa" / "datasets"
        found = ""
        for name, url in self.urls.items():
            there = Path(url.removeprefix("file://"))
            index = read_info(there / "dataset.safetensors")[1]
            key = sha256(f"{url} {index}".encode()).hexdigest()[:16]
            if (copies / key).exists():
                assert files(copies / key / there.name) == files(there)
                assert (copies / f"{key}.used").exists()
                found += name
        assert len(list(copies.iterdir())) == 2 * len(found)
        return found


@pytest.fixture
def opens(copies, urls) -> Opens:
    return Opens(copies.parent.parent, urls)


def test_two_copies_are_kept_and_the_one_used_least_recently_is_removed(opens):
    opens("a", "b")
    assert opens.kept() == "ab"
    opens("a", "c")
    assert opens.kept() == "ac"
    opens("d")
    assert opens.kept() == "cd"


def test_a_copy_in_use_is_never_removed(opens):
    """Not while one of two processes uses it, though the other was killed; afterwards it is."""
    with opens.using("a"):
        with opens.using("a") as other:
            os.kill(other.pid, signal.SIGKILL)
            other.join()
        opens("b", "c", "d")
        assert opens.kept() == "ad"
        with opens.using("b"), opens.using("c"):
            assert opens.kept() == "abc"
    opens("d")
    assert opens.kept() == "cd"


def test_an_unfinished_copy_counts_and_is_removed(opens, urls, copies):
    """A download that was interrupted an hour ago, by an earlier version, so that it has no mark."""
    opens("a")
    (copies / f"{0:016x}.partial").mkdir()
    (copies / f"{0:016x}.partial" / "photos.pack").write_bytes(bytes(9))
    (copies / f"{1:016x}.used").touch()  # a download that did not begin
    opens("b")
    assert opens.kept() == "ab"


def test_other_files_in_the_folder_are_left_alone(opens, copies):
    copies.mkdir(parents=True)
    (copies / "mine").mkdir()
    opens("a", "b", "c")
    (copies / "mine").rmdir()
    assert opens.kept() == "bc"


def test_a_removal_that_is_interrupted_leaves_no_half_copy(opens, urls, monkeypatch):
    opens("a", "b")

    def stopped(folder, **_):
        if found := [file for file in Path(folder).rglob("*") if file.is_file()]:
            found[0].unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            local_copy(urls["c"], QUICK)
    opens("a", "c")
    assert opens.kept() == "ac"


def test_a_disk_without_the_space_loses_the_copies_that_nobody_uses(opens, urls, copies, monkeypatch):
    opens("a")
    (old,) = (path for path in copies.iterdir() if path.is_dir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 if old.exists() else 10**9))
    local_copy(urls["b"], QUICK)
    assert opens.kept() == "b"


def test_who_opens_a_copy_while_it_is_removed_downloads_it_again(opens, urls, copies):
    opens("a")
    (mark,) = copies.glob("*.used")
    with ThreadPoolExecutor(1) as pool:
        with unused(mark) as free:
            assert free
            opened = pool.submit(local_copy, urls["a"], QUICK)
            shutil.rmtree(mark.with_suffix(""))
            mark.unlink()
        opened.result()
    assert opens.kept() == "a"


def test_without_flock_everything_counts_as_in_use(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    use(tmp_path / "mark")
    with unused(tmp_path / "mark") as free:
        assert not free


@pytest.mark.parametrize("url", ["memory://photos.pack", "https://host/photos.zip", "s3://bucket/train.ffcv"])
def test_other_names_are_refused(url):
    with pytest.raises(BadInput, match=rf"expected .*NAME\.pack or \.beton, got {url}"):
        open_dataset(url)


def test_a_folder_of_images_at_a_url_is_refused(tmp_path, capsys):
    """By the commands too, in one line."""
    with pytest.raises(BadInput, match=r"NAME\.pack or \.beton, got s3://bucket/photos; run `fastofa write`"):
        open_dataset("s3://bucket/photos")
    data = ["--data", "s3://bucket/photos"]
    with pytest.raises(SystemExit) as end:
        main(["precompute", *data, "--teacher", "x", "--views", "1", "--topk", "2", "--out", str(tmp_path / "cache")])
    assert end.value.code == 2
    assert "got s3://bucket/photos; run `fastofa write` where the images are" in capsys.readouterr().err


def test_a_run_from_a_url_equals_one_from_the_file(site, written, on_photos, tmp_path):
    """By the commands; also when it is resumed, and evaluated. The configuration contains the URL."""
    url = f"{site[1]}/photos.beton"
    train(on_photos("local", data=str(written / "photos.beton"), epochs=1))
    main(command_line("train", on_photos("remote", data=url, epochs=1)))
    same_run(tmp_path / "remote", tmp_path / "local")
    assert open_run(tmp_path / "remote").config.data == url
    main(["train", "--resume", str(tmp_path / "remote"), "--epochs", "2"])
    main(["evaluate", str(tmp_path / "remote"), "--data", url, "--json", str(tmp_path / "scores.json")])
    assert json.loads((tmp_path / "scores.json").read_text())["data"] == url
