"""Parse the arguments of a command, without torch, so that a typo is reported at once."""

import re
import shutil
from pathlib import Path
from typing import Any

import tyro

from fastofa.commands.arguments import CONFIGS, CacheConfig
from fastofa.commands.defaults import DEFAULTS, FILE
from fastofa.commands.flag_values import flag_value, joined
from fastofa.commands.help_texts import command_docstring, give_help, wrapped
from fastofa.commands.own_method_flags import own_forms
from fastofa.commands.refuse_urls import refuse_urls, takes_url
from fastofa.commands.sections import in_sections
from fastofa.methods.options import BUILT_IN
from fastofa.runs.config import USED_BY, TrainConfig
from fastofa.system.errors import BadInput
from fastofa.system.urls import refuse_url


def parse(command: str, argv: list[str]) -> Any:
    """The command's configuration. Exits after --help, and with code 2 for unknown or missing arguments.

    Raises:
        BadInput: a value is invalid, or a URL where the command expects a path.
    """
    refuse_urls(command, argv)  # before --resume and --config are read
    config = _parsed(command, argv)
    for name, value in vars(config).items():
        if isinstance(value, Path):  # from a file; as a path, its URL has lost a slash
            value = re.sub(r"^([a-z][a-z0-9+.-]+):/(?!/)", r"\1://", str(value), flags=re.IGNORECASE)
        if isinstance(value, str) and not takes_url(command, name, value):
            refuse_url(name.replace("_", "-"), value)
    return config


def _parsed(command: str, argv: list[str]) -> Any:
    config, prog = CONFIGS[command], f"fastofa {command}"
    give_help(config)
    if {"-h", "--help"} & set(argv):
        print(wrapped(command_docstring(command), shutil.get_terminal_size().columns), end="\n\n")
        if config is CacheConfig:  # `cache push --help` would leave the actions out of the usage
            argv = ["--help"]
    if config not in DEFAULTS:
        return tyro.cli(config, args=argv, description="", prog=prog)
    argv = joined(argv, "--teacher")
    defaults = DEFAULTS[config](argv)
    own = own_forms(flag_value(argv, "--method"), defaults) if config is TrainConfig else {}
    form, flat = in_sections(config, defaults, own), (tyro.conf.OmitArgPrefixes,)
    sections = vars(tyro.cli(form, args=argv, description="", prog=prog, config=flat)).values()
    values = {name: value for section in sections for name, value in vars(section).items() if name != FILE}
    if config is TrainConfig:
        values["own_options"] = {prefix: vars(values.pop(prefix)) for prefix in own}
    parsed = config(**values)
    if config is TrainConfig:
        _refuse_unused(argv, parsed)
    return parsed


def _refuse_unused(argv: list[str], config: TrainConfig) -> None:
    """Raises BadInput for a flag that no chosen method uses. Values from a recipe or a file may be unused."""
    for argument in argv:
        flag = argument.partition("=")[0].removeprefix("--")
        name = flag.replace("-", "_").partition(".")[0]
        users = (name,) if name in BUILT_IN else USED_BY.get(name, ())
        if argument.startswith("--") and users and not {*users} & {*config.methods}:
            raise BadInput(
                f"{flag}: expected only with --method {' or '.join(users)}, which uses it, but got --method "
                f"{config.method}; leave it out"
            )
