"""Edited JSON, and the rule for code that reads a damaged file. Damaged bytes come from bench/lib/damage.py."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastofa.system.errors import BadInput

VALUES = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -1.5, 1e-300, 1e308, float("nan"), float("inf")),
    *("", "x", "../x", "\x1b[31m", "é\u2028\udcff", "1" * 5000, [], [[]], [1, "x", None], {}, {"x": {"y": []}}),
]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every entry."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def damage_json(text: str, seed: int) -> tuple[str, str]:
    """Change, remove, add or rename an entry, or replace the document by JSON of another type."""
    rng = random.Random(seed)
    value = json.loads(text)
    kind = rng.choice(["value"] * 6 + ["missing"] * 3 + ["additional", "renamed", "nested", "other", "twice"])
    if kind == "nested":
        depth = rng.choice([100, 100_000])
        return kind, "[" * depth + "]" * depth if rng.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth
    if kind == "other":
        return kind, json.dumps(rng.choice(VALUES))
    if kind == "twice":
        return kind, text + text
    container, key = rng.choice([*_places(value)])
    if kind == "value":
        container[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == "missing":
        del container[key]
    elif isinstance(container, list):
        container.insert(key, copy.deepcopy(rng.choice(VALUES)))
    elif kind == "renamed":
        container[f"{key}x"] = container.pop(key)
    else:
        container["x"] = copy.deepcopy(rng.choice(VALUES))
    return f"{kind} at {key!r}", json.dumps(value)


# --- The rule ---------------------------------------------------------------------------------------------------------


def refused(use: Callable[[], Any], place: Path) -> tuple[bool, Any]:
    """(True, message) if `use` raises BadInput with one line that names the path; else (False, its result)."""
    try:
        return False, use()
    except BadInput as error:
        message = str(error)
        assert "\n" not in message, f"several lines: {message!r}"
        assert str(place) in message, f"does not name {place}: {message}"
        return True, message


def complaint(case: Callable[[], str]) -> str:
    """What `case` reports as wrong, empty if nothing is; an exception is wrong, too."""
    try:
        return case()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
