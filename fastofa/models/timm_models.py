"""Create timm models by name, with weights from timm, a file or a folder; their input size and normalisation."""

import difflib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import timm
import torch
from timm.data.constants import DEFAULT_CROP_PCT
from timm.models import _builder, _hub, get_pretrained_cfg
from torch import Tensor, nn

from fastofa.models.model_config import CHANNELS, ModelConfig, channels_message, check_arguments, read_model_config
from fastofa.models.not_in_timm import family_of_name, family_of_weights
from fastofa.models.weights import SavedWeights, read_weights
from fastofa.system.errors import BadInput, listed
from fastofa.system.progress import notice

# The paper's two small Swin students, for which timm has no names: (timm's name, arguments).
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
CONFIG, FILES = "config.json", ("model.safetensors", "pytorch_model.bin")  # in a folder with a model
SPARE = 100_000_000  # numbers that a model may have besides its weights, such as positions and masks
# If a file has a classifier of another size: refuse it, adopt its number of classes, or initialise it at random.
OtherClasses = Literal["refuse", "adopt", "restart"]


def resolve(name: str, image_size: int | None = None, drop_path: float | None = None) -> tuple[str, dict[str, Any]]:
    """timm's own name and the arguments that build the model.

    Raises:
        BadInput: timm has no such model; the message suggests similar names.
    """
    name, arguments = VARIANTS.get(name, (name.removeprefix("timm/"), {}))
    if not timm.is_model(name):
        if family := family_of_name(name):
            raise BadInput(f"unknown model {name!r}: timm has no {family}; choose another MLP, such as resmlp_12_224")
        known = [*VARIANTS, *timm.list_models()]
        similar = [n for n in known if name and n.startswith(name)] or difflib.get_close_matches(name, known)
        hint = f"; similar names: {', '.join(similar[:3])}" if similar else ""
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


def published_model(name: str, image_size: int | None = None) -> Any:
    """A timm model with its published weights, for a name that may also have been meant as a folder's.

    Raises:
        BadInput: see `check_published` and `create_model`.
    """
    check_published(name)
    return create_model(name, None, image_size, init="pretrained")


def check_published(name: str) -> None:
    """Raises BadInput if timm has no such model; the message adds that there is no such folder either."""
    try:
        resolve(name)
    except BadInput as error:
        raise BadInput(f"{error}; there is no folder {name} either") from None


