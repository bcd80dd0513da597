"""Check the weights of several teachers."""

from collections.abc import Sequence

from fastofa.system.errors import BadInput

WEIGHTS_ERROR = 0.005  # .33 .33 .33 has a sum of .99: too far; .333 .333 .333 is accepted and rescaled


def checked_weights(weights: Sequence[float] | None, count: int, of: str) -> tuple[float, ...]:
    """The weights of `count` teachers, rescaled to a sum of 1; equal if None.

    Args:
        weights: as the user gave them.
        count: the number of teachers.
        of: what each weight belongs to, for a message.

    Raises:
        BadInput: there are more or fewer weights than teachers, one is not above 0, or their sum is not 1.
    """
    if weights is None:
        return (1 / count,) * count
    shown = " ".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise BadInput(f"teacher-weights: expected {count}, one per {of}, got {len(weights)} ({shown})")
    if not all(weight > 0 for weight in weights) or abs(sum(weights) - 1) > WEIGHTS_ERROR:
        raise BadInput(f"teacher-weights: expected numbers above 0 with a sum of 1, got {shown}")
    return tuple(weight / sum(weights) for weight in weights)
