"""What is installed: fastofa with kernels and pipelines inside it, each file once, and no bare package names."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fastofa

ROOT = Path(__file__).parent.parent
SOURCES = ("fastofa", "kernels", "pipelines", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    """The arguments that setup.py passes to setuptools."""
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=lambda **values: given.update(values)))
        runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_version_and_command(declared):
    assert declared["version"] == fastofa.__version__
    assert declared["entry_points"] == {"console_scripts": ["fastofa = fastofa.cli:main"]}


def test_every_package_is_declared_once_by_its_full_name(declared):
    packages = {path.parent.name for path in (ROOT / "fastofa").glob("*/__init__.py")}
    assert {"data", "kernels", "pipelines", "training"} < packages
    assert sorted(declared["packages"]) == sorted(["fastofa", *(f"fastofa.{package}" for package in packages)])


def test_apex_is_never_installed_from_pypi(declared):
    """The `apex` there is another package. FFCV and DALI are optional."""
    extras, required = declared["extras_require"], declared["install_requires"]
    texts = [*required, *(text for extra in extras.values() for text in extra)]
    everything = {re.split(r"[^A-Za-z0-9_.-]", text)[0].lower() for text in texts}
    assert "apex" not in everything
    assert not [text for text in required if "ffcv" in text or "dali" in text]
    assert {"ffcv", "dali", "test"} <= extras.keys()


def test_python_and_torch_are_recent_enough(declared):
    assert declared["python_requires"] == ">=3.10"
    assert any(text.startswith("torch>=") for text in declared["install_requires"])


# --- Built ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The files of an installation, and a list of their names, built from a copy of the sources.

    They come from a wheel that this environment's setuptools, or one that pip downloads, builds; if neither can, they
    are those that setuptools would include.
    """
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--retries", "0", "--timeout", "5", "wheel", "--no-deps"]
    can_make = importlib.util.find_spec("setuptools.command.bdist_wheel") or importlib.util.find_spec("wheel")
    for isolation in (["--no-build-isolation"], []) if can_make else ([],):
        command = [*pip, *isolation, "--wheel-dir", str(out), str(source)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            (wheel,) = out.glob("fastofa-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                names = archive.namelist()
                archive.extractall(out / "installed")
            return out / "installed", [name for name in names if ".dist-info/" not in name]
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(out / "installed")]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    files = [path for path in (out / "installed").rglob("*") if path.is_file()]
    return out / "installed", [path.relative_to(out / "installed").as_posix() for path in files]


@pytest.mark.slow
def test_every_file_is_installed_once_and_under_fastofa(built):
    """As the sources list them: no bare `kernels` or `pipelines`, nothing twice through the links; bytes unchanged."""
    folder, names = built
    expected = {f"fastofa/{path.name}": path for path in (ROOT / "fastofa").glob("*.py")}
    expected |= {f"fastofa/{name}": ROOT / "fastofa" / name for name in ("py.typed", "reports/report.html.jinja")}
    for package in (path.parent for path in (ROOT / "fastofa").glob("*/__init__.py")):
        expected |= {f"fastofa/{package.name}/{path.name}": path for path in package.glob("*.py")}
    assert sorted(names) == sorted(expected)
    for name, path in expected.items():
        assert (folder / name).read_bytes() == path.read_bytes()
        assert not (folder / name).is_symlink()


@pytest.mark.slow
def test_installed_packages_import_from_the_installation(built, tmp_path):
    """In another process and folder: fastofa.kernels is the installed copy, the bare `kernels` is not ours."""
    folder, _ = built
    code = (
        "import importlib.util, fastofa.kernels, fastofa.pipelines.resident as resident\n"
        "print(fastofa.kernels.__file__, resident.__file__, importlib.util.find_spec('kernels'), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    kernels, resident, bare = done.stdout.split()
    assert Path(kernels) == folder / "fastofa" / "kernels" / "__init__.py"
    assert Path(resident) == folder / "fastofa" / "pipelines" / "resident.py"
    assert bare == "None" or str(ROOT) not in bare  # Hugging Face's `kernels` may be installed
