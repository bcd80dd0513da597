"""`fastofa doctor` reports what works, and recognises other packages of the same name and broken ones."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fastofa.commands import doctor
from fastofa.commands.doctor import Finding, examine

PARTS = ["machine", "CUDA", "Triton", "C++ compiler", "FFCV", "DALI", "NVIDIA apex"]


@pytest.fixture
def install(tmp_path: Path, monkeypatch):
    """install(name, version, files) writes a fake distribution that this process and its children import first."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, number: str | None, files: dict[str, str]) -> None:
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        if number is not None:
            metadata = tmp_path / f"{name.replace('-', '_')}-{number}.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        importlib.invalidate_caches()

    return write


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # conftest sets it
        return {finding.part: finding for finding in examine()}


def test_every_part_has_one_line_of_detail(findings):
    assert list(findings) == PARTS
    for finding in findings.values():
        assert finding.detail
        assert "\n" not in finding.detail


def test_installed_parts_are_found(findings):
    """The versions of this environment, and the GPU, compiler and optional packages that exist here."""
    for text in (
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"timm {version('timm')}",
        "CPU cores",
    ):
        assert text.partition("+")[0] in findings["machine"].detail
    assert findings["machine"].present
    assert findings["CUDA"].present is torch.cuda.is_available()
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    assert findings["C++ compiler"].present is bool(compiler)
    assert (compiler or "apt-get install g++") in findings["C++ compiler"].detail
    for part, module in (("FFCV", "ffcv"), ("DALI", "nvidia.dali"), ("NVIDIA apex", "apex")):
        try:
            found = importlib.util.find_spec(module) is not None
        except ImportError:
            found = False
        assert found or not findings[part].present


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_remedy_is_named(findings):
    """With a CUDA build of torch it is a driver, with a CPU build another torch."""
    wanted = "install the CUDA build" if torch.version.cuda is None else f"a driver for CUDA {torch.version.cuda}"
    assert wanted in findings["CUDA"].detail
    assert not findings["Triton"].present


def test_without_a_compiler_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    finding = doctor._compiler()
    assert not finding.present
    assert "apt-get install g++" in finding.detail
    monkeypatch.setenv("CXX", "/opt/bin/my-c++")
    assert doctor._compiler().present


@pytest.mark.parametrize("number", ["0.9.10", None])
def test_pypis_apex_is_recognised(install, number):
    """PyPI's `apex` can be imported but has neither amp_C nor optimizers; also without metadata."""
    install("apex", number, {"apex/__init__.py": "", "apex/forms.py": ""})
    finding = doctor._apex()
    assert not finding.present
    found = "the installed `apex` 0.9.10" if number else "the installed `apex`"
    assert finding.detail.startswith(f"{found} is not NVIDIA's or lacks amp_C; build it from github.com/NVIDIA/apex")


def test_an_apex_without_its_cuda_extension_is_reported(install):
    """NVIDIA's sources installed without --cuda_ext: FusedLAMB imports, amp_C does not."""
    install("apex", "0.1", {"apex/__init__.py": "", "apex/optimizers.py": "class FusedLAMB: pass"})
    assert not doctor._apex().present
    assert "lacks amp_C" in doctor._apex().detail


def test_nvidias_apex_is_found(install):
    files = {"apex/__init__.py": "", "apex/optimizers.py": "class FusedLAMB: pass", "amp_C.py": ""}
    install("apex", "0.1", files)
    assert doctor._apex() == Finding("NVIDIA apex", True, "0.1")


def test_without_apex_it_is_called_optional(monkeypatch):
    monkeypatch.setattr(doctor, "_imports", lambda _: False)
    monkeypatch.setattr(doctor, "_version", lambda _: "")
    assert doctor._apex().detail.startswith(
        "optional, useful only for its FusedLAMB: build it from github.com/NVIDIA/apex"
    )


@pytest.mark.parametrize(
    "text",
    ["raise ImportError('libopencv_core.so.406: cannot open shared object file')", "import os; os.abort()"],
    ids=["raises", "aborts"],
)
def test_a_broken_ffcv_is_reported(install, text):
    """FFCV that raises on import or aborts its process is reported with the remedy."""
    install("ffcv", "1.0.2", {"ffcv/__init__.py": text})
    finding = doctor._ffcv()
    assert not finding.present
    assert finding.detail.startswith("1.0.2 is installed but cannot be imported; ")
    assert "apt-get install libturbojpeg0-dev" in finding.detail


def test_a_working_ffcv_is_found(install):
    install("ffcv", "1.0.2", {"ffcv/__init__.py": "", "ffcv/loader.py": "class Loader: pass"})
    assert doctor._ffcv() == Finding("FFCV", True, "1.0.2")


@pytest.mark.parametrize(("cuda", "package"), [("12.8", "nvidia-dali-cuda120"), ("13.0", "nvidia-dali-cuda130")])
def test_the_named_dali_package_fits_torchs_cuda(monkeypatch, cuda, package):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "_imports", lambda _: False)
    monkeypatch.setattr(doctor, "_version", lambda _: "")
    assert doctor._dali().detail.startswith(f"pip install {package} ")


def test_main_prints_a_table(capsys, monkeypatch, findings):
    """A row for each part with yes or no; returns normally whatever is missing."""
    monkeypatch.setattr(doctor, "examine", lambda: [*findings.values(), Finding("made up", False, "buy one")])
    doctor.main(doctor.DoctorConfig())
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    for finding in findings.values():
        (line,) = (line for line in lines if line.startswith(f"{finding.part} "))
        assert line.removeprefix(finding.part).split()[0] == ("yes" if finding.present else "no")
    assert lines[-1].split() == ["made", "up", "no", "buy", "one"]


@pytest.mark.slow
def test_the_command_exits_with_0():
    command = [sys.executable, "-c", "from fastofa.cli import main; main(['doctor'])"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(part in done.stdout for part in PARTS)
