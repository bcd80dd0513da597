"""What ends a command with one line instead of a traceback."""


class BadInput(Exception):
    """One clear line: what was expected, what came, what to do. Commands print it and exit with code 2.

    No ValueError, which tyro would catch from a configuration and print in a box.
    """


class LostContact(Exception):
    """Another rank is gone; nothing more can be computed together. Commands print it and exit with code 1."""
