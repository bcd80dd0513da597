"""timm models by name: creation, input size, normalisation; and their weights, from timm, from a file or a folder."""

import difflib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import timm
import torch
from timm.models import _builder, _hub, get_pretrained_cfg
from torch import Tensor, nn

from fastofa.models.model_config import CHANNELS, ModelConfig, channels_message, check_arguments, read_model_config
from fastofa.models.weights import SavedWeights, read_weights
from fastofa.system.errors import BadInput
from fastofa.system.progress import notice

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
CONFIG, FILES = "config.json", ("model.safetensors", "pytorch_model.bin")  # of a folder with a model
SPARE = 100_000_000  # numbers that a model may hold beside its weights: positions, masks
# A classifier of another size in a file: refuse it, let the model have as many classes, or let it start at random.
OtherClasses = Literal["refuse", "adopt", "restart"]


def resolve(name: str, image_size: int | None = None, drop_path: float | None = None) -> tuple[str, dict[str, Any]]:
    """timm's own name and the arguments that build the model.

    Raises:
        BadInput: timm has no such model; the nearest names are given.
    """
    name, arguments = VARIANTS.get(name, (name.removeprefix("timm/"), {}))
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
    init: str | SavedWeights | None = None,
) -> Any:
    """A timm model; models with a fixed input size are built for `image_size`.

    Args:
        name: see `resolve`.
        num_classes: of the classifier; None: as many as the weights have.
        image_size: side of the input in pixels; None: the model's own.
        drop_path: stochastic depth; None: the model's own, 0: none.
        init: None for random weights, "pretrained" for timm's published ones, a .safetensors or .pth file, a folder
            with a model (see `find_folder`), or weights. A classifier of another size starts at random.

    Raises:
        BadInput: unknown model or tag, a size the model cannot be built for, weights that cannot be had or do not fit.
    """
    timm_name, arguments = resolve(name, image_size, drop_path)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    weights = _weights_of(init, timm_name) if isinstance(init, str) and init != "pretrained" else init
    try:
        if isinstance(weights, SavedWeights):
            return _build_with(weights, timm_name, arguments, "adopt" if num_classes is None else "restart")
        return timm.create_model(timm_name, pretrained=init is not None, **arguments)
    except (RuntimeError, AssertionError, TypeError, ValueError, KeyError) as error:
        if drop_path == 0 and "drop_path_rate" in str(error):  # a model that has none to switch off
            return create_model(name, num_classes, image_size, None, init)
        size = f" at {image_size} px" if image_size is not None else ""
        start = f" from {init}" if isinstance(init, str) else ""
        raise BadInput(f"could not build {name}{size}{start}: {' '.join(str(error).split())[:300]}") from None
    except BadInput:
        raise
    except Exception as error:  # the hub's and the network's many kinds
        if init is None:
            raise
        raise BadInput(
            f"could not get the weights of {name} ({first_line(error)}); without a network, give a local file"
        ) from None


def _weights_of(init: str, timm_name: str) -> SavedWeights:
    """Of a file, or of a folder with a model of this architecture."""
    folder = find_folder(init)
    if folder is None:
        return read_weights(Path(init))
    found = resolve(read_model_config(folder / CONFIG).architecture)[0].partition(".")[0]
    if found != timm_name.partition(".")[0]:
        raise BadInput(f"{init}: expected the weights of a {timm_name}, it holds a {found}")
    return read_weights(_weights_file(folder))


def _build_with(weights: SavedWeights, timm_name: str, arguments: dict[str, Any], other_classes: OtherClasses) -> Any:
    """The model with these weights. timm builds it and calls its loader, which is ours here: it is handed timm's own
    conversion of the publishers' checkpoints, and every weight must fit, where timm's would let some pass."""

    def load(model: nn.Module, *_: Any, filter_fn: Callable[..., Any] | None = None, **__: Any) -> None:
        load_weights(model, weights, filter_fn, other_classes)

    with mock.patch.object(_builder, "load_pretrained", load):
        return timm.create_model(timm_name, pretrained=True, **arguments)


def load_weights(
    model: Any,
    weights: SavedWeights,
    convert: Callable[..., Any] | None = None,
    other_classes: OtherClasses = "refuse",
) -> None:
    """Load them into the model; every name and shape must fit, as they are or as timm's `convert` makes them.

    Raises:
        BadInput: names or shapes that do not fit; the model stays as it was.
    """
    own = model.state_dict()
    tensors = weights.of_model(own)
    if convert is not None and not _same_shapes(own, tensors):
        tensors = _converted(tensors, convert, model)
    classifier = model.pretrained_cfg.get("classifier") if other_classes != "refuse" else None
    for name in (classifier,) if isinstance(classifier, str) else classifier or ():
        tensors = _fit_classifier(model, tensors, name, weights.source, other_classes)
    own = model.state_dict()
    counters = {key for key in own.keys() - tensors.keys() if key.endswith("num_batches_tracked")}  # not in old files
    missing, unexpected = sorted(own.keys() - tensors.keys() - counters), sorted(tensors.keys() - own.keys())
    reshaped = [k for k in sorted(own.keys() & tensors.keys()) if own[k].shape != tensors[k].shape]
    if missing or unexpected:
        raise BadInput(
            f"{weights.source}: does not fit the model, missing {_some(missing)}, unexpected {_some(unexpected)}"
        )
    first = model.pretrained_cfg.get("first_conv")
    for name in (first,) if isinstance(first, str) else first or ():
        if (key := f"{name}.weight") in reshaped and tensors[key].ndim == 4 and own[key].shape[1] == CHANNELS:
            raise BadInput(channels_message(weights.source, tensors[key].shape[1]))
    if reshaped:
        key = reshaped[0]
        raise BadInput(
            f"{weights.source}: does not fit the model, expected {key} {tuple(own[key].shape)}, got "
            f"{tuple(tensors[key].shape)} ({len(reshaped)} such); is it of this architecture and number of classes?"
        )
    model.load_state_dict({**tensors, **{key: own[key] for key in counters}})


