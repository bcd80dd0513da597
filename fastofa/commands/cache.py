"""Describe or verify a teacher cache.

    fastofa cache info cache
    fastofa cache verify cache

info prints how the cache was made. verify reads every finished table, compares its checksum and checks its values.
"""

from typing import Any

from rich import filesize
from rich.console import Console
from rich.table import Table

from fastofa.commands.arguments import CacheConfig
from fastofa.system.errors import counted, escaped
from fastofa.system.progress import plain
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.fidelity import in_rows, read_fidelity

MAX_CLASSES = 10  # class names to print


def info(cache: TeacherCache) -> dict[str, str]:
    """The properties of a cache by name, for a table."""
    header, policy = cache.header, cache.policy
    augmentation = {
        name: header["policy"].get(name) for name in ("bicubic", "auto_augment", "mixup", "cutmix", "erase", "repeats")
    }
    size = sum(file.stat().st_size for file in cache.path.iterdir())
    return {
        **_teachers(header),
        "data": f"{header['dataset']['spec']}, {counted(cache.num_samples, 'image')}, "
        f"{counted(cache.num_classes, 'class')}",
        "classes": _abbreviated(cache.classes),
        "predictions": f"top {cache.topk} of {cache.num_classes}"
        + ", chosen by --topk auto" * ("topk_chosen" in header),
        **_vectors(cache),
        **_fidelity(cache),
        "views": f"{cache.finished}{' are finished' * (cache.views < header['views'])}, seed {header['seed']}",
        "crops": "area {:g} to {:g}, ratio {:.3g} to {:.3g}".format(*policy.scale, *policy.ratio),
        "flip": f"{policy.flip:g}",
        **{name.replace("_", "-"): str(value) for name, value in augmentation.items() if value},
        "size": filesize.decimal(size),
        "pipeline": header["pipeline"],
        "made with": ", ".join(f"{name} {version}" for name, version in header["versions"].items()),
    }


def _teachers(header: dict[str, Any]) -> dict[str, str]:
    lines = ["{name} at {image_size} px, {precision}, weights {sha256:.12}".format(**t) for t in header["teachers"]]
    if len(lines) == 1:
        return {"teacher": lines[0]}
    shares = header["teacher_weights"]
    return {
        f"teacher {i}": f"{share:.3g} of {line}" for i, (share, line) in enumerate(zip(shares, lines, strict=True), 1)
    }


def _vectors(cache: TeacherCache) -> dict[str, str]:
    kinds = {"pooled": "float16", "pooled-int8": "int8 with a scale per image"}
    return {"vectors": f"{cache.pooled_dim} numbers, {kinds[cache.features]}"} if cache.pooled_dim else {}


def _fidelity(cache: TeacherCache) -> dict[str, str]:
    fidelity = read_fidelity(cache.path, cache.header)
    return {} if fidelity is None else in_rows(fidelity)


def _abbreviated(names: tuple[str, ...]) -> str:
    """All names if there are few, else the first ones and the last."""
    return ", ".join(names if len(names) <= MAX_CLASSES else (*names[: MAX_CLASSES - 1], "...", names[-1]))


def main(config: CacheConfig) -> None:
    cache = TeacherCache.open(config.cache)
    if config.action == "verify":
        cache.verify()
        views = f"{cache.finished} view{'s' * (cache.finished != '1')}"
        print(escaped(f"{config.cache}: {views} and the validation predictions match their checksums"))
        return
    table = Table(show_header=False, title=plain(str(config.cache)), title_justify="left")
    for name, value in info(cache).items():
        table.add_row(name, plain(value))
    Console().print(table)
