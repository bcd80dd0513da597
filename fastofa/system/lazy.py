"""Names of a package that are imported when they are first used, so that importing the package costs nothing."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy(package: str, places: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package; `places` maps each name to the module that defines it."""

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(places[name]), name)

    return get, lambda: sorted(places)
