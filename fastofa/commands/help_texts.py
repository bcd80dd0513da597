"""What --help prints: the docstring of the command's module, and of each flag its field's docstring."""

import ast
import dataclasses
import inspect
import re
import textwrap
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, cast, get_type_hints

import tyro


def command_docstring(command: str) -> str:
    """The docstring of the command's module, without importing the module, which takes seconds."""
    spec = find_spec(f"fastofa.commands.{command}")
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""


def wrapped(text: str, width: int) -> str:
    """Wrap the paragraphs. Indented lines are commands with descriptions, which move below the commands if too long."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if not paragraph.startswith(" "):
            lines += textwrap.wrap(paragraph, width)
        elif max(map(len, paragraph.splitlines())) <= width:
            lines.append(paragraph)
        else:
            for line in paragraph.splitlines():
                command, *description = re.split(" {3,}", line.strip())
                lines.append(f"    {command}")
                lines += textwrap.wrap(" ".join(description), width, initial_indent=" " * 8, subsequent_indent=" " * 8)
        lines.append("")
    return "\n".join(lines[:-1])


@cache
def give_help(config: type, prefix: str = "") -> None:
    """Give tyro the fields' docstrings without line breaks, and hide a default of None that the docstring explains.

    The flags of options within options get their group's name as a prefix.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, nested in get_type_hints(config).items():
        if dataclasses.is_dataclass(nested):
            give_help(cast(type, nested), f"{name}.")
    for name, text in field_docs(config).items():
        explained = defaults[name] is None and re.search("by default|default:", text, re.IGNORECASE)
        hint = (lambda default: "" if default == "None" else f"(default: {default})") if explained else None
        given = f"{prefix}{name}" if prefix else None
        argument = tyro.conf.arg(name=given, help=text, help_behavior_hint=hint)
        config.__annotations__[name] = Annotated[config.__annotations__[name], argument]


def field_docs(config: type) -> dict[str, str]:
    """The docstring of each field that has one, without line breaks."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    docs = {}
    for field, doc in pairwise(getattr(body, "body", ())):
        match field, doc:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                docs[name] = " ".join(text.split())
    return docs
