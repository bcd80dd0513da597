"""Imports point one way, so that a part can be read, used and tested without what stands above it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. A module imports from lower layers only, not from its own.
LAYERS = [
    {
        "clock", "confusion", "decoder_messages", "environment", "errors", "exits", "image_integrity", "interrupt",
        "kernels", "memory", "names", "threads", "torchrun",
    },
    {"locks", "progress"},
    {"image_headers"},
    {"beton", "content", "device", "distributed", "files", "fused_depthwise", "images", "rand_augment"},
    {
        "check_images", "class_names", "folder_index", "folder_listing", "fused_norms", "model_config", "views",
        "weights",
    },
    {"config", "dataset", "models", "pipelines", "table_checks"},
    {
        "checkpoint", "cifar", "image_folder", "metrics", "optim", "recipes", "student", "teacher_cache",
        "written",
    },
    {"arguments", "curves", "epochs", "losses", "run", "schedule", "seen", "student_kernels"},
    {"report", "step", "teacher"},
    {"plan"},
    {"cache", "doctor", "evaluate", "export", "precompute", "train", "write"},
    {"demo"},
    {"cli"},
]  # fmt: skip
COMMANDS = {"demo", "write", "precompute", "train", "evaluate", "export", "cache", "doctor"}
# Upwards, but only when a function is called: a data set opens the kind that was asked for.
LAZY = {("dataset", "cifar"), ("dataset", "image_folder"), ("dataset", "written")}

# Path.rglob does not follow the links fastofa/kernels and fastofa/pipelines before Python 3.13: each folder by name.
FILES = {
    **{path.stem: [path] for path in sorted((ROOT / "fastofa").glob("*.py")) if path.stem != "__init__"},
    "kernels": sorted((ROOT / "kernels").glob("*.py")),
    "pipelines": sorted((ROOT / "pipelines").glob("*.py")),
}
# What setup.py requires, by the names they are imported under.
INSTALLED = {
    "torch", "torchvision", "timm", "triton", "numpy", "PIL", "safetensors", "sklearn", "tyro", "rich", "matplotlib",
    "tensorboard", "jinja2",
}  # fmt: skip
OPTIONAL = {"dali_loader.py": {"nvidia"}}  # extras, each imported by one file only


def imports(path: Path, top_level: bool | None = None) -> Iterator[str]:
    """Full names of all modules that a file imports; only those at its top level, or only those in functions."""
    tree = ast.parse(path.read_text())
    in_functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if top_level is not None and (id(node) not in in_functions) is not top_level:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            assert node.module is not None
            names = [
                f"fastofa.{alias.name}" for alias in node.names if (ROOT / "fastofa" / f"{alias.name}.py").exists()
            ]
            yield from names if node.module == "fastofa" else [node.module]


def part(name: str) -> str | None:
    """The part of fastofa that a full module name belongs to; None for other libraries and fastofa's version."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "fastofa" and rest else None


def parts(module: str, top_level: bool | None = None) -> set[str]:
    """Other parts of fastofa that a part imports."""
    found = {part(name) for path in FILES[module] for name in imports(path, top_level)}
    return {name for name in found if name is not None} - {module}


def level(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module in layer)


def test_every_module_has_its_layer():
    """And the list names no module that is not there."""
    assert sorted(FILES) == sorted(module for layer in LAYERS for module in layer)


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_from_lower_layers_only(module):
    """Which leaves no room for cycles."""
    upwards = {(module, other) for other in parts(module) if level(other) >= level(module)}
    assert upwards <= LAZY
    assert not upwards & {(module, other) for other in parts(module, top_level=True)}


def test_the_exceptions_are_still_needed():
    assert {(a, b) for a in FILES for b in parts(a) if level(b) >= level(a)} == LAZY


def test_kernels_depend_on_torch_and_triton_only():
    for path in FILES["kernels"]:
        for name in imports(path):
            first = name.partition(".")[0]
            allowed = (
                part(name) == "kernels"
                if first == "fastofa"
                else first in {"torch", "triton", *sys.stdlib_module_names}
            )
            assert allowed, f"{path.name} imports {name}"


def test_pipelines_depend_on_these_only():
    assert parts("pipelines") <= {
        "views",
        "rand_augment",
        "kernels",
        "errors",
        "files",
        "images",
        "interrupt",
        "progress",
        "beton",
        "torchrun",
    }


def test_commands_do_not_import_each_other():
    """But the demo runs them all."""
    for command in COMMANDS - {"demo"}:
        assert parts(command) & COMMANDS == set()


def test_the_command_line_imports_no_command_before_it_is_asked_for():
    assert parts("cli") & COMMANDS == set()
    from fastofa.cli import COMMANDS as offered

    assert offered.keys() == COMMANDS
    for command in COMMANDS:
        assert "main" in {node.name for node in ast.parse(FILES[command][0].read_text()).body if hasattr(node, "name")}


def test_only_installed_libraries_are_imported():
    """Everything else than these would have to be in setup.py; and kernels and pipelines go by their full names."""
    for paths in FILES.values():
        for path in paths:
            others = {name.partition(".")[0] for name in imports(path)} - {"fastofa", *sys.stdlib_module_names}
            assert others <= INSTALLED | OPTIONAL.get(path.name, set()), path.name


def test_no_file_shadows_a_library():
    """A file ffcv.py (or torch.py, ...) would be imported in place of the library by whoever runs beside it."""
    for paths in FILES.values():
        for path in paths:
            assert path.stem not in {*INSTALLED, "ffcv", "nvidia", "apex"}


def test_the_links_lead_where_the_wheel_puts_the_folders():
    """Relative, so that a clone works anywhere."""
    for name in ("kernels", "pipelines"):
        link = ROOT / "fastofa" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
        assert link.resolve() == ROOT / name


@pytest.mark.parametrize("module", ["fastofa", "fastofa.cli", "fastofa.commands.arguments"])
def test_importing_it_does_not_import_torch(module):
    """`fastofa --help` is immediate."""
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
