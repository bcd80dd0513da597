"""Find a method by its name: a built-in one, or a class in a user's file."""

import dataclasses
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastofa.methods.method import Method, Needs
from fastofa.methods.options import BUILT_IN, is_own, prefix_of
from fastofa.methods.own_errors import explained
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
    module = _run_file(name)
    method = getattr(module, kind, None)
    if not (isinstance(method, type) and issubclass(method, Method)):
        methods = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Method) and v != Method]
        has = f"it has {', '.join(methods)}" if methods else "it has none"
        raise BadInput(f"method {name}: expected a subclass of fastofa.methods.Method called {kind} in {path}, {has}")
    _check_signatures(name, method)
    return method


def needs_of(names: Iterable[str]) -> set[Needs]:
    """What these methods need from the teacher. Raises BadInput as `method_class`."""
    return {method_class(name).needs for name in names}


def _check_signatures(name: str, method: type[Method]) -> None:
    """Raises BadInput unless the class has a loss that can be called, and can be created with options and sizes."""
    if method.loss is Method.loss and method.losses is Method.losses:
        raise BadInput(f"method {name}: expected loss(self, outputs, targets, labels), found none; add it")
    for function, arguments in (
        (method.__init__, ("options", "sizes")),
        (method.loss, ("outputs", "targets", "labels")),
    ):
        signature = inspect.signature(function)
        try:
            signature.bind("self", *arguments)
        except TypeError:
            raise BadInput(
                f"method {name}: expected {function.__name__}(self, {', '.join(arguments)}), got "
                f"{function.__name__}{signature}; correct it"
            ) from None


def own_options(name: str, values: Mapping[str, Any]) -> Any:
    """An instance of `Options` of a class in a user's file: its defaults except for `values`.

    Raises:
        BadInput: as `method_class`; `Options` is not a dataclass with defaults that JSON can store; or has no such
            fields.
    """
    kind = method_class(name).Options
    hints = option_types(name)
    if unknown := [key for key in values if key not in hints]:
        raise BadInput(
            f"method {name}: expected values of {', '.join(hints)}, the fields of its Options, got {', '.join(unknown)}"
        )
    with explained([name]):
        return kind(**values)


def option_types(name: str) -> dict[str, Any]:
    """The type of every field of `Options` of a class in a user's file. Raises BadInput as `own_options`."""
    method = method_class(name)
    options = method.Options
    if not (isinstance(options, type) and dataclasses.is_dataclass(options)):
        raise BadInput(f"method {name}: expected a dataclass as its Options, found none; write @dataclass above it")
    try:
        hints = get_type_hints(options)
    except Exception as error:  # the user's annotations may be anything
        raise BadInput(f"method {name}: could not read the types of its Options: {error}; correct them") from None
    for field in dataclasses.fields(options):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise BadInput(f"method {name}: expected a default for Options.{field.name}, found none; add it")
        if not _storable(hints[field.name]):
            raise BadInput(
                f"method {name}: expected Options.{field.name} to be bool, int, float, str, a Literal of text, a tuple "
                f"of these or None, got {hints[field.name]}; change its type"
            )
    names = [field.name for field in dataclasses.fields(options)]
    if "weight" not in names and method.weights is Method.weights:
        raise BadInput(f"method {name}: expected a field `weight: float = 1.0` in its Options, found none; add it")
    return {field: hints[field] for field in names}


def _storable(hint: Any, parts: bool = True) -> bool:
    """Whether JSON stores values of this type so that they can be read back."""
    if hint in (bool, int, float, str, NoneType):
        return True
    if get_origin(hint) is Literal:
        return all(isinstance(value, str) for value in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return all(_storable(part, parts) for part in get_args(hint))
    return parts and get_origin(hint) is tuple and all(_storable(p, False) for p in get_args(hint) if p is not ...)


# --- The files of users -----------------------------------------------------------------------------------------------


def file_digests(names: Iterable[str]) -> dict[str, str]:
    """The sha256 of each user's file, by the prefix of the method's options. Raises BadInput as `method_class`."""
    return {prefix_of(name): _run_file(name).sha256 for name in names if is_own(name)}


def _run_file(name: str) -> ModuleType:
    """The module that the file of FILE.py:Name defines. The same content of the same file is run once."""
    path = Path(name.rpartition(":")[0])
    if not path.is_file():
        raise BadInput(f"method {path}: expected a Python file, found none; give --method with the path of the file")
    source, place = path.read_bytes(), str(path.resolve())
    digest = hashlib.sha256(source).hexdigest()
    module_name = f"fastofa_method_{hashlib.sha256(f'{digest} {place}'.encode()).hexdigest()[:16]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, place)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    vars(module)["sha256"] = digest
    sys.modules[module_name] = module  # dataclasses look their module up while it runs
    try:
        with explained([name]):
            exec(compile(source, place, "exec"), vars(module))  # a loader might use an outdated .pyc
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
