"""What a user sees when something he gave does not fit."""


class BadInput(ValueError):
    """One clear line: what was expected, what came, what to do. Commands print it and exit with code 2."""
