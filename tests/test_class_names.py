"""A teacher's outputs are matched with the data's classes by name, or refused; never reordered silently."""

import re

import pytest
from timm.data import ImageNetInfo

from fastofa.system.errors import BadInput
from fastofa.teacher.class_names import OutputNames, match_classes

CODE_POINTS = ("c1", "c10", "c2", "c3", "c4", "c5", "c6", "c7", "c8", "c9")  # fastofa's and torchvision's order
NATURAL = tuple(f"c{i + 1}" for i in range(10))  # timm's


def outputs(*names: str, **descriptions: str) -> OutputNames:
    return OutputNames(len(names), dict(enumerate(names)), descriptions)


@pytest.mark.parametrize(
    ("known", "classes", "expected", "said"),
    [
        (outputs(*NATURAL), CODE_POINTS, [0, 9, 1, 2, 3, 4, 5, 6, 7, 8], "in another order (c1, c2, c3 and 7 more)"),
        (outputs(*NATURAL), NATURAL, list(range(10)), ""),
        (outputs("Apple", "banana", "Cherry"), ("Apple", "Cherry", "banana"), [0, 2, 1], "in another order"),
        (outputs("a", "b", "c", "d"), ("d", "b"), [3, 1], "kept 2 of its 4 classes"),
        (OutputNames(9, {7: "a", 3: "b"}), ("a", "b"), [7, 3], "kept 2 of its 9 classes"),
        (outputs("red fox", "Arctic-Fox"), ("arctic_fox", "RED  FOX "), [1, 0], "ignoring case, spaces, - and _"),
        (outputs("café", "Thé"), ("cafe\u0301", "the\u0301"), [0, 1], "ignoring case"),
        (outputs("Cat", "cat"), ("cat", "Cat"), [1, 0], "in another order"),
        (
            outputs("n1", "n2", n1="tench, Tinca tinca", n2="goldfish, Carassius auratus"),
            ("goldfish", "tinca_tinca"),
            [1, 0],
            "matched by description",
        ),
        (outputs("n1", "n2", n1="tench, Tinca tinca"), ("Tench, Tinca tinca",), [0], "kept 1 of its 2 classes"),
        (outputs("n01440764", "n02085620"), ("Chihuahua", "tench"), [1, 0], "matched by description"),
    ],
)
def test_outputs_are_matched_by_name(known, classes, expected, said, capsys):
    """Exactly, else ignoring case and spaces, else by description; a match that is not exact is reported."""
    assert match_classes("t", known, classes) == expected
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (said != "")
    assert said in "".join(lines)


@pytest.mark.parametrize(
    ("known", "classes", "message"),
    [
        (outputs("a", "b", "c"), ("a", "b", "x"), "named by label_names in its config.json: it has no x; "),
        (outputs("a", "b", "c", "d"), ("a", "x", "y"), "it has no x, y; .*rename the data"),
        (outputs("a", "b"), ("a", "b", "c"), r"\b3 classes, got 2, .*: it has no c; "),
        (outputs("Cat", "CAT", "dog"), ("cat", "dog"), "more than one could be cat"),
        (outputs("cat", "dog"), ("Cat", "CAT"), "more than one could be Cat, CAT"),
        (outputs("n1", "n2", n1="crane, a bird", n2="crane, a machine"), ("crane",), "more than one could be crane"),
        (OutputNames(7), tuple("abc"), r"\b3 classes, got 7, without names"),
        (OutputNames(1000), ("n01440764", "hovercraft"), "imagenet-1k: it has no hovercraft"),
    ],
)
def test_classes_that_do_not_match_are_refused(known, classes, message):
    with pytest.raises(BadInput, match=message) as error:
        match_classes("t", known, classes)
    assert str(error.value).startswith("teacher t: expected ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("count", "subset"), [(1000, "imagenet-1k"), (21843, "imagenet-21k-goog")])
def test_an_imagenet_teacher_is_matched_by_synset_or_word(count, subset, capsys):
    """timm publishes no class names with its weights; the number of outputs determines which of its lists applies."""
    synsets = ImageNetInfo(subset).label_names()
    for classes in (("n02085620", "n01440764"), ("Chihuahua", "tench")):
        found = match_classes("t", OutputNames(count), classes)
        assert [synsets[i] for i in found] == ["n02085620", "n01440764"]
        assert f"kept 2 of the {count:,} classes of {subset}, matched by" in capsys.readouterr().err


def test_all_of_imagenet(capsys):
    """Folders named by synset are in the outputs' order; a thousand classes with other names are used in their own
    order.
    """
    assert match_classes("t", OutputNames(1000), ImageNetInfo().label_names()) == list(range(1000))
    assert capsys.readouterr().err == ""
    assert match_classes("t", OutputNames(1000), [f"{i:04d}" for i in range(1000)]) == list(range(1000))
    assert "has no label_names" in capsys.readouterr().err


def test_without_names_the_order_is_used_and_reported(capsys):
    """Together with timm's order, if that differs."""
    assert match_classes("t", OutputNames(3), ("a", "b", "c")) == [0, 1, 2]
    assert capsys.readouterr().err == "teacher t: has no label_names; its outputs are assumed to be a, b, c\n"
    assert match_classes("t", OutputNames(10), CODE_POINTS) == list(range(10))
    said = capsys.readouterr().err
    assert re.search(r"assumed to be c1, c10, c2 and 7 more; .*timm.* order is c1, c2, c3 and 7 more", said)
