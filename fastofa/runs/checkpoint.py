"""Checkpoints: student with exits, optimiser, moving average and position in one safetensors file. No pickle.

    RUN/checkpoints/step-00001000.safetensors   student.NAME, ema.NAME, optimizer.PARAMETER.KEY; the newest few are kept
                                                ranks.student.NAME, ranks.ema.NAME: [ranks, ...], if the ranks differ
    RUN/checkpoints/best.safetensors            student.NAME: the weights of the best evaluation, with its accuracy
    RUN/checkpoints/best-ema.safetensors        the same for the moving average, if there is one

No random state is saved, since every step seeds its own random numbers (see step.py).
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastofa.runs.config import Weights
from fastofa.system.errors import BadInput, listed
from fastofa.system.files import load_tensors, save_tensors
from fastofa.system.progress import notice

Run = Callable[[Callable[[], None]], object]
"""Calls a function, now or later."""

FOLDER, BEST, BEST_EMA = "checkpoints", "best.safetensors", "best-ema.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """The step checkpoints of a run, newest first."""
    return sorted((run / FOLDER).glob("step-*.safetensors"), reverse=True)


def at_once(write: Callable[[], None]) -> None:
    write()


def save_checkpoint(
    run: Path,
    step: int,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None,
    position: dict[str, Any],
    keep: int,
    by_rank: dict[str, Tensor] | None = None,
    when: Run = at_once,
) -> None:
    """Write everything that the next step depends on, atomically, then delete all but the newest `keep` checkpoints.

    Args:
        position: progress within the log interval; JSON.
        by_rank: the ranks' own tensors, [ranks, ...], under student.NAME or ema.NAME; their mean is saved as well.
        when: calls the part that writes files, such as a `Writer`; the state is copied to host memory before.
    """
    tensors = {f"student.{name}": value for name, value in student.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    for name, values in (by_rank or {}).items():
        if bool((values != values[0]).any()):
            tensors |= {name: values.mean(0), f"ranks.{name}": values}
    scalars: dict[str, Any] = {}
    for key, value in _optimizer_state(student, optimizer):
        if isinstance(value, Tensor):
            tensors[f"optimizer.{key}"] = value
        else:
            scalars[key] = value
    info = {"step": step, "position": position, "optimizer": scalars}
    copies = _host_copies(tensors)
    when(lambda: _write_checkpoint(run, step, copies, info, keep))


def _host_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _write_checkpoint(run: Path, step: int, tensors: dict[str, Tensor], info: dict[str, Any], keep: int) -> None:
    path = run / FOLDER / f"step-{step:08d}.safetensors"
    save_tensors(path, tensors, info)
    newest_first = checkpoints(run)
    index = newest_first.index(path)
    # Newer checkpoints are stale: they were damaged, so the run resumed from an earlier one.
    for superseded in newest_first[:index] + newest_first[index + keep :]:
        superseded.unlink(missing_ok=True)


def save_best(run: Path, student: nn.Module, info: dict[str, Any], file: str = BEST, when: Run = at_once) -> None:
    """Save the weights that were just evaluated as the best; `info` is JSON with at least step and top1, `when` as in
    `save_checkpoint`."""
    copies = _host_copies({f"student.{name}": value for name, value in _own_state(student).items()})
    when(lambda: save_tensors(run / FOLDER / file, copies, info))


def best_top1(run: Path, step: int, file: str = BEST) -> float:
    """Return top-1 of the best weights saved up to `step`; -1 if there are none.

    Deletes damaged files, and weights of a later step, which a resumed run may not reach again.
    """
    path = run / FOLDER / file
    if not path.exists():
        return -1
    try:
        info = load_tensors(path)[1]
        if info["step"] <= step:
            return float(info["top1"])
    except (BadInput, KeyError, TypeError, ValueError) as error:
        notice(f"{path}: could not be read and is deleted; the next evaluation writes a new one ({error})")
    path.unlink(missing_ok=True)
    return -1


def load_newest(
    run: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None,
    rank: int = 0,
    ranks: int = 1,
) -> tuple[int, dict[str, Any]]:
    """Restore student, optimiser and moving average from the newest undamaged checkpoint.

    Tensors saved by rank are restored on each rank if the number of ranks is unchanged; otherwise all get the mean. A
    damaged checkpoint is reported and the one before it is used.

    Returns:
        The step and the position.

    Raises:
        BadInput: there is no undamaged checkpoint, or keys or shapes do not fit; nothing is changed.
    """
    paths = checkpoints(run)
    for path in paths:
        try:
            tensors, info = load_tensors(path)
        except BadInput as error:
            if path == paths[-1]:
                raise
            notice(f"{error}; resuming from the checkpoint before it")
            continue
        by_rank = _strip_prefix("ranks.", tensors)
        tensors |= {name: value[rank] for name, value in by_rank.items() if value.shape[:1] == (ranks,)}
        return _restore(path, tensors, info, student, optimizer, ema)
    raise BadInput(f"{run}: expected a checkpoint, found none; train from the beginning without --resume")


def _restore(
    path: Path,
    tensors: dict[str, Tensor],
    info: dict[str, Any],
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None,
) -> tuple[int, dict[str, Any]]:
    if missing := {"step", "position", "optimizer"} - info.keys():
        raise BadInput(
            f"{path}: expected a checkpoint of `fastofa train`, got one without {', '.join(sorted(missing))}"
        )
    tensors = _without_methods("ema.", tensors)  # earlier versions averaged the methods' modules, too
    parts = {"student.": student.state_dict(), "ema.": {} if ema is None else ema.state_dict()}
    for prefix, own in parts.items():
        _check_keys(path, prefix, own, tensors)
    state = {**_strip_prefix("optimizer.", tensors), **info["optimizer"]}
    _check_optimizer(path, student, optimizer, state)
    student.load_state_dict(_strip_prefix("student.", tensors))
    if ema is not None:
        ema.load_state_dict(_strip_prefix("ema.", tensors))
    _restore_optimizer(student, optimizer, state)
    return info["step"], info["position"]


def load_student(run: Path, student: nn.Module, weights: Weights = "last") -> dict[str, Any]:
    """Load only the weights, for evaluation or export; return the JSON object of their file.

    Args:
        weights: raw or ema: those of the newest checkpoint. best-raw or best-ema: those of the best evaluation. last:
            ema if there is a moving average, else raw. best: best-raw or best-ema, whichever has the higher top-1.

    Raises:
        BadInput: there are no such weights, or they are damaged, do not fit or are not finite.
    """
    path, prefix, tensors, info = _read_weights(run, weights)
    for part in dict.fromkeys((prefix, "ema.", "student.")):
        if part == prefix or _strip_prefix(part, tensors):
            _check_keys(path, part, _own_state(student), _without_methods(part, tensors))
    state = _strip_prefix(prefix, _without_methods(prefix, tensors))
    if infinite := sorted(name for name, value in state.items() if not bool(value.isfinite().all())):
        raise BadInput(
            f"{path}: expected finite weights, but these are not: {listed(infinite)}; the run diverged, train "
            "again with a lower --lr or --clip"
        )
    student.load_state_dict(state)
    return info


def _read_weights(run: Path, weights: Weights) -> tuple[Path, str, dict[str, Tensor], dict[str, Any]]:
    """The file that contains these weights, their prefix in it, its tensors and its JSON object."""
    if weights in ("last", "raw", "ema"):
        newest = checkpoints(run)[:1]
        if not newest:
            raise BadInput(
                f"{run}: expected a checkpoint, found none yet; run `fastofa train` with --resume until it saves one"
            )
        tensors, info = load_tensors(newest[0])
        averaged = any(name.startswith("ema.") for name in tensors)
        if weights == "ema" and not averaged:
            raise BadInput(
                f"{run}: expected a moving average for --weights ema, but the run has none; use --weights raw"
            )
        return newest[0], "ema." if averaged and weights != "raw" else "student.", tensors, info
    files = {"best": (BEST_EMA, BEST), "best-ema": (BEST_EMA,), "best-raw": (BEST,)}[weights]
    paths = [run / FOLDER / file for file in files if (run / FOLDER / file).exists()]
    if not paths:
        remedy = "use --weights last, or continue with --resume"
        if weights == "best-ema" and (run / FOLDER / BEST).exists():
            raise BadInput(f"{run}: expected a moving average for --weights best-ema, but the run has none; {remedy}")
        raise BadInput(f"{run}: expected best weights, found none before the first evaluation; {remedy}")
    opened = [(path, *load_tensors(path)) for path in paths]
    path, tensors, info = max(opened, key=lambda file: float(file[2].get("top1", 0)))  # the average if they are equal
    return path, "student.", tensors, info


def _own_state(student: nn.Module) -> dict[str, Tensor]:
    """The student's state without the modules of distillation methods."""
    return _without_methods("", student.state_dict())


