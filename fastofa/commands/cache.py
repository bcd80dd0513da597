"""Look at a teacher cache, or check it.

    fastofa cache info cache
    fastofa cache verify cache

info: what it was made from. verify: read every finished table, compare its checksum, check its values.
"""

from rich import filesize
from rich.console import Console
from rich.table import Table

from fastofa.commands.arguments import CacheConfig
from fastofa.system.errors import counted, escaped
from fastofa.system.progress import plain
from fastofa.teacher.cache import TeacherCache

SHOWN = 10  # names of classes


def info(cache: TeacherCache) -> dict[str, str]:
    """What a person asks of a cache."""
    header, policy = cache.header, cache.policy
    more = {name: header["policy"].get(name) for name in ("auto_augment", "mixup", "cutmix", "erase", "repeats")}
    size = sum(file.stat().st_size for file in cache.path.iterdir())
    (teacher,) = header["teachers"]
    return {
        "teacher": "{name} at {image_size} px, {precision}, weights {sha256:.12}".format(**teacher),
        "data": f"{header['dataset']['spec']}, {counted(cache.num_samples, 'image')}, "
        f"{counted(cache.num_classes, 'class')}",
        "classes": _some(cache.classes),
        "answers": f"top {cache.topk} of {cache.num_classes}",
        "views": f"{cache.finished}{' are finished' * (cache.views < header['views'])}, seed {header['seed']}",
        "crops": "area {:g} to {:g}, ratio {:.3g} to {:.3g}".format(*policy.scale, *policy.ratio),
        "flip": f"{policy.flip:g}",
        **{name.replace("_", "-"): str(value) for name, value in more.items() if value},
        "size": filesize.decimal(size),
        "pipeline": header["pipeline"],
        "made with": ", ".join(f"{name} {version}" for name, version in header["versions"].items()),
    }


def _some(names: tuple[str, ...]) -> str:
    """All of them where they are few."""
    return ", ".join(names if len(names) <= SHOWN else (*names[: SHOWN - 1], "...", names[-1]))


def main(config: CacheConfig) -> None:
    cache = TeacherCache.open(config.cache)
    if config.action == "verify":
        cache.verify()
        views = f"{cache.finished} view{'s' * (cache.finished != '1')}"
        print(escaped(f"{config.cache}: {views} and the validation answers are as they were written"))
        return
    table = Table(show_header=False, title=plain(str(config.cache)), title_justify="left")
    for name, value in info(cache).items():
        table.add_row(name, plain(value))
    Console().print(table)
