"""A checkpoint is one safetensors file: student with exits, optimiser, EMA and position. No pickle.

    RUN/checkpoints/step-00001000.safetensors   student.NAME, ema.NAME, optimizer.PARAMETER.KEY; the newest few are kept
                                                ranks.student.NAME, ranks.ema.NAME: [ranks, ...], where the ranks differ
    RUN/checkpoints/best.safetensors            student.NAME: the weights of the best evaluation, with its figures
    RUN/checkpoints/best-ema.safetensors        the same of the moving average, where there is one

Random numbers need no state: every step has its own (see step.py).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastofa.runs.config import Weights
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors, save_tensors
from fastofa.system.progress import notice

FOLDER, BEST, BEST_EMA = "checkpoints", "best.safetensors", "best-ema.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """Those of a run, newest first."""
    return sorted((run / FOLDER).glob("step-*.safetensors"), reverse=True)


def save_checkpoint(
    run: Path,
    step: int,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None,
    position: dict[str, Any],
    keep: int,
    by_rank: dict[str, Tensor] | None = None,
) -> None:
    """Write everything that the next step depends on, atomically, and leave the newest `keep`. `position` is JSON.

    `by_rank` has under student.NAME or ema.NAME what each rank has, [ranks, ...]; their mean is saved, too.
    """
    tensors = {f"student.{name}": value for name, value in student.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    for name, each in (by_rank or {}).items():
        if bool((each != each[0]).any()):
            tensors |= {name: each.mean(0), f"ranks.{name}": each}
    scalars: dict[str, Any] = {}
    for key, value in _optimizer_state(student, optimizer):
        if isinstance(value, Tensor):
            tensors[f"optimizer.{key}"] = value
        else:
            scalars[key] = value
    path = run / FOLDER / f"step-{step:08d}.safetensors"
    save_tensors(path, tensors, {"step": step, "position": position, "optimizer": scalars})
    newest_first = checkpoints(run)
    place = newest_first.index(path)
    # Newer ones are of a future that did not come to be: the run went on from before them, since they were damaged.
    for superseded in newest_first[:place] + newest_first[place + keep :]:
        superseded.unlink(missing_ok=True)


def save_best(run: Path, student: nn.Module, info: dict[str, Any], file: str = BEST) -> None:
    """Keep the weights that were just evaluated as the best ones; `info` is JSON: step, top1 and more of them."""
    save_tensors(run / FOLDER / file, {f"student.{name}": value for name, value in student.state_dict().items()}, info)


def best_until(run: Path, step: int, file: str = BEST) -> float:
    """Top-1 of the best weights that are kept; -1 where there are none.

    Those of a later step than `step`, which a resumed run may not come by again, and damaged ones are removed.
    """
    path = run / FOLDER / file
    if not path.exists():
        return -1
    try:
        info = load_tensors(path)[1]
        if info["step"] <= step:
            return float(info["top1"])
    except (BadInput, KeyError, TypeError, ValueError) as error:
        notice(f"{path}: could not be read and is removed, the next evaluation's weights take its place ({error})")
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
    """Bring all of them back to the newest checkpoint that is whole; returns its step and position.

    What was saved by rank goes back to each rank of as many, else all get the mean. A damaged checkpoint is reported,
    and the one before it is used.

    Raises:
        BadInput: none is whole, or keys or shapes do not fit; nothing was changed then.
    """
    found = checkpoints(run)
    for path in found:
        try:
            tensors, info = load_tensors(path)
        except BadInput as error:
            if path == found[-1]:
                raise
            notice(f"{error}; going on from the checkpoint before it")
            continue
        each = _under("ranks.", tensors)
        tensors |= {name: value[rank] for name, value in each.items() if value.shape[:1] == (ranks,)}
        return _restore(path, tensors, info, student, optimizer, ema)
    raise BadInput(f"{run}: expected a checkpoint, found none")


def _restore(
    path: Path,
    tensors: dict[str, Tensor],
    info: dict[str, Any],
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None,
) -> tuple[int, dict[str, Any]]:
    if lacking := {"step", "position", "optimizer"} - info.keys():
        raise BadInput(f"{path}: expected what `fastofa train` saves, it lacks {', '.join(sorted(lacking))}")
    parts = {"student.": student.state_dict(), "ema.": {} if ema is None else ema.state_dict()}
    for prefix, own in parts.items():
        _check_keys(path, prefix, own, tensors)
    state = {**_under("optimizer.", tensors), **info["optimizer"]}
    _check_optimizer(path, student, optimizer, state)
    student.load_state_dict(_under("student.", tensors))
    if ema is not None:
        ema.load_state_dict(_under("ema.", tensors))
    _restore_optimizer(student, optimizer, state)
    return info["step"], info["position"]


def load_student(run: Path, student: nn.Module, weights: Weights = "last") -> dict[str, Any]:
    """Only the weights to evaluate or export; returns what their file says of itself.

    Args:
        weights: raw or ema, of the newest checkpoint; best-raw or best-ema, of the best evaluation; last: the average
            where there is one; best: what had the better top-1.

    Raises:
        BadInput: there is none, it is damaged, does not fit or is not finite.
    """
    path, prefix, tensors, info = _find(run, weights)
    for part in dict.fromkeys((prefix, "ema.", "student.")):
        if part == prefix or _under(part, tensors):
            _check_keys(path, part, student.state_dict(), tensors)
    found = _under(prefix, tensors)
    if odd := sorted(name for name, value in found.items() if not bool(value.isfinite().all())):
        raise BadInput(
            f"{path}: expected finite weights, these are not: {_some(odd)}; the run diverged, train anew with a lower "
            "--lr or --clip"
        )
    student.load_state_dict(found)
    return info


def _find(run: Path, weights: Weights) -> tuple[Path, str, dict[str, Tensor], dict[str, Any]]:
    """The file, the prefix of the names in it, its tensors and what it says of itself."""
    if weights in ("last", "raw", "ema"):
        newest = checkpoints(run)[:1]
        if not newest:
            raise BadInput(f"{run}: no checkpoint yet; run `fastofa train` with --resume until it saves one")
        tensors, info = load_tensors(newest[0])
        averaged = any(name.startswith("ema.") for name in tensors)
        if weights == "ema" and not averaged:
            raise BadInput(f"{run}: expected a moving average for --weights ema, the run has none; use --weights raw")
        return newest[0], "ema." if averaged and weights != "raw" else "student.", tensors, info
    files = {"best": (BEST_EMA, BEST), "best-ema": (BEST_EMA,), "best-raw": (BEST,)}[weights]
    found = [run / FOLDER / file for file in files if (run / FOLDER / file).exists()]
    if not found:
        other = "use --weights last, or train on with --resume"
        if weights == "best-ema" and (run / FOLDER / BEST).exists():
            raise BadInput(f"{run}: expected a moving average for --weights best-ema, the run has none; {other}")
        raise BadInput(f"{run}: no evaluation yet, so no best weights; {other}")
    opened = [(path, *load_tensors(path)) for path in found]
    path, tensors, info = max(opened, key=lambda file: float(file[2].get("top1", 0)))  # of equal ones the average
    return path, "student.", tensors, info


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _check_keys(path: Path, prefix: str, own: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    found = _under(prefix, tensors)
    missing, unexpected = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    reshaped = [k for k in sorted(own.keys() & found.keys()) if own[k].shape != found[k].shape]
    if missing or unexpected or reshaped:
        raise BadInput(
            f"{path}: does not fit this run's {prefix.rstrip('.')}: missing {_some(missing)}; unexpected "
            f"{_some(unexpected)}; of another shape {_some(reshaped)}; was config.json edited?"
        )


def _some(keys: list[str]) -> str:
    return "none" if not keys else ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _optimizer_state(student: nn.Module, optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Any]]:
    """(name, tensor or number) of all that the optimiser keeps between steps; learning rates follow from the step."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in student.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            yield f"{names[parameter]}.{key}", value
    for i, group in enumerate(optimizer.param_groups):
        if "step" in group:  # timm's LAMB counts in the group
            yield f"group{i}.step", group["step"]


def _check_optimizer(path: Path, student: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    own = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
    own |= {f"group{i}": () for i in range(len(optimizer.param_groups))}
    odd = []
    for key, value in state.items():
        shape = own.get(key.rpartition(".")[0])
        if shape is None or tuple(torch.as_tensor(value).shape) not in (shape, ()):
            odd.append(key)
    found = {(name, item) for name, _, item in (key.rpartition(".") for key in state) if not name.startswith("group")}
    names, items = {name for name, _ in found}, {item for _, item in found}
    odd += [f"{name}.{item} (missing)" for name in names & own.keys() for item in items if (name, item) not in found]
    if odd:
        raise BadInput(f"{path}: does not fit this run's optimizer: {_some(sorted(odd))}; was config.json edited?")


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
            # As the optimiser makes it: in the parameter's memory format, on which the last bit of a norm depends.
            place = torch.empty_like(parameters[name], dtype=value.dtype, requires_grad=False)
            optimizer.state[parameters[name]][item] = place.copy_(value)
        else:  # the step's number: fused optimisers want it where their parameter is
            device = parameters[name].device
            optimizer.state[parameters[name]][item] = value.to(device) if isinstance(value, Tensor) else value