def _without_methods(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith(f"{prefix}methods.")}


def _strip_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _check_keys(path: Path, prefix: str, own: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    saved = _strip_prefix(prefix, tensors)
    missing, unexpected = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    reshaped = [k for k in sorted(own.keys() & saved.keys()) if own[k].shape != saved[k].shape]
    if missing or unexpected or reshaped:
        raise BadInput(
            f"{path}: does not fit this run's {prefix.rstrip('.')}: missing {listed(missing)}; unexpected "
            f"{listed(unexpected)}; of another shape {listed(reshaped)}; was config.json edited?"
        )


def _optimizer_state(student: nn.Module, optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Any]]:
    """Name and value (tensor or number) of the optimiser's state; learning rates are computed from the step instead."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in student.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            yield f"{names[parameter]}.{key}", value
    for i, group in enumerate(optimizer.param_groups):
        if "step" in group:  # timm's LAMB keeps its step count in the group
            yield f"group{i}.step", group["step"]


def _check_optimizer(path: Path, student: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    own = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
    own |= {f"group{i}": () for i in range(len(optimizer.param_groups))}
    unfit = []
    for key, value in state.items():
        shape = own.get(key.rpartition(".")[0])
        if shape is None or tuple(torch.as_tensor(value).shape) not in (shape, ()):
            unfit.append(key)
    saved = {(name, item) for name, _, item in (key.rpartition(".") for key in state) if not name.startswith("group")}
    names, items = {name for name, _ in saved}, {item for _, item in saved}
    unfit += [f"{name}.{item} (missing)" for name in names & own.keys() for item in items if (name, item) not in saved]
    if unfit:
        raise BadInput(f"{path}: does not fit this run's optimizer: {listed(sorted(unfit))}; was config.json edited?")


def _restore_optimizer(student: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    parameters = dict(student.named_parameters())
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)
    for key, value in state.items():
        name, _, item = key.rpartition(".")
        if name not in parameters:
            optimizer.param_groups[int(name.removeprefix("group"))][item] = value
        elif isinstance(value, Tensor) and value.ndim:
            # Use the parameter's memory format, as the optimiser does: the last bit of a norm depends on it.
            tensor = torch.empty_like(parameters[name], dtype=value.dtype, requires_grad=False)
            optimizer.state[parameters[name]][item] = tensor.copy_(value)
        else:  # the step count, which fused optimisers need on the parameter's device
            device = parameters[name].device
            optimizer.state[parameters[name]][item] = value.to(device) if isinstance(value, Tensor) else value
