"""`Names` behaves like a list of strings but occupies one block of memory."""

import numpy as np
import pytest

from fastofa.data.names import Names


def test_names_equal_a_list_of_strings() -> None:
    """Including everything that a file name may contain."""
    names = ["a/1.jpg", "b c/ü 2.jpg", "", "b/[bold]\n\x1b.jpg", "a/1.jpg"]
    found = Names.of(names)
    assert (len(found), list(found), found[1], found[-1], found[1:3]) == (5, names, names[1], names[-1], names[1:3])
    assert found == names
    assert names == found
    assert found == Names.of(names)
    assert found != names[:4]
    assert found.index(names[3]) == 3
    assert names[3] in found
    assert "c" not in found
    assert found[np.int64(1)] == names[1]
    assert found.without(np.array([0, 3])) == [names[1], names[2], names[4]]
    assert list(Names.of([])) == []
    for i in (5, -6):
        with pytest.raises(IndexError):
            found[i]
    with pytest.raises(ValueError, match="NUL"):
        Names(b"a\0b")


def test_places_of_names_in_others() -> None:
    """Also more names than are decoded at a time, and empty sequences."""
    numbers = np.random.default_rng(0).permutation(70_000)
    names, others = [f"{i}" for i in numbers], [f"{i}" for i in range(0, 140_000, 2)]
    places = Names.of(names).places_in(Names.of(others))
    assert places.tolist() == [i // 2 if i % 2 == 0 else -1 for i in numbers]
    assert Names.of(names).places_in(Names.of(names)).tolist() == list(range(70_000))
    assert Names.of(["a"]).places_in(Names.of([])).tolist() == [-1]
    assert Names.of([]).places_in(Names.of(["a"])).tolist() == []
