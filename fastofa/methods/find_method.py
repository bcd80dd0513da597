"""Find a method by its name: a built-in one, or a class in a user's file."""

import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from fastofa.methods.method import Method, Needs
from fastofa.methods.options import BUILT_IN
from fastofa.system.errors import BadInput


def method_class(name: str) -> type[Method]:
    """The class of `kd`, `ofa` and so on, or FILE.py:Name.

    Raises:
        BadInput: the file cannot be run, or has no such method.
    """
    if name in BUILT_IN:
        found = getattr(import_module(f"fastofa.methods.{name}"), BUILT_IN[name])
        assert issubclass(found, Method)
        return found
    path, _, kind = name.rpartition(":")
    module = _run_file(Path(path))
    method = getattr(module, kind, None)
    if not (isinstance(method, type) and issubclass(method, Method)):
        methods = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Method) and v != Method]
        has = f"it has {', '.join(methods)}" if methods else "it has none"
        raise BadInput(f"method {name}: expected a subclass of fastofa.methods.Method called {kind} in {path}, {has}")
    return method


def needs_of(names: Iterable[str]) -> set[Needs]:
    """What these methods need from the teacher. Raises BadInput as `method_class`."""
    return {method_class(name).needs for name in names}


def _run_file(path: Path) -> object:
    """The module that a file defines; the same file is run once."""
    if not path.is_file():
        raise BadInput(f"method {path}: expected a Python file, found none")
    module_name = f"fastofa_method_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise BadInput(f"method {path}: expected a file whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        del sys.modules[module_name]
        raise BadInput(
            f"method {path}: {type(error).__name__} when it is imported: {error}; correct the file"
        ) from None
    return module
