"""CIFAR-100 is read as published, from its archive or folder, and no code in its pickles is run."""

import contextlib
import io
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from fastofa.data.open import open_dataset
from fastofa.system.errors import BadInput
from folders import assert_same, refusal

FINE = [f"class{i:02d}" for i in range(100)]


COUNT = {"train": 120, "test": 30}


class AsPython2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes text and bytes as Python 2 did: the published files contain 8-bit strings, also as the data of arrays."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_text(self, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text


def as_python2(value: Any) -> bytes:
    buffer = io.BytesIO()
    AsPython2(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def cifar_member(member: str) -> dict[str, Any]:
    """A member of a small CIFAR-100 in the published layout: unsorted rows, each a red, a green and a blue plane."""
    if member == "meta":
        return {"fine_label_names": FINE, "coarse_label_names": [f"group{i}" for i in range(20)]}
    rng = np.random.default_rng(COUNT[member])
    labels = rng.permutation(np.arange(COUNT[member]) % 100).tolist()
    return {
        "filenames": [f"thing_s_{rng.integers(10**6):06d}.png" for _ in labels],
        "batch_label": f"{member}ing batch 1 of 1",
        "fine_labels": labels,
        "coarse_labels": [label // 5 for label in labels],
        "data": rng.integers(0, 256, (COUNT[member], 3072), dtype=np.uint8),
    }


def write_cifar(top: Path, encode: Callable[[Any], bytes] = as_python2, **replaced: bytes) -> Path:
    """Write the unpacked folder below `top`; `replaced` gives members other content."""
    folder = top / "cifar-100-python"
    folder.mkdir(parents=True)
    for member in ("meta", "train", "test"):
        (folder / member).write_bytes(replaced.get(member, encode(cifar_member(member))))
    return folder


def pack(folder: Path) -> None:
    """Replace the folder by the archive."""
    with tarfile.open(folder.parent / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    shutil.rmtree(folder)


def test_the_pickles_are_those_of_python_2() -> None:
    """Python 3 reads what the helper writes as bytes or, on request, as latin-1."""
    data = as_python2({"data": np.arange(3, dtype=np.uint8)})
    assert pickle.loads(data, encoding="bytes")[b"data"].tolist() == [0, 1, 2]
    assert pickle.loads(data, encoding="latin1")["data"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("layout", ["archive", "folder", "inside", "both"])
@pytest.mark.parametrize("encode", [as_python2, pickle.dumps], ids=["python2", "python3"])
@pytest.mark.parametrize(("split", "member"), [("train", "train"), ("val", "test")])
def test_cifar100(tmp_path: Path, layout: str, encode: Callable[[Any], bytes], split: Any, member: str) -> None:
    """From the archive, the folder beside it, or the folder itself: pixels, labels, names, by class, then name."""
    top = tmp_path / "cifar"
    folder = write_cifar(top, encode)
    if layout == "archive":
        pack(folder)
    if layout == "both":
        (top / "cifar-100-python.tar.gz").write_bytes(b"a download that broke off")
    data = open_dataset(f"cifar100:{folder if layout == 'inside' else top}", split)
    source = cifar_member(member)
    order = sorted(range(len(data)), key=lambda i: (source["fine_labels"][i], source["filenames"][i]))
    assert len(data) == COUNT[member]
    assert data.classes == tuple(FINE)
    assert data.names == [source["filenames"][i] for i in order]
    assert data.labels.tolist() == [source["fine_labels"][i] for i in order]
    assert data.labels.dtype == np.int64
    assert data.pixels is not None
    assert data.pixels.dtype == np.uint8
    assert data.sizes.tolist() == [[32, 32]] * len(data)
    for row, i in enumerate(order):
        planes = source["data"][i].reshape(3, 32, 32)
        assert (data.pixels[row, 5, 9] == planes[:, 5, 9]).all()
        assert (data.pixels[row] == np.stack(planes, axis=-1)).all()


def test_cifar100_fingerprint_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    write_cifar(tmp_path / "a")
    pack(write_cifar(tmp_path / "b"))
    a, b = (open_dataset(f"cifar100:{tmp_path / name}") for name in "ab")
    assert a.fingerprint == b.fingerprint != open_dataset(f"cifar100:{tmp_path / 'a'}", "val").fingerprint


class Command:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("member", ["train", "meta"])
@pytest.mark.parametrize("kind", ["system", "eval", "exec", "inside", "protocol0", "getattr", "numpy"])
def test_malicious_cifar100_is_refused_and_not_run(tmp_path: Path, kind: str, member: str) -> None:
    witness = tmp_path / "ran"
    system = Command(os.system, f"touch '{witness}'")
    code = f"open({str(witness)!r}, 'w').close()"
    content = {
        "system": lambda: pickle.dumps(system),
        "eval": lambda: pickle.dumps(Command(eval, code)),
        "exec": lambda: pickle.dumps(Command(exec, code)),
        "inside": lambda: pickle.dumps({**cifar_member(member), "batch_label": system}),
        "protocol0": lambda: b"cposix\nsystem\n(S'touch " + str(witness).encode() + b"'\ntR.",
        "getattr": lambda: pickle.dumps(Command(getattr, "text", "upper")),
        "numpy": lambda: pickle.dumps(Command(np.fromfile, str(witness))),
    }[kind]()
    top = tmp_path / "cifar"
    write_cifar(top, **{member: content})
    text = refusal(f"cifar100:{top}")
    assert member in text
    assert "refers to" in text
    assert not witness.exists()


def test_code_in_object_arrays_is_not_run(tmp_path: Path) -> None:
    """numpy rebuilds an array of objects with the same restricted unpickler."""
    witness = tmp_path / "ran"
    array = np.array([Command(os.system, f"touch '{witness}'")], dtype=object)
    write_cifar(tmp_path / "cifar", train=pickle.dumps({**cifar_member("train"), "data": array}))
    refusal(f"cifar100:{tmp_path / 'cifar'}")
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"text\n", b"\x80\x02}", as_python2(cifar_member("train"))[:-1000]])
def test_damaged_cifar100_member(tmp_path: Path, content: bytes) -> None:
    write_cifar(tmp_path, train=content)
    assert "expected train as published" in refusal(f"cifar100:{tmp_path}")


@pytest.mark.parametrize(
    "change",
    [
        {"fine_labels": None},
        {"fine_labels": [0] * 119},
        {"fine_labels": [100] * 120},
        {"fine_labels": [-1] * 120},
        {"filenames": ["one.png"]},
        {"data": np.zeros((119, 3072), np.uint8)},
        {"data": np.zeros((120, 3071), np.uint8)},
        {"data": np.zeros((0, 3072), np.uint8), "fine_labels": [], "filenames": []},
    ],
)
def test_inconsistent_cifar100(tmp_path: Path, change: dict[str, Any]) -> None:
    member = {name: value for name, value in {**cifar_member("train"), **change}.items() if value is not None}
    write_cifar(tmp_path, train=as_python2(member))
    assert str(tmp_path) in refusal(f"cifar100:{tmp_path}")


def test_changed_byte_in_the_cifar100_archive(tmp_path: Path) -> None:
    """Every change is refused, also in pixels, where any value is valid.

    One exception is possible: the bits that pad the last byte of the compressed data mean nothing.
    """
    pack(write_cifar(tmp_path))
    first = open_dataset(f"cifar100:{tmp_path}")
    archive = tmp_path / "cifar-100-python.tar.gz"
    whole, same = archive.read_bytes(), 0
    for position in np.random.default_rng(0).integers(64, len(whole), 60):
        archive.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        with contextlib.suppress(BadInput):
            assert_same(open_dataset(f"cifar100:{tmp_path}"), first)
            same += 1
    assert same <= 1


def test_cifar10_is_not_cifar100(tmp_path: Path) -> None:
    member = cifar_member("train")
    member["labels"] = member.pop("fine_labels")
    write_cifar(tmp_path, train=as_python2(member))
    assert "fine_labels" in refusal(f"cifar100:{tmp_path}")


def test_missing_cifar100(tmp_path: Path) -> None:
    """No folder, an empty one, a member missing from the folder or the archive, or another file as the archive."""
    assert "cifar-100-python.tar.gz" in refusal(f"cifar100:{tmp_path / 'none'}")
    assert "cifar-100-python.tar.gz" in refusal(f"cifar100:{tmp_path}")
    folder = write_cifar(tmp_path / "a")
    (folder / "test").unlink()
    assert "test" in refusal(f"cifar100:{tmp_path / 'a'}", "val")
    assert len(open_dataset(f"cifar100:{tmp_path / 'a'}")) == COUNT["train"]
    pack(folder)
    assert "test" in refusal(f"cifar100:{tmp_path / 'a'}", "val")
    archive = tmp_path / "a" / "cifar-100-python.tar.gz"
    whole = archive.read_bytes()
    header = whole[: whole.index(b"\0", 10) + 1]
    for content in (b"not an archive", whole[:-2000], whole[:2000], header + b"\xff" * 500, b""):
        archive.write_bytes(content)
        assert "cifar-100-python.tar.gz" in refusal(f"cifar100:{tmp_path / 'a'}")
