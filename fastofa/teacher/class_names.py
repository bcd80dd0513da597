"""Which of a teacher's outputs is which class of the data? By their names, never by their places alone.

timm numbers class folders in natural order whatever their case (c1, c2, c10), torchvision and fastofa by code points
(c1, c10, c2). And a teacher may know more classes than the data has: the thousand of ImageNet, ten of which are here.
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

from fastofa.system.errors import BadInput, counted
from fastofa.system.progress import notice

SYNSET = re.compile(r"n\d{8}")  # a class of ImageNet


@dataclass(frozen=True)
class OutputNames:
    """What is known of a teacher's outputs."""

    count: int
    names: dict[int, str] = field(default_factory=dict)
    """By output, as its config.json names them."""
    descriptions: dict[str, str] = field(default_factory=dict)
    """Other words for a name: "tench, Tinca tinca"."""


def match_classes(teacher: str, outputs: OutputNames, classes: Sequence[str]) -> list[int]:
    """The output for each class of the data, in the data's order. One notice says what is not plain.

    Raises:
        BadInput: the names do not match, or, without names, the numbers of classes do not.
    """
    subset = None if outputs.names else infer_imagenet_subset({"num_classes": outputs.count})
    if subset is not None:
        outputs = OutputNames(outputs.count, dict(enumerate(ImageNetInfo(subset).label_names())))
    if not outputs.descriptions and any(map(SYNSET.fullmatch, outputs.names.values())):
        outputs = OutputNames(outputs.count, outputs.names, _lemmas(outputs.names.values()))
    named = list(outputs.names.items())
    words = [(output, word) for output, name in named for word in _words(outputs.descriptions.get(name, ""))]
    failures: list[tuple[int, str]] = []
    for how, form, known in (
        ("by name", str, named),
        ("by name, whatever case, spaces, - and _", _loose, named),
        ("by description", _loose, words),
    ):
        columns, failure = _match(known, classes, form)
        if columns is not None:
            _tell(teacher, outputs, subset, columns, classes, how)
            return columns
        failures.append(failure)
    same_count = outputs.count == len(classes)
    if same_count and (subset is not None or not outputs.names):
        _tell_order(teacher, classes)
        return list(range(len(classes)))
    wanted = counted(len(classes), "class")
    expected = f"teacher {teacher}: expected {wanted} as in the data set, it has {outputs.count}"
    train = "train one on these images (`fastofa train --method scratch`) and give its run as --teacher"
    if not outputs.names:
        raise BadInput(f"{expected}, without names; {train}, or give --teacher-checkpoint")
    source = f"taken for those of {subset}" if subset else "named by label_names in its config.json"
    remedy = "correct label_names (without any, the order is taken to be the data's)" if same_count else "rename yours"
    raise BadInput(f"{expected}, {source}: {min(failures)[1]}; {train}, or {remedy}")


def _lemmas(names: Iterable[str]) -> dict[str, str]:
    """What timm knows of ImageNet's synsets: "n01440764" is "tench, Tinca tinca"."""
    info, found = ImageNetInfo(), {}
    for name in names:
        with suppress(KeyError):
            found[name] = info.label_name_to_description(name)
    return found


def _words(description: str) -> set[str]:
    """ "tench, Tinca tinca" may be called by both together or by either."""
    return {description, *description.split(",")} - {""}


def _loose(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


def _match(
    known: Iterable[tuple[int, str]], classes: Sequence[str], form: Callable[[str], str]
) -> tuple[list[int] | None, tuple[int, str]]:
    """The output of each class; or None, for how many there is none, and why."""
    found: dict[str, set[int]] = {}
    for output, name in known:
        found.setdefault(form(name), set()).add(output)
    matches = [found.get(form(name), set()) for name in classes]
    used = Counter(next(iter(outputs)) for outputs in matches if len(outputs) == 1)
    lacking = [name for name, outputs in zip(classes, matches, strict=True) if not outputs]
    doubtful = [
        n for n, outputs in zip(classes, matches, strict=True) if len(outputs) > 1 or used[min(outputs, default=-1)] > 1
    ]
    if lacking:
        return None, (len(lacking), f"it has no {_some(lacking)}")
    if doubtful:
        return None, (0, f"more than one could be {_some(doubtful)}")
    return [outputs.pop() for outputs in matches], (0, "")


def _tell(
    teacher: str, outputs: OutputNames, subset: str | None, columns: list[int], classes: Sequence[str], how: str
) -> None:
    if len(columns) < outputs.count:
        those = f"the {outputs.count:,} classes of {subset}" if subset else f"its {outputs.count:,} classes"
        notice(
            f"teacher {teacher}: kept {len(columns):,} of {those}, matched {how}; its probabilities are shared "
            "among these alone"
        )
    elif columns != list(range(len(columns))):
        theirs = _some([outputs.names[i] for i in range(len(columns))])
        notice(
            f"teacher {teacher}: its classes are in another order ({theirs}) than the data's ({_some(classes)}), "
            f"matched {how}"
        )
    elif how != "by name":
        notice(f"teacher {teacher}: its classes are the data's, matched {how}")


def _tell_order(teacher: str, classes: Sequence[str]) -> None:
    """Without names the order is assumed."""
    natural = sorted(classes, key=natural_key)
    other = (
        f"; if it was trained by timm, whose order is {_some(natural)}, its answers are wrong: give label_names in "
        "its config.json"
        if natural != list(classes)
        else ""
    )
    notice(f"teacher {teacher}: has no label_names, its outputs are taken to be {_some(classes)}{other}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
