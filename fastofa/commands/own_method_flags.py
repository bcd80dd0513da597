"""The flags of methods in users' files: --method my_method.py:Squares has --squares.weight and so on."""

import dataclasses
import inspect
from typing import Annotated, Any

import tyro

from fastofa.commands.help_texts import field_docs
from fastofa.commands.sections import section
from fastofa.methods.options import own_methods
from fastofa.runs.config import check_method
from fastofa.runs.config_file import from_json


def own_forms(method: str | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """For each method of a user's file in `method`, by the prefix of its options: a dataclass with the flags of its
    options, and their default values.

    Such a file is run here, which imports torch.
    """
    method = method or defaults["method"]
    own, forms = own_methods(method), dict[str, Any]()
    if not own:
        return forms
    from fastofa.methods.find_method import method_class, option_types, own_options

    check_method(method)
    for prefix, name in own.items():
        known = defaults["own_options"].get(prefix, {})
        options, types = dataclasses.asdict(own_options(name, known)), option_types(name)
        docs = field_docs(method_class(name).Options)
        form = section(
            (field, Annotated[hint, tyro.conf.arg(name=f"{prefix}.{field}", help=docs.get(field))], dataclasses.field())
            for field, hint in types.items()
        )
        form.__doc__ = (inspect.getdoc(method_class(name)) or "").partition("\n\n")[0]
        forms[prefix] = from_json(form, options, "correct the file of the configuration")
    return forms
