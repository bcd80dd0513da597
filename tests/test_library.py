"""`import fastofa` in a user's program: the documented script, the types, and no side effects of importing."""

import ast
import ctypes
import os
import re
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest

import fastofa
from fastofa import cli
from fastofa.pipelines import open_pipeline
from fastofa.system import tuning
from test_layers import FILES, OUTSIDE, ROOT, imports

PAGE = ROOT / "docs" / "library.md"
# Optional libraries, which their files import at the top.
WITHOUT = {"fastofa.pipelines.dali_loader", "fastofa.__main__"}


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in another process that imports this fastofa."""
    given = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=given, capture_output=True, text=True, check=False)


def test_every_public_name_exists():
    """For a type checker and for Python; each has a docstring."""
    tree = ast.parse((ROOT / "fastofa" / "__init__.py").read_text())
    typed = {
        alias.asname
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == set(dir(fastofa))
    for name in (
        "open_dataset",
        "open_teacher",
        "precompute",
        "TeacherCache",
        "Student",
        "train",
        "evaluate",
        "export",
    ):
        assert name in typed
    for name in dir(fastofa):
        assert getattr(fastofa, name).__doc__, name


@pytest.mark.slow
def test_the_documented_script_runs(tmp_path):
    """Unchanged: from a teacher to the class of an image file."""
    ((script,),) = (re.findall(r"<!-- .* -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL),)
    assert len(script.splitlines()) <= 20
    done = python(script, tmp_path)
    assert done.returncode == 0, done.stderr
    teacher, student, prediction = done.stdout.splitlines()
    assert float(teacher.split()[1]) > 0.5
    top1, agreement = map(float, student.split()[1:])
    assert min(top1, agreement) > 0.2  # chance is 0.1
    assert "digit.png ('" in prediction


def test_importing_it_all_changes_nothing_in_the_process(tmp_path):
    """It prints nothing, either. The libraries are imported first, so that their side effects do not count."""
    ours = sorted({*FILES, *OUTSIDE} - WITHOUT)
    theirs = {
        name
        for module, path in {**FILES, **OUTSIDE}.items()
        if module in ours
        for name in imports(path, in_functions=False)
        if name.partition(".")[0] != "fastofa"
    }
    code = f"""
        import importlib, os, signal, sys, threading, warnings
        for name in {sorted(theirs)}:
            importlib.import_module(name)
        import torch

        def state():
            return {{
                "signals": [signal.getsignal(number) for number in signal.valid_signals()],
                "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()),
                "environment": dict(os.environ),
                "filters": list(warnings.filters),
                "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.stdout, sys.stderr),
                "random": torch.random.initial_seed(),
                "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark),
                "dynamo": torch._dynamo.config.recompile_limit,
            }}

        before = state()
        for name in {ours}:
            importlib.import_module(name)
        after = state()
        for key in before:
            assert before[key] == after[key], (key, before[key], after[key])
    """
    done = python(textwrap.dedent(code), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_an_exception_with_the_line_of_the_command(tmp_path):
    """The caller's process continues."""
    code = """
        from pathlib import Path
        import fastofa
        for call in (
            lambda: fastofa.open_dataset("nowhere"),
            lambda: fastofa.train(fastofa.recipe("digits")(data="nowhere", student="test_resnet", out=Path("run"))),
            lambda: fastofa.recipe("nothing"),
            lambda: fastofa.evaluate("run"),
            lambda: fastofa.predict("run", "nowhere.jpg"),
            lambda: fastofa.TeacherCache.open(Path("nowhere")),
            lambda: fastofa.open_teacher("no_model", ["a"]),
        ):
            try:
                call()
            except fastofa.BadInput as error:
                assert "expected" in str(error) or "could not" in str(error), error
                assert "\\n" not in str(error), error
            else:
                raise AssertionError(call)
        print("alive")
    """
    done = python(textwrap.dedent(code), tmp_path)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_the_package_runs_as_a_command(tmp_path):
    """python -m fastofa COMMAND, with its output and its exit code."""
    for argv, code in ((["--version"], 0), (["cache", "info", "nowhere"], 2), ([], 2)):
        command = [sys.executable, "-m", "fastofa", *argv]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code
        if argv == ["--version"]:
            assert done.stdout == f"fastofa {fastofa.__version__}\n"