def create_model(
    name: str,
    num_classes: int | None,
    image_size: int | None = None,
    drop_path: float | None = None,
    init: str | SavedWeights | None = None,
) -> Any:
    """Create a timm model; one with a fixed input size is built for `image_size`.

    Args:
        name: see `resolve`.
        num_classes: outputs of the classifier; None for as many as the weights have.
        image_size: side of the input in pixels; None for the model's own.
        drop_path: rate of stochastic depth; None for the model's own, 0 for none.
        init: None for random weights, "pretrained" for timm's published ones, a .safetensors or .pth file, a folder
            with a model (see `find_folder`), or weights. A classifier of another size gets random weights.

    Raises:
        BadInput: unknown model or tag, a size for which the model cannot be built, or weights that are unavailable or
            do not match the model.
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
        if drop_path == 0 and "drop_path_rate" in str(error):  # the model has no stochastic depth
            return create_model(name, num_classes, image_size, None, init)
        size = f" at {image_size} px" if image_size is not None else ""
        start = f" from {init}" if isinstance(init, str) else ""
        raise BadInput(f"could not build {name}{size}{start}: {' '.join(str(error).split())[:300]}") from None
    except BadInput:
        raise
    except Exception as error:  # the hub and the network raise many types
        if init is None:
            raise
        raise BadInput(
            f"could not get the weights of {name} ({first_line(error)}); without a network, give a local file"
        ) from None


def _weights_of(init: str, timm_name: str) -> SavedWeights:
    """The weights from a file, or from a folder with a model of this architecture."""
    folder = find_folder(init)
    if folder is None:
        return read_weights(Path(init))
    architecture = resolve(read_model_config(folder / CONFIG).architecture)[0].partition(".")[0]
    if architecture != timm_name.partition(".")[0]:
        raise BadInput(f"{init}: expected the weights of {timm_name}, got those of {architecture}")
    return read_weights(_weights_file(folder))


def _build_with(weights: SavedWeights, timm_name: str, arguments: dict[str, Any], other_classes: OtherClasses) -> Any:
    """The model with these weights.

    timm builds the model and calls its own loader, which is replaced by `load_weights` here. `load_weights` also
    applies timm's conversion of published checkpoints, but requires every weight to match, which timm's loader does
    not.
    """

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
    """Load weights into a model. All names and shapes must match, as stored or after timm's conversion.

    Raises:
        BadInput: names or shapes do not match; the model is unchanged.
    """
    own = model.state_dict()
    tensors = weights.of_model(own)
    if convert is not None and not _same_shapes(own, tensors):
        tensors = _convert(tensors, convert, model)
    classifier = model.pretrained_cfg.get("classifier") if other_classes != "refuse" else None
    for name in (classifier,) if isinstance(classifier, str) else classifier or ():
        tensors = _fit_classifier(model, tensors, name, weights.source, other_classes)
    own = model.state_dict()
    counters = {key for key in own.keys() - tensors.keys() if key.endswith("num_batches_tracked")}  # not in old files
    missing, unexpected = sorted(own.keys() - tensors.keys() - counters), sorted(tensors.keys() - own.keys())
    reshaped = [k for k in sorted(own.keys() & tensors.keys()) if own[k].shape != tensors[k].shape]
    if (missing or unexpected) and (family := family_of_weights(weights.names)):
        raise BadInput(f"{weights.source}: expected weights of a timm model, got {family}, which timm does not have")
    if missing or unexpected:
        raise BadInput(
            f"{weights.source}: does not match the model: missing {listed(missing)}, unexpected {listed(unexpected)}"
            f"; {_remedy(weights)}"
        )
    first = model.pretrained_cfg.get("first_conv")
    for name in (first,) if isinstance(first, str) else first or ():
        if (key := f"{name}.weight") in reshaped and tensors[key].ndim == 4:
            expected, got = own[key].shape[1], tensors[key].shape[1]
            if expected == CHANNELS != got:
                raise BadInput(channels_message(weights.source, got))
    if reshaped:
        key = reshaped[0]
        raise BadInput(
            f"{weights.source}: does not match the model: expected {key} {tuple(own[key].shape)}, got "
            f"{tuple(tensors[key].shape)} ({len(reshaped)} such tensors); {_remedy(weights)}"
        )
    model.load_state_dict({**tensors, **{key: own[key] for key in counters}})


def _remedy(weights: SavedWeights) -> str:
    found = f"the file is of {weights.architecture}, " if weights.architecture else ""
    return f"{found}check the architecture and number of classes"


def _same_shapes(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> bool:
    return own.keys() == tensors.keys() and all(own[key].shape == tensors[key].shape for key in own)


def _convert(tensors: dict[str, Tensor], convert: Callable[..., Any], model: nn.Module) -> dict[str, Tensor]:
    """Published weights, renamed, reshaped and resized by timm's function for this architecture, if it succeeds."""
    try:
        try:
            converted = convert(dict(tensors), model)
        except TypeError:  # older functions take only the weights
            converted = convert(dict(tensors))
    except Exception:  # it can fail in many ways for weights of another architecture
        return tensors
    is_valid = isinstance(converted, dict) and all(isinstance(v, Tensor) for v in converted.values())
    return converted if is_valid else tensors


def _fit_classifier(
    model: Any, tensors: dict[str, Tensor], name: str, source: str, other_classes: OtherClasses
) -> dict[str, Tensor]:
    """The weights with a classifier that matches the model; with "adopt", the model's classifier is changed instead."""
    own, keys = model.state_dict(), (f"{name}.weight", f"{name}.bias")
    weight = tensors.get(keys[0])
    if other_classes == "adopt":
        if weight is not None and weight.ndim > 0 and len(weight) != model.num_classes:
            model.reset_classifier(len(weight))
        return tensors
    if keys[0] not in own or (weight is not None and weight.shape[:1] == own[keys[0]].shape[:1]):
        return tensors
    if weight is None and keys[1] not in tensors:
        notice(f"{source}: contains no classifier {name}; it is initialised at random")
    fresh = nn.init.trunc_normal_(torch.empty_like(own[keys[0]]), std=0.02)
    zeros = {keys[1]: torch.zeros_like(own[keys[1]])} if keys[1] in own else {}
    return {**tensors, keys[0]: fresh, **zeros}


