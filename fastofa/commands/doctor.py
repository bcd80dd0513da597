"""Report which accelerators and optional libraries work on this machine, and how to install the missing ones.

    fastofa doctor

All of them are optional: everything runs on a CPU with the libraries installed by `pip install`.
"""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

from fastofa.commands.arguments import DoctorConfig
from fastofa.system.progress import plain


@dataclass(frozen=True)
class Finding:
    part: str
    present: bool
    detail: str
    """The version found, or how to install the part."""


def examine() -> list[Finding]:
    """Examine every part by importing or running it."""
    return [_machine(), _cuda(), _triton(), _compiler(), _ffcv(), _dali(), _apex()]


def _machine() -> Finding:
    cores = len(os.sched_getaffinity(0))
    names = ("torch", "torchvision", "timm")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return Finding("machine", True, f"{cores} CPU cores, Python {platform.python_version()}, {versions}")


def _cuda() -> Finding:
    import torch

    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use --precision fp32"
        detail = f"{count} x {p.name}, {p.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, {bf16}"
        return Finding("CUDA", True, detail)
    if torch.version.cuda is None:
        return Finding("CUDA", False, "this torch is built for CPUs: install the CUDA build from pytorch.org")
    driver = "nvidia-smi sees a GPU, so the driver may be too old" if shutil.which("nvidia-smi") else "no NVIDIA driver"
    return Finding("CUDA", False, f"needs an NVIDIA GPU with a driver for CUDA {torch.version.cuda} ({driver})")


def _triton() -> Finding:
    import torch

    try:
        import triton
    except ImportError as error:
        return Finding("Triton", False, f"pip install triton ({error})")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Finding("Triton", True, f"{triton.__version__}, interpreted (TRITON_INTERPRET=1), which is slow")
    if not torch.cuda.is_available():
        return Finding("Triton", False, f"{triton.__version__} is installed but needs a GPU")
    return Finding("Triton", True, triton.__version__)


def _compiler() -> Finding:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler:
        return Finding("C++ compiler", True, f"{compiler}: torch.compile also works on the CPU")
    return Finding("C++ compiler", False, "needed for torch.compile on the CPU and to build FFCV: apt-get install g++")


def _ffcv() -> Finding:
    return _try_import(
        "FFCV",
        "ffcv",
        "from ffcv.loader import Loader",
        "optional, only for benchmarks against it (.beton files are read without it): apt-get install "
        "libturbojpeg0-dev libopencv-dev pkg-config g++, then pip install ffcv==1.0.2",
    )


def _dali() -> Finding:
    import torch

    builds = ["nvidia-dali-cuda120", "nvidia-dali-cuda130"]
    fitting = builds[(torch.version.cuda or "").startswith("13")]
    remedy = f"pip install {fitting} (it fits this torch's CUDA {torch.version.cuda}; also works without a GPU)"
    installed = next(filter(_version, builds), fitting)
    return _try_import("DALI", installed, "import nvidia.dali.fn", remedy)


def _apex() -> Finding:
    """Look for NVIDIA's apex with its compiled module `amp_C`; the `apex` on PyPI is an unrelated package."""
    remedy = (
        "build it from github.com/NVIDIA/apex with --cpp_ext --cuda_ext; `pip install apex` installs another package"
    )
    if _imports("import amp_C; from apex.optimizers import FusedLAMB"):
        return Finding("NVIDIA apex", True, _version("apex"))
    if _version("apex") or _imports("import apex"):
        installed = f"`apex` {_version('apex')}".strip()
        return Finding("NVIDIA apex", False, f"the installed {installed} is not NVIDIA's or lacks amp_C; {remedy}")
    return Finding("NVIDIA apex", False, f"optional, useful only for its FusedLAMB: {remedy}")


def _try_import(part: str, distribution: str, statement: str, remedy: str) -> Finding:
    if _imports(statement):
        return Finding(part, True, _version(distribution))
    broken = f"{_version(distribution)} is installed but cannot be imported; " if _version(distribution) else ""
    return Finding(part, False, f"{broken}{remedy}")


def _imports(statement: str) -> bool:
    """Try the import in another process, since an incompatible compiled library can abort the process."""
    return subprocess.run([sys.executable, "-c", statement], capture_output=True, check=False).returncode == 0


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def main(_: DoctorConfig) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in examine():
        mark = "[green]yes[/green]" if finding.present else "[yellow]no[/yellow]"
        table.add_row(finding.part, mark, plain(finding.detail))
    Console().print(table, soft_wrap=False)
