"""What a user sees when something he gave does not fit."""


class BadInput(Exception):
    """One clear line: what was expected, what came, what to do. Commands print it and exit with code 2.

    No ValueError, which tyro would catch from a configuration and print in a box.
    """
