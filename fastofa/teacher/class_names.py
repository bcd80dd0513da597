"""Match a teacher's outputs with the classes of the data by name, not only by position.

timm numbers class folders in natural order, ignoring case (c1, c2, c10); torchvision and fastofa number them in the
order of code points (c1, c10, c2). A teacher may also have more classes than the data, such as all thousand of ImageNet
for data with ten of them.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from timm.data import ImageNetInfo
from timm.data.imagenet_info import infer_imagenet_subset
from timm.utils.misc import natural_key

from fastofa.system.errors import BadInput, counted, listed
from fastofa.system.progress import notice

SYNSET = re.compile(r"n\d{8}")  # the name of an ImageNet class


@dataclass(frozen=True)
class OutputNames:
    """What is known about a teacher's outputs."""

    count: int
    """Number of outputs."""
    names: dict[int, str] = field(default_factory=dict)
    """Class name by output index, from its config.json."""
    descriptions: dict[str, str] = field(default_factory=dict)
    """Description by class name, such as "tench, Tinca tinca"."""


def match_classes(teacher: str, outputs: OutputNames, classes: Sequence[str]) -> list[int]:
    """The index of the teacher's output for each class of the data, in the data's order.

    Raises:
        BadInput: the names do not match; or the outputs have no names and the numbers of classes differ.
    """
    subset = None if outputs.names else infer_imagenet_subset({"num_classes": outputs.count})
    if subset is not None:
        outputs = OutputNames(outputs.count, dict(enumerate(ImageNetInfo(subset).label_names())))
    if not outputs.descriptions and any(map(SYNSET.fullmatch, outputs.names.values())):
        outputs = OutputNames(outputs.count, outputs.names, _lemmas(outputs.names.values()))
    named = list(outputs.names.items())
    words = [(output, word) for output, name in named for word in _words(outputs.descriptions.get(name, ""))]
    failures: list[tuple[int, str]] = []
    for how, normalize, known in (
        ("by name", str, named),
        ("by name, ignoring case, spaces, - and _", _loose, named),
        ("by description", _loose, words),
    ):
        columns, failure = _match(known, classes, normalize)
        if columns is not None:
            _report_match(teacher, outputs, subset, columns, classes, how)
            return columns
        failures.append(failure)
    same_count = outputs.count == len(classes)
    if same_count and (subset is not None or not outputs.names):
        _report_assumed_order(teacher, classes)
        return list(range(len(classes)))
    expected = f"teacher {teacher}: expected the dataset's {counted(len(classes), 'class')}, got {outputs.count}"
    train = "train one on these images (`fastofa train --method scratch`) and give its run as --teacher"
    if not outputs.names:
        raise BadInput(f"{expected}, without names; {train}, or give --teacher-checkpoint")
    source = f"assumed to be those of {subset}" if subset else "named by label_names in its config.json"
    remedy = (
        "correct label_names (without them, the order of the data is assumed)"
        if same_count
        else "rename the data's classes"
    )
    raise BadInput(f"{expected}, {source}: {min(failures)[1]}; {train}, or {remedy}")


def _lemmas(names: Iterable[str]) -> dict[str, str]:
    """timm's descriptions of ImageNet synsets: "n01440764" is "tench, Tinca tinca"."""
    info, descriptions = ImageNetInfo(), {}
    for name in names:
        with suppress(KeyError):
            descriptions[name] = info.label_name_to_description(name)
    return descriptions


def _words(description: str) -> set[str]:
    """The names that match a description: for "tench, Tinca tinca", the whole text and each of its two parts."""
    return {description, *description.split(",")} - {""}


def _loose(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


def _match(
    known: Iterable[tuple[int, str]], classes: Sequence[str], normalize: Callable[[str], str]
) -> tuple[list[int] | None, tuple[int, str]]:
    """The output of each class; or None with the number of classes without an output, and the reason."""
    outputs_by_name: dict[str, set[int]] = {}
    for output, name in known:
        outputs_by_name.setdefault(normalize(name), set()).add(output)
    matches = [outputs_by_name.get(normalize(name), set()) for name in classes]
    used = Counter(next(iter(outputs)) for outputs in matches if len(outputs) == 1)
    missing = [name for name, outputs in zip(classes, matches, strict=True) if not outputs]
    ambiguous = [
        n for n, outputs in zip(classes, matches, strict=True) if len(outputs) > 1 or used[min(outputs, default=-1)] > 1
    ]
    if missing:
        return None, (len(missing), f"it has no {listed(missing)}")
    if ambiguous:
        return None, (0, f"more than one could be {listed(ambiguous)}")
    return [outputs.pop() for outputs in matches], (0, "")


def _report_match(
    teacher: str, outputs: OutputNames, subset: str | None, columns: list[int], classes: Sequence[str], how: str
) -> None:
    if len(columns) < outputs.count:
        of = f"the {outputs.count:,} classes of {subset}" if subset else f"its {outputs.count:,} classes"
        notice(
            f"teacher {teacher}: kept {len(columns):,} of {of}, matched {how}; its probabilities are renormalised "
            "over these"
        )
    elif columns != list(range(len(columns))):
        teacher_order = listed([outputs.names[i] for i in range(len(columns))])
        notice(
            f"teacher {teacher}: its classes are in another order ({teacher_order}) than the data's "
            f"({listed(classes)}), matched {how}"
        )
    elif how != "by name":
        notice(f"teacher {teacher}: its classes are the data's, matched {how}")


def _report_assumed_order(teacher: str, classes: Sequence[str]) -> None:
    """Report that the outputs have no names and are assumed to be in the order of the data's classes."""
    natural = sorted(classes, key=natural_key)
    other = (
        f"; if timm trained it, its order is {listed(natural)} and its predictions will be wrong: add label_names to "
        "its config.json"
        if natural != list(classes)
        else ""
    )
    notice(f"teacher {teacher}: has no label_names; its outputs are assumed to be {listed(classes)}{other}")
