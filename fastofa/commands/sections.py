"""The flags of `train` and `precompute` in titled sections, and --config, as the dataclass that tyro fills."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastofa.commands.defaults import FILE
from fastofa.runs.config import SECTIONS as train_sections
from fastofa.runs.config import TrainConfig
from fastofa.teacher.precompute_config import SECTIONS as precompute_sections
from fastofa.teacher.precompute_config import PrecomputeConfig

SECTIONS = {TrainConfig: train_sections, PrecomputeConfig: precompute_sections}
_FILE_HELP = (
    'Take the defaults from {}, or from a file with only its "config" object. {}; flags override single fields. '
    'Relative paths are relative to the file\'s "folder", or to the working directory if it names none.'
)
FILE_HELP = {
    TrainConfig: _FILE_HELP.format("a run's config.json", "--data, --student and --out then become optional"),
    PrecomputeConfig: _FILE_HELP.format(
        "a cache's cache.json (without --device, --workers and other flags that do not change the predictions)",
        "Only --out is then required",
    ),
}


def _resumes(values: list[str]) -> bool:
    """Parse --resume, alone or with the run's folder, which defaults.py reads."""
    if len(values) > 1:
        raise ValueError(f"expected one run, got {' '.join(values)}")
    return True


_RESUME = tyro.constructors.PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="[RUN]",
    instance_from_str=_resumes,
    is_instance=lambda value: isinstance(value, bool),
    str_from_instance=lambda _: [],
)


def in_sections(config: type, defaults: dict[str, Any], own: dict[str, Any]) -> Any:
    """The flat configuration as a dataclass with one nested dataclass per section, which tyro prints as a titled
    group.

    Args:
        own: for each method of a user's file, an instance of a dataclass with its options, in place of `own_options`.
    """
    sections: dict[str, list[Any]] = {}
    for field in dataclasses.fields(config):
        hint, default = config.__annotations__[field.name], defaults.get(field.name, field.default)
        if field.name in SECTIONS[config]:
            fields = sections[SECTIONS[config][field.name]] = []
        if field.name == "own_options":
            fields += [(prefix, type(form), dataclasses.field(default=form)) for prefix, form in own.items()]
            continue
        if field.name == "resume":
            hint = Annotated[object, _RESUME, dataclasses.replace(hint.__metadata__[0], help_behavior_hint="")]
        needed = default is tyro.MISSING or default is dataclasses.MISSING
        fields.append((field.name, hint, dataclasses.field() if needed else dataclasses.field(default=default)))
    file = tyro.conf.arg(help=FILE_HELP[config], metavar="FILE", help_behavior_hint="")
    next(iter(sections.values())).append((FILE, Annotated[Path | None, file], dataclasses.field(default=None)))
    return section(
        (f"section_{number}", Annotated[section(fields), tyro.conf.arg(name=title, help="")])
        for number, (title, fields) in enumerate(sections.items())
    )


def section(fields: Iterable[Any]) -> Any:
    """A dataclass with fields as `dataclasses.make_dataclass` takes them."""
    return dataclasses.make_dataclass("Section", fields, kw_only=True, frozen=True)
