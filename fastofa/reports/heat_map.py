"""Draw a matrix with a named row and column for each layer of two networks."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fastofa.system.files import write_atomic

CELL, MARGIN = 0.3, 2.2  # inches
MOST_VALUES = 16  # maximum number of layers per network for which the cells show their values
DARK = 0.6  # below this value, text on a cell is white


def draw_heat_map(
    matrix: np.ndarray,
    names: tuple[Sequence[str], Sequence[str]],
    titles: tuple[str, str],
    ends: tuple[Sequence[int], Sequence[int]],
    title: str,
    path: Path,
) -> None:
    """Draw a matrix of values from 0 to 1 as a PNG. The first row is at the bottom; cells with NaN are grey.

    Args:
        matrix: float [L, M].
        names: names of the L rows and of the M columns.
        titles: titles of both axes.
        ends: numbers of the rows and of the columns before which a line is drawn.
        title: above the heat map.
        path: the file.
    """
    rows, columns = matrix.shape
    cell = CELL * 1.35 if max(rows, columns) <= MOST_VALUES else CELL
    figure = Figure(figsize=(max(cell * columns, 2) + MARGIN + 0.6, max(cell * rows, 2) + MARGIN), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.7")
    image = axes.imshow(matrix, cmap="magma", vmin=0, vmax=1, origin="lower", interpolation="nearest")
    axes.set_xticks(range(columns), names[1], rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(rows), names[0], fontsize=8, parse_math=False)
    axes.tick_params(length=2)
    axes.set_ylabel(titles[0], parse_math=False)
    axes.set_xlabel(titles[1], parse_math=False)
    axes.set_title(title, fontsize=10, parse_math=False)
    for end in ends[0]:
        axes.axhline(end - 0.5, color="0.5", linewidth=1.5)
    for end in ends[1]:
        axes.axvline(end - 0.5, color="0.5", linewidth=1.5)
    if max(rows, columns) <= MOST_VALUES:
        for (row, column), value in np.ndenumerate(matrix):
            colour = "white" if value < DARK else "black"
            text = "-" if np.isnan(value) else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label="CKA", fraction=0.05, pad=0.02)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png", bbox_inches="tight")
    write_atomic(path, buffer.getvalue())