def _same_shapes(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> bool:
    return own.keys() == tensors.keys() and all(own[key].shape == tensors[key].shape for key in own)


def _converted(tensors: dict[str, Tensor], convert: Callable[..., Any], model: nn.Module) -> dict[str, Tensor]:
    """As timm's own function for this architecture renames, reshapes and resizes the publishers' weights."""
    try:
        try:
            found = convert(dict(tensors), model)
        except TypeError:  # older ones take the weights alone
            found = convert(dict(tensors))
    except Exception:  # it stumbles over other architectures' weights in many ways
        return tensors
    return found if isinstance(found, dict) and all(isinstance(v, Tensor) for v in found.values()) else tensors


def _fit_classifier(
    model: Any, tensors: dict[str, Tensor], name: str, source: str, other_classes: OtherClasses
) -> dict[str, Tensor]:
    """The weights with a classifier of the model's number of classes; or the model with one of the weights'."""
    own, keys = model.state_dict(), (f"{name}.weight", f"{name}.bias")
    weight = tensors.get(keys[0])
    if other_classes == "adopt":
        if weight is not None and weight.ndim > 0 and len(weight) != model.num_classes:
            model.reset_classifier(len(weight))
        return tensors
    if keys[0] not in own or (weight is not None and weight.shape[:1] == own[keys[0]].shape[:1]):
        return tensors
    if weight is None and keys[1] not in tensors:
        notice(f"{source}: has no classifier {name}, it starts at random")
    fresh = nn.init.trunc_normal_(torch.empty_like(own[keys[0]]), std=0.02)
    zeros = {keys[1]: torch.zeros_like(own[keys[1]])} if keys[1] in own else {}
    return {**tensors, keys[0]: fresh, **zeros}


def find_folder(name: str) -> Path | None:
    """A folder with a model: FOLDER or local-dir:FOLDER as it is, hf-hub:OWNER/NAME fetched; None for anything else.

    Raises:
        BadInput: no such folder, or the hub does not give it.
    """
    source, _, place = name.partition(":")
    if source == "local-dir":
        if not Path(place).is_dir():
            raise BadInput(f"{name}: expected a folder with a model, there is none")
        return Path(place)
    if source in ("hf-hub", "hf_hub"):
        return _fetch(name, place)
    return Path(name) if name and Path(name).is_dir() else None


def _fetch(name: str, place: str) -> Path:
    """config.json and the weights of a model on the hub, into the hub's own cache."""
    try:
        config = _hub.download_from_hf(place, CONFIG)
        try:
            _hub.download_from_hf(place, FILES[0])
        except _hub.EntryNotFoundError:
            _hub.download_from_hf(place, FILES[1])
    except Exception as error:  # the hub's and the network's many kinds
        raise BadInput(
            f"could not get {name} ({first_line(error)}); without a network, give a folder with its files"
        ) from None
    return Path(config).parent


def _weights_file(folder: Path) -> Path:
    return next((folder / file for file in FILES if (folder / file).exists()), folder / FILES[0])


def open_model_folder(folder: Path) -> tuple[Any, ModelConfig]:
    """A model from a folder with config.json and model.safetensors, as `fastofa export` and timm write them.

    Raises:
        BadInput: the folder lacks one of them, they do not fit each other, or a value in config.json cannot be.
    """
    config = read_model_config(folder / CONFIG)
    try:
        name, arguments = resolve(config.architecture)
    except BadInput as error:
        raise BadInput(f"{config.path}: {error}") from None
    weights = read_weights(_weights_file(folder))
    arguments |= {**config.arguments, "num_classes": config.num_classes}
    arguments["pretrained_cfg_overlay"] = config.preprocessing
    try:
        with torch.device("meta"):  # whatever the sizes, it takes no memory
            check_arguments(config, type(timm.create_model(name)))
            skeleton = timm.create_model(name, **arguments)
        described = sum(t.numel() for part in (skeleton.parameters(), skeleton.buffers()) for t in part)
        if described > 2 * weights.numbers + SPARE:
            raise BadInput(
                f"{config.path}: describes a model of {described:,} numbers, {weights.source} holds {weights.numbers:,}"
            )
        return _build_with(weights, name, arguments, "refuse"), config
    except BadInput:
        raise
    except Exception as error:  # arguments that cannot be fail in many ways
        raise BadInput(f"{config.path}: could not build {name} of it, {first_line(error)}") from None


def check_channels(model: Any, what: str) -> None:
    """Raises BadInput unless the model takes RGB."""
    channels = getattr(model, "in_chans", CHANNELS)
    if channels != CHANNELS:
        raise BadInput(channels_message(what, channels))


def input_size(model: Any) -> int:
    """Side of the pictures the model is made for, in pixels."""
    return int(model.pretrained_cfg["input_size"][-1])


def normalization(model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The model's own (mean, std) for pixels scaled to 0..1."""
    return tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])


def weights_sha256(model: nn.Module) -> str:
    """sha256 over every tensor of the state_dict, whatever file it came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _some(keys: list[str]) -> str:
    return "none" if not keys else ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