# --- Types ------------------------------------------------------------------------------------------------------------

RIGHT = """
from pathlib import Path

import fastofa

config: fastofa.TrainConfig = fastofa.recipe("digits")(data="digits", student="test_resnet", out=Path("run"))
top1: float = fastofa.train(config).top1
cache = fastofa.precompute(fastofa.PrecomputeConfig("digits", "teacher", Path("cache"), views=2, topk=5))
views, classes, log_probs = cache.targets(0)
labels = fastofa.open_dataset("digits", "val").labels
agreement: float | None = fastofa.evaluate(Path("run"), weights="best").agreement
line: str = fastofa.export(Path("run"), Path("out"), onnx=True)
for prediction in fastofa.predict("run", ["a.jpg", Path("b")], topk=3):
    name: str = prediction.classes[0]
    share: float = prediction.probabilities[0]
student = fastofa.Student("resnet18", num_classes=10)
"""
WRONG = {
    'fastofa.predict("run", "a.jpg", topk="three")': "arg-type",
    'fastofa.evaluate(Path("run"), weights="newest")': "arg-type",
    'fastofa.open_dataset("digits", split="test")': "arg-type",
    'fastofa.Student("resnet18", num_classes=10).no_such_name()': "operator",
    "fastofa.no_such_name": "attr-defined",
}


@pytest.mark.slow
def test_types_are_visible_to_mypy_in_a_users_program(tmp_path):
    """In a virtual environment with fastofa installed: mypy uses a package's types only if it has a py.typed."""
    pytest.importorskip("mypy")
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    installed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "all.pth").write_text("".join(f"{path}\n" for path in [ROOT, *installed]))
    (tmp_path / "right.py").write_text(RIGHT)
    wrong = f"from pathlib import Path\nimport fastofa\n{chr(10).join(WRONG)}\n"
    (tmp_path / "wrong.py").write_text(wrong)
    mypy = [sys.executable, "-m", "mypy", "--python-executable", str(tmp_path / "venv" / "bin" / "python")]
    flags = ["--config-file=", "--cache-dir", str(tmp_path / "cache"), "--follow-imports", "silent"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    command = [*mypy, *flags, "right.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    found = re.findall(r"^(\w+\.py):(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in found if name == "right.py"] == [], done.stdout
    assert {int(line) for _, line, _ in found} == set(range(3, 3 + len(WRONG))), done.stdout
    assert {kind for _, _, kind in found} == set(WRONG.values()), done.stdout


# --- Tuning -----------------------------------------------------------------------------------------------------------


def test_freed_memory_is_kept_once_a_pipeline_is_open(tmp_path):
    """By glibc's counters, a block of 20 MB then comes from the heap, not from the system."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("needs glibc 2.33")
    code = """
        import ctypes
        from fastofa.system.tuning import keep_freed_memory

        names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep")
        class Info(ctypes.Structure):
            _fields_ = [(name, ctypes.c_size_t) for name in names]
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = Info
        libc.malloc.restype = ctypes.c_void_p

        def mapped():
            before = libc.mallinfo2().hblks
            libc.malloc(20 << 20)
            return libc.mallinfo2().hblks - before

        print(mapped())
        keep_freed_memory()
        print(mapped())
    """
    assert python(textwrap.dedent(code), tmp_path).stdout.split() == ["1", "0"]


def test_a_pipeline_and_a_command_apply_the_settings(monkeypatch, digits):
    applied: list[str] = []
    monkeypatch.setattr("fastofa.pipelines.keep_freed_memory", lambda: applied.append("memory"))
    open_pipeline("resident", digits, 32, 10)
    monkeypatch.setattr(tuning, "own_process", lambda: applied.append("process"))
    with pytest.raises(SystemExit):
        cli.main(["cache", "info", "nowhere"])
    assert applied == ["memory", "process"]