def find_folder(name: str) -> Path | None:
    """The folder of a model: FOLDER or local-dir:FOLDER, or hf-hub:OWNER/NAME after a download; None for other names.

    Raises:
        BadInput: there is no such folder, or the download failed.
    """
    source, _, place = name.partition(":")
    if source == "local-dir":
        if not Path(place).is_dir():
            raise BadInput(f"{name}: expected a folder with a model, but it does not exist")
        return Path(place)
    if source in ("hf-hub", "hf_hub"):
        return _fetch(name, place)
    return Path(name) if name and Path(name).is_dir() else None


def _fetch(name: str, place: str) -> Path:
    """Download config.json and the weights of a model from the hub into the hub's own cache; returns their folder."""
    try:
        config = _hub.download_from_hf(place, CONFIG)
        try:
            _hub.download_from_hf(place, FILES[0])
        except _hub.EntryNotFoundError:
            _hub.download_from_hf(place, FILES[1])
    except Exception as error:  # the hub and the network raise many types
        raise BadInput(
            f"could not get {name} ({first_line(error)}); without a network, give a folder with its files"
        ) from None
    return Path(config).parent


def _weights_file(folder: Path) -> Path:
    return next((folder / file for file in FILES if (folder / file).exists()), folder / FILES[0])


def open_model_folder(folder: Path) -> tuple[Any, ModelConfig]:
    """Open a model from a folder with config.json and model.safetensors, as `fastofa export` and timm write them.

    Raises:
        BadInput: one of the files is missing, they do not match each other, or config.json has impossible values.
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
        with torch.device("meta"):  # takes no memory, whatever the sizes
            check_arguments(config, type(timm.create_model(name)))
            skeleton = timm.create_model(name, **arguments)
        numbers = sum(t.numel() for part in (skeleton.parameters(), skeleton.buffers()) for t in part)
        if numbers > 2 * weights.numbers + SPARE:
            raise BadInput(
                f"{config.path}: expected a model of about {weights.numbers:,} numbers, as {weights.source} contains, "
                f"got one of {numbers:,}; restore the original files"
            )
        return _build_with(weights, name, arguments, "refuse"), config
    except BadInput:
        raise
    except Exception as error:  # impossible arguments can fail in many ways
        raise BadInput(f"{config.path}: could not build {name} from it: {first_line(error)}") from None


def check_channels(model: Any, what: str) -> None:
    """Raises BadInput unless the model's input is RGB."""
    channels = getattr(model, "in_chans", CHANNELS)
    if channels != CHANNELS:
        raise BadInput(channels_message(what, channels))


def input_size(model: Any) -> int:
    """Side in pixels of the images for which the model was made."""
    return int(model.pretrained_cfg["input_size"][-1])


def normalization(model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The model's own (mean, std) for pixels scaled to 0..1."""
    return tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])


def evaluation_view(name: str) -> tuple[float, Literal["bilinear", "bicubic"]]:
    """How timm evaluates a model (see `resolve`): the side of the central square, as a fraction of the image's shorter
    side, and the filter with which it is resized. Filters other than bilinear count as bicubic.

    Raises:
        BadInput: unknown model.
    """
    config = get_pretrained_cfg(resolve(name)[0])
    if config is None:
        return DEFAULT_CROP_PCT, "bicubic"
    crop = min(config.crop_pct or DEFAULT_CROP_PCT, 1.0)  # VOLO's 1.15 would exceed the image
    return crop, "bilinear" if config.interpolation == "bilinear" else "bicubic"


def weights_sha256(model: nn.Module) -> str:
    """sha256 of all tensors of the state_dict, independent of the file from which they were loaded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
