"""Find the blocks of a timm model, and observe their outputs.

A stage is either a list of blocks (ResNet's layer1) or a module with such a list (Swin's layers.0.blocks).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastofa.system.errors import BadInput

BLOCKS = "blocks"  # timm's name for the list of blocks in a stage
STEM = ("stem", "patch_embed")  # prefixes of timm's names for the modules before the blocks


def find_blocks(model: Any, name: str) -> dict[str, nn.Module]:
    """The blocks of a timm model by their names in it, in the order of definition.

    For a model without blocks, such as VGG, they are the modules whose outputs timm lists as features.

    Args:
        model: the model.
        name: its name, for the message.

    Raises:
        BadInput: the model has neither blocks nor such modules.
    """
    found: dict[str, nn.Module] = {}
    for part, module in model.named_children():
        if _is_list(module) and not part.startswith(STEM):
            found |= _in_list(part, module)
    if not found:
        modules = dict(model.named_modules())
        features = [entry["module"] for entry in feature_info(model)]
        found = {feature: modules[feature] for feature in features if feature in modules}
    if not found:
        raise BadInput(f"{name}: expected a model made of blocks, found none; choose another model")
    return found


def feature_info(model: Any) -> list[dict[str, Any]]:
    """timm's list of the model's features, from the first to the last; empty if it has none."""
    info = getattr(model, "feature_info", [])
    return info if isinstance(info, list) else info.info


def _in_list(name: str, modules: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for part, module in modules.named_children():
        inner, path = getattr(module, BLOCKS, None), f"{name}.{part}"
        if _is_list(module):
            found |= _in_list(path, module)
        elif isinstance(inner, nn.Module) and _is_list(inner):
            found |= _in_list(f"{path}.{BLOCKS}", inner)
        elif any(True for child in module.children() for _ in child.parameters()):  # not a single layer
            found[path] = module
    return found


def _is_list(module: nn.Module) -> bool:
    """Whether it holds modules of one kind: a list, or children with one name and numbers (RegNet's b1, b2, ...)."""
    names = {name.rstrip("0123456789") for name, _ in module.named_children()}
    numbered = all(name[-1].isdigit() for name, _ in module.named_children())
    return isinstance(module, nn.Sequential | nn.ModuleList) or (len(names) == 1 and numbered)


@contextmanager
def watching(modules: dict[str, nn.Module], visit: Callable[[str, Any], None]) -> Iterator[None]:
    """While the `with` block runs, call `visit(name, output)` each time that one of these modules has run."""

    def hook(name: str) -> Callable[..., None]:
        def call(_module: nn.Module, _inputs: Any, output: Any) -> None:
            visit(name, output)

        return call

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
