"""Packaging: `kernels/` and `pipelines/` at the top level are installed as fastofa.kernels and fastofa.pipelines.

A distribution called `kernels` exists, so the bare names must not be installed. The two symlinks inside fastofa/ let an
editable install, type checkers and go-to-definition see the wheel's layout.
"""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
source = (here / "fastofa" / "__init__.py").read_text()
version = re.findall(r'__version__ = "(.+)"', source)[0]

ROOMS = sorted(path.parent.name for path in (here / "fastofa").glob("*/__init__.py") if not path.parent.is_symlink())

setup(
    name="fastofa",
    version=version,
    description="OFA-KD at full speed: a strong small vision model from any teacher, through cached teacher logits",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["fastofa", *(f"fastofa.{room}" for room in ROOMS), "fastofa.kernels", "fastofa.pipelines"],
    package_dir={"fastofa": "fastofa", "fastofa.kernels": "kernels", "fastofa.pipelines": "pipelines"},
    package_data={"fastofa": ["py.typed"], "fastofa.reports": ["report.html.jinja"]},
    install_requires=[
        "torch>=2.9",
        "torchvision>=0.24",
        "timm>=1.0.31",
        "triton; platform_system == 'Linux'",
        "numpy",
        "pillow",
        "safetensors",
        "scikit-learn",
        "tyro",
        "rich",
        "matplotlib",
        "jinja2",
        "tensorboard",
        "fsspec",
    ],
    extras_require={
        "ffcv": ["ffcv"],
        "dali": ["nvidia-dali-cuda120"],
        "dali-cuda13": ["nvidia-dali-cuda130"],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
        # NVIDIA's apex is not on PyPI (the `apex` there is something else): see `fastofa doctor`.
        "test": ["pytest", "pytest-xdist", "hypothesis", "scipy", "ruff", "mypy", "fastofa[onnx]"],
    },
    entry_points={"console_scripts": ["fastofa = fastofa.cli:main"]},
)
