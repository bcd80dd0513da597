"""The values of flags in a command line that is not parsed yet."""


def flag_value(argv: list[str], flag: str) -> str | None:
    """The flag's last value in the arguments, empty if it has no value; None if the flag is absent."""
    last = None
    for argument, following in zip(argv, [*argv, ""][1:], strict=True):
        name, equals, value = argument.partition("=")
        if name == flag:
            last = value if equals else "" if following.startswith("-") else following
    return last


def joined(argv: list[str], flag: str) -> list[str]:
    """The arguments with a repeated flag given once, with all its values: `--teacher a --teacher b` as `--teacher a b`.
    Of other flags, tyro takes the last."""
    values, others, taking = [], [], False
    for argument in argv:
        name, equals, value = argument.partition("=")
        taking = name == flag if argument.startswith("--") else taking
        if not taking:
            others.append(argument)
        elif argument != flag:
            values.append(value if equals and name == flag else argument)
    return [*others, flag, *values] if flag in (argument.partition("=")[0] for argument in argv) else argv
