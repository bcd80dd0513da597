"""Files, headings, commands and flags to which README and docs/ refer exist."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastofa import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench/results/RECORDS.md"]
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def anchors(path: Path) -> set[str]:
    """The anchors of the headings, as GitHub generates them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@page
def test_links_lead_to_files_and_headings(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@page
def test_named_benchmarks_exist(path):
    for name in re.findall(r"python -m (bench\.\w+)", path.read_text()):
        assert find_spec(name), name


def commands() -> dict[str, set[str]]:
    """The flags that the code blocks pass to each command."""
    found: dict[str, set[str]] = {}
    for path in PAGES:
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
        blocks = "".join(block for language, block in fenced if not language)
        for line in blocks.replace("\\\n", " ").splitlines():
            if match := re.search(r"\bfastofa ([a-z]+) (.*)", line.partition("  #")[0]):
                found.setdefault(match[1], set()).update(re.findall(r"--[a-z0-9-]+", match[2]))
    return found


@pytest.mark.parametrize(("command", "flags"), commands().items())
def test_flags_in_code_blocks_exist(command, flags, capsys):
    cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert {flag for flag in flags if not re.search(rf"{flag}\b(?!-)", text)} == set()
