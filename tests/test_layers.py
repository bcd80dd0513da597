"""Imports point downwards only, so that each part can be read, used and tested without those above it."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastofa.cli import COMMANDS

ROOT = Path(__file__).parent.parent

# Lowest first: a package imports from itself and from lower ones.
PACKAGES = (
    "kernels", "system", "views", "data", "pipelines", "models", "student", "methods", "runs", "teacher", "reports",
    "training", "commands",
)  # fmt: skip
# Modules beside the packages: the command line, and public names.
TOP = {"__init__", "__main__", "cli", "dataset", "teacher_cache"}
# What setup.py requires, by the names they are imported under.
INSTALLED = {
    "torch", "torchvision", "timm", "triton", "numpy", "PIL", "safetensors", "sklearn", "tyro", "rich", "matplotlib",
    "tensorboard", "jinja2", "fsspec",
}  # fmt: skip
OPTIONAL = {"dali_loader.py": {"nvidia"}, "export_onnx.py": {"onnxruntime"}}  # extras, each imported by one file only
# Imported within a function: they take a second or more, and many runs do not need them.
LATE = {
    ("own_method_flags.py", "fastofa.methods.find_method"),
    ("cli.py", "fastofa.commands.parse"),
    ("cli.py", "fastofa.commands.quick_checks"),
    ("curves.py", "matplotlib"),
    ("curves.py", "matplotlib.backends.backend_agg"),
    ("curves.py", "matplotlib.backends.backend_svg"),
    ("curves.py", "matplotlib.figure"),
    ("digits.py", "sklearn.datasets"),
    ("export_onnx.py", "onnxruntime"),
    ("log.py", "torch.utils.tensorboard"),
    ("tuning.py", "torch._dynamo.config"),
}

# Path.rglob does not follow the links fastofa/kernels and fastofa/pipelines before Python 3.13: each folder by name.
FILES = {
    f"fastofa.{package}.{path.stem}": path
    for package in PACKAGES
    for path in sorted((ROOT / "fastofa" / package).glob("*.py"))
}
# Files beside the commands: the arguments of all, how they are parsed, and their early checks.
BEFORE_COMMANDS = {
    "arguments", "defaults", "flag_values", "help_texts", "own_method_flags", "parse", "quick_checks", "refuse_urls",
    "sections",
}  # fmt: skip
OUTSIDE = {f"fastofa.{path.stem}": path for path in sorted((ROOT / "fastofa").glob("*.py"))}


def imports(path: Path, in_functions: bool | None = None) -> Iterator[str]:
    """Full names of the modules that a file imports; only those within functions, or only the others."""
    tree = ast.parse(path.read_text())
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing or (in_functions is not None and (id(node) in inner) is not in_functions):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            assert node.module is not None
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in {**FILES, **OUTSIDE} else node.module for name in modules)


def package(name: str) -> str | None:
    """The package of a full module name; None for other libraries and for modules beside the packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "fastofa" and len(parts) > 1 and parts[1] in PACKAGES else None


def test_every_file_is_in_a_package():
    assert {path.stem for path in OUTSIDE.values()} == TOP
    folders = {path.parent.name for path in (ROOT / "fastofa").glob("*/__init__.py")}
    assert folders == set(PACKAGES)


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_downwards(module):
    own = package(module)
    for name in imports(FILES[module]):
        if name.partition(".")[0] == "fastofa":
            other = package(name)
            assert name == "fastofa" or other is not None, f"{module} imports {name}"
            assert other is None or PACKAGES.index(other) <= PACKAGES.index(own), f"{module} imports {name}"


def test_there_is_no_import_cycle():
    """Not within a package either."""
    graph = {module: {name for name in imports(path) if name in FILES} - {module} for module, path in FILES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)


def test_imports_are_at_the_top_of_a_file():
    """Except imports that take seconds, optional libraries (Triton, and those that doctor checks), and tyro."""
    found = {
        (path.name, name)
        for module, path in {**FILES, **OUTSIDE}.items()
        if package(module) != "kernels" and path.name != "doctor.py"
        for name in imports(path, in_functions=True)
    }
    assert found == LATE


def test_kernels_depend_on_torch_and_triton_only():
    for module, path in FILES.items():
        if package(module) == "kernels":
            for name in imports(path):
                allowed = package(name) == "kernels" or name.partition(".")[0] in {
                    "torch",
                    "triton",
                    *sys.stdlib_module_names,
                }
                assert allowed, f"{path.name} imports {name}"


def test_commands_do_not_import_each_other():
    """But all share their arguments, and the demo calls the functions behind the others."""
    for command in COMMANDS:
        others = {name for name in imports(FILES[f"fastofa.commands.{command}"]) if package(name) == "commands"}
        assert others <= {"fastofa.commands.arguments"}


def test_what_runs_before_a_command_imports_none():
    """Commands import torch, which takes seconds."""
    for name in BEFORE_COMMANDS:
        path = FILES[f"fastofa.commands.{name}"]
        others = {other.rpartition(".")[2] for other in imports(path) if package(other) == "commands"}
        assert others <= BEFORE_COMMANDS, path.name


def test_every_command_is_a_file():
    files = {path.stem for module, path in FILES.items() if package(module) == "commands"}
    assert files == {"__init__", *BEFORE_COMMANDS, *COMMANDS}
    for command in COMMANDS:
        tree = ast.parse(FILES[f"fastofa.commands.{command}"].read_text())
        assert "main" in {node.name for node in tree.body if hasattr(node, "name")}


def test_only_installed_libraries_are_imported():
    """Others would have to be in setup.py; kernels and pipelines are imported by their full names."""
    for path in [*FILES.values(), *OUTSIDE.values()]:
        others = {name.partition(".")[0] for name in imports(path)} - {"fastofa", *sys.stdlib_module_names}
        assert others <= INSTALLED | OPTIONAL.get(path.name, set()), path.name


def test_no_file_shadows_a_library():
    """A file ffcv.py (or torch.py, ...) would be imported instead of the library by a script that runs beside it."""
    for path in [*FILES.values(), *OUTSIDE.values()]:
        assert path.stem not in {*INSTALLED, "ffcv", "nvidia", "apex", "wandb"}


def test_the_links_match_the_wheels_package_folders():
    """They are relative, so that a clone works anywhere."""
    for name in ("kernels", "pipelines"):
        link = ROOT / "fastofa" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
        assert link.resolve() == ROOT / name


@pytest.mark.parametrize(
    "module",
    [
        "fastofa",
        "fastofa.cli",
        "fastofa.commands.parse",
        "fastofa.runs.recipes",
        "fastofa.views.draw",
        "fastofa.data.write_config",
    ],
)
def test_importing_it_imports_neither_torch_nor_timm(module):
    """`fastofa --help` is fast, and a configuration can be made without them."""
    code = f"import {module}, sys; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
