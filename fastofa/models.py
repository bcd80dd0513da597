"""timm models by name: creation, input size, normalisation, weights from a file."""

import argparse
import difflib
import hashlib
import re
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from fastofa.errors import BadInput
from fastofa.files import is_pickle, read_json

# The paper's two small Swin students, which timm has no name for: (timm's name, arguments).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin_nano_patch4_window7_224": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 64, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16)},
    ),
    "swin_pico_patch4_window7_224": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16)},
    ),
}


def resolve(name: str, image_size: int | None = None, drop_path: float | None = None) -> tuple[str, dict[str, Any]]:
    """timm's own name and the arguments that build the model.

    Raises:
        BadInput: timm has no such model; the nearest names are given.
    """
    name, arguments = VARIANTS.get(name, (name, {}))
    if not timm.is_model(name):
        known = [*VARIANTS, *timm.list_models()]
        near = [n for n in known if name and n.startswith(name)] or difflib.get_close_matches(name, known)
        hint = f"; near it: {', '.join(near[:3])}" if near else ""
        raise BadInput(f"unknown model {name!r}: expected a timm model, see timm.list_models(){hint}")
    arguments = dict(arguments)
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError as error:
        raise BadInput(f"unknown model {name!r}: {first_line(error)}; see timm.list_pretrained()") from None
    if image_size is not None and config is not None and config.fixed_input_size:
        arguments["img_size"] = image_size
    if drop_path is not None:
        arguments["drop_path_rate"] = drop_path
    return name, arguments


def create_model(
    name: str,
    num_classes: int | None,
    image_size: int | None = None,
    drop_path: float | None = None,
    init: str | None = None,
) -> Any:
    """A timm model; models with a fixed input size are built for `image_size`.

    Args:
        name: see `resolve`.
        num_classes: of the classifier; None: the published model's.
        image_size: side of the input in pixels; None: the model's own.
        drop_path: stochastic depth; None: the model's own.
        init: None for random weights, "pretrained" for timm's published ones, or a .safetensors or .pth file. A
            classifier of another size starts at random.

    Raises:
        BadInput: unknown model or tag, a size the model cannot be built for, weights that cannot be had or do not fit.
    """
    timm_name, arguments = resolve(name, image_size, drop_path)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if init not in (None, "pretrained"):
        arguments["pretrained_cfg_overlay"] = _from_file(timm_name, num_classes, Path(init))
    try:
        model: Any = timm.create_model(timm_name, pretrained=init is not None, **arguments)
        model.pretrained_cfg.pop("state_dict", None)
        return model
    except (RuntimeError, AssertionError, TypeError, ValueError, KeyError) as error:
        size = f" at {image_size} px" if image_size is not None else ""
        start = f" from {init}" if init is not None else ""
        raise BadInput(f"could not build {name}{size}{start}: {' '.join(str(error).split())[:300]}") from None
    except Exception as error:  # the hub's and the network's many kinds
        if init is None:
            raise
        raise BadInput(
            f"could not get the weights of {name} ({first_line(error)}); without a network, give a local file"
        ) from None


def _from_file(timm_name: str, num_classes: int | None, path: Path) -> dict[str, Any]:
    """What makes timm load the file, every key of it: a classifier of another size is exchanged for a random one."""
    weights = _read_weights(path)
    config = get_pretrained_cfg(timm_name)
    names = (config and config.classifier) or ()
    for name in (names,) if isinstance(names, str) else names:
        if f"{name}.weight" in weights:
            weight = weights[f"{name}.weight"]
            num_classes = num_classes or len(weight)
            if len(weight) != num_classes:
                weights[f"{name}.weight"] = nn.init.trunc_normal_(torch.empty(num_classes, *weight.shape[1:]), std=0.02)
                if f"{name}.bias" in weights:
                    weights[f"{name}.bias"] = torch.zeros(num_classes)
    return {"state_dict": weights, **({"num_classes": num_classes} if num_classes else {})}


def input_size(model: Any) -> int:
    """Side of the pictures the model is made for, in pixels."""
    return int(model.pretrained_cfg["input_size"][-1])


def normalization(model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The model's own (mean, std) for pixels scaled to 0..1."""
    return tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a .safetensors file, or a .pth through torch's weights-only reader, into the model; every key must match.

    Raises:
        BadInput: missing, unreadable, a pickle with code in it, or keys or shapes that do not fit the model.
    """
    weights = _read_weights(path)
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    reshaped = [k for k in sorted(own.keys() & weights.keys()) if own[k].shape != weights[k].shape]
    if missing or unexpected:
        raise BadInput(f"{path}: does not fit the model, missing {_some(missing)}, unexpected {_some(unexpected)}")
    if reshaped:
        key = reshaped[0]
        raise BadInput(
            f"{path}: does not fit the model, expected {key} {tuple(own[key].shape)}, got {tuple(weights[key].shape)} "
            f"({len(reshaped)} such); is it of this architecture and number of classes?"
        )
    model.load_state_dict(weights)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise BadInput(f"{path}: expected a file with weights, found none")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            kind = "a pickle" if is_pickle(path) else f"damaged ({first_line(error)})"
            raise BadInput(f"{path}: expected safetensors, got a file that is {kind}; nothing was loaded") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints hold their command line
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {wanted[1]}, which is no tensor" if wanted else "it is damaged or no checkpoint of torch"
        raise BadInput(
            f"{path}: torch's weights-only reader refused it, {reason}; save a plain state_dict or safetensors"
        ) from None
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
            break
    if not isinstance(weights, dict) or not all(isinstance(k, str) and isinstance(weights[k], Tensor) for k in weights):
        raise BadInput(f"{path}: expected a state_dict of tensors, got {type(weights).__name__}")
    return {key.removeprefix("module."): value for key, value in weights.items()}


def weights_sha256(model: nn.Module) -> str:
    """sha256 over every tensor of the state_dict, whatever file it came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_model_folder(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A model from a folder with config.json and model.safetensors, as `fastofa export` and timm write them.

    Raises:
        BadInput: the folder lacks one of them or they do not fit each other.
    """
    config = read_json(folder / "config.json")
    try:
        name, arguments, pretrained_cfg = config["architecture"], load_arguments(config), {**config["pretrained_cfg"]}
    except (KeyError, TypeError) as error:
        raise BadInput(f"{folder / 'config.json'}: expected timm's model configuration, it lacks {error}") from None
    resolve(name)
    try:
        model: Any = timm.create_model(name, **arguments)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise BadInput(f"{folder / 'config.json'}: could not build {name} of it, {first_line(error)}") from None
    load_weights(model, folder / "model.safetensors")
    model.pretrained_cfg = {**model.pretrained_cfg, **pretrained_cfg}
    return model, config


def load_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What timm.create_model needs besides the name to rebuild the model of a config.json."""
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in (config.get("model_args") or {}).items()}
    return {**given, "num_classes": config["num_classes"]}


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _some(keys: list[str]) -> str:
    return "none" if not keys else ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
