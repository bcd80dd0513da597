"""Refuse URLs where a flag expects a path on this machine."""

from itertools import pairwise

from fastofa.system.urls import is_url, refuse_url

# Flags that accept URLs; `cache push` and `cache pull` check their own.
URLS = {("train", "cache"), *((command, "data") for command in ("train", "precompute", "evaluate", "cka"))}


def takes_url(command: str, name: str, value: str) -> bool:
    """Whether the value is a URL, and not only contains one, as cifar100:URL, and the flag accepts URLs."""
    return is_url(value) and (command, name) in URLS


def refuse_urls(command: str, argv: list[str]) -> None:
    """Raises BadInput for a URL among the arguments of a flag that does not accept one."""
    for previous, argument in pairwise(["", *argv]):
        flag, _, value = argument.partition("=") if argument.startswith("-") else (previous, "", argument)
        name = flag.lstrip("-") if flag.startswith("-") else ""
        if command != "cache" and not takes_url(command, name, value):
            refuse_url(name, argument)
