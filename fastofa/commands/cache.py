"""Describe, verify, join, compare or copy teacher caches.

    fastofa cache info cache        print how the cache was made
    fastofa cache verify cache      read every finished table, compare its checksum and check its values
    fastofa cache merge part-a part-b --out cache       join views that were computed separately
    fastofa cache extend cache part-b       add the views of part-b to the cache
    fastofa cache diff cache-a cache-b      print how the caches differ, and how far their predictions agree
    fastofa cache push cache s3://bucket/cache      copy the cache to an object store
    fastofa cache pull https://host/cache cache     copy the cache from an object store or a web server

Parts of a cache are made by `fastofa precompute --first-view`.
"""

from pathlib import Path
from typing import Any

from rich import filesize
from rich.console import Console
from rich.table import Table

from fastofa.commands.arguments import CacheConfig
from fastofa.system.errors import counted, escaped
from fastofa.system.files import write_json
from fastofa.system.progress import notice, plain
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_header import FieldDifference
from fastofa.teacher.compare_caches import compare
from fastofa.teacher.fidelity import in_rows, read_fidelity
from fastofa.teacher.merge import gaps, merge
from fastofa.teacher.push_pull import pull, push

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
        + ", of each teacher" * cache.keeps_each
        + ", chosen by --topk auto" * ("topk_chosen" in header),
        **_vectors(cache),
        **_fidelity(cache),
        "views": f"{cache.finished}{' are finished' * (' of ' in cache.finished)}"
        f"{f' from view {cache.first} on' * (cache.first > 0)}, seed {header['seed']}",
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


def _print_info(config: CacheConfig) -> None:
    cache = TeacherCache.open(config.caches[0], part=True)
    table = Table(show_header=False, title=plain(str(cache.path)), title_justify="left")
    for name, value in info(cache).items():
        table.add_row(name, plain(value))
    Console().print(table)


def _verify(config: CacheConfig) -> None:
    cache = TeacherCache.open(config.caches[0], part=True)
    cache.verify()
    print(escaped(f"{cache.path}: {cache.finished_views} and the validation predictions match their checksums"))


def _merge(config: CacheConfig) -> None:
    out = config.out or Path(config.caches[0])
    parts = [Path(cache) for cache in config.caches if Path(cache) != out]
    cache = merge(parts, out)
    if missing := gaps(cache):
        notice(f"{missing}; students replay the views before it until it is computed")
    print(escaped(f"{cache.path}: {cache.finished_views} of {counted(cache.num_samples, 'image')}"))


def _diff(config: CacheConfig) -> None:
    a, b = (TeacherCache.open(cache, part=True) for cache in config.caches)
    result = compare(a, b)
    if config.json is not None:
        write_json(config.json, {"a": str(a.path), "b": str(b.path), **result.to_json()})
    for name, cache in (("a", a), ("b", b)):
        print(escaped(f"{name}: {cache.path}, {cache.finished_views}"))
    _print_fields("differences on which predictions depend", result.identity)
    _print_fields("other differences", result.made)
    rows = {f"view {view}": each for view, each in result.views.items()}
    rows |= {} if result.validation is None else {"validation images": result.validation}
    if rows:
        print("predictions of b, compared with those of a:")
        table = Table()
        for name in ("", "same best class", "mean KL", "largest KL"):
            table.add_column(name, justify="left" if not name else "right")
        for name, each in rows.items():
            table.add_row(name, f"{each.top1:.2%}", f"{each.kl:.2e}", f"{each.worst_kl:.2e}")
        Console().print(table)
    else:
        print("no predictions to compare: the classes or the images differ")


def _push(config: CacheConfig) -> None:
    path, url = config.caches
    cache = push(Path(path), url)
    print(escaped(f"{url}: {cache.finished_views} and the validation predictions of {path}"))


def _pull(config: CacheConfig) -> None:
    url, path = config.caches
    cache = pull(url, Path(path))
    print(escaped(f"{path}: {cache.finished_views} and the validation predictions of {url}"))


def _print_fields(title: str, different: list[FieldDifference]) -> None:
    if different:
        print(f"{title}:")
        table = Table("", "a", "b")
        for name, a, b in different:
            table.add_row(plain(name), plain(a), plain(b))
        Console().print(table)
    else:
        print(f"{title}: none")


def main(config: CacheConfig) -> None:
    actions = {"info": _print_info, "verify": _verify, "merge": _merge, "extend": _merge, "diff": _diff}
    actions |= {"push": _push, "pull": _pull}
    actions[config.action](config)
