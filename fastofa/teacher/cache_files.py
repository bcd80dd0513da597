"""The files of a teacher cache: for each view, the view table and the teacher's top-K predictions for every sample.

    CACHE/cache.json                the header: dataset, teacher, view policy, and the planned number of views
    CACHE/view-00000.safetensors    the columns of `Views` (crop uint16 [N, 4], and the others that the policy draws; a
                                    bool column such as flip as bits, uint8 [N / 8, rounded up])
                                    predictions uint8 [N, R]: packed rows (packed_rows.py) of the K best classes and
                                    their log-probabilities at temperature 1; or, if K = C, classes uint16 or int32
                                    [N, K], best first, and log_probs float16 [N, K]
                                    with --features also pooled float16 [N, D], the input of the teacher's classifier,
                                    or pooled int8 [N, D] with pooled_scale float32 [N]
                                    with --keep-each, the predictions of teacher t are in columns of their own:
                                    predictions_t, or classes_t and log_probs_t, from t = 1 on
    CACHE/classifier.safetensors    only with --features: weight float32 [C, D] and bias float32 [C]
    CACHE/val.safetensors           the same predictions of the validation images, on the teacher's own centre crops
    CACHE/seen.png                  a few images of view 0 as the teacher saw them (reference_images.py)
    CACHE/part-....safetensors      only while `fastofa precompute` runs, or after an interruption: predictions for some
                                    rows of an unfinished table (parts.py)

Views are stored as parameters, not as seeds, so that a cache replays exactly even if a library changes its random
numbers. No file is a pickle. A cache of schema 3 packs nothing; it is read, and continued in its own form.

Shapes: N samples, C classes, K classes kept, R bytes of a packed row, D width of the teacher's pooled vector.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors, save_tensors
from fastofa.teacher.cache_columns import packed_columns, rounded_columns
from fastofa.teacher.cache_header import AGAIN, SCHEMA, identity

VAL, CLASSIFIER = "val.safetensors", "classifier.safetensors"


def view_file(view: int) -> str:
    return f"view-{view:05d}.safetensors"


def views_in(path: Path, header: dict[str, Any]) -> list[int]:
    """The numbers of the views whose files exist, in ascending order."""
    return [view for view in range(header["views"]) if (path / view_file(view)).is_file()]


def write_table(path: Path, tensors: dict[str, Tensor], header: dict[str, Any], table: int | str) -> None:
    """Write the table of a view (`table` is its number) or another table; the file records the cache's identity.

    Args:
        tensors: columns as `as_stored` returns them. Finished predictions are packed, unless the cache has schema 3.
    """
    if isinstance(table, int) or table == VAL:
        packs = header.get("schema", SCHEMA) == SCHEMA
        tensors = packed_columns(tensors, header) if packs else rounded_columns(tensors)
    save_tensors(path, tensors, {"table": table, "cache": identity(header)})


def read_table(path: Path, header: dict[str, Any], table: int | str) -> dict[str, Tensor]:
    """Read a table. Raises BadInput if it is missing, truncated, edited, or from another cache."""
    tensors, info = load_tensors(path)
    check_origin(path, info, header, table)
    return tensors


def check_origin(path: Path | str, info: dict[str, Any], header: dict[str, Any], table: int | str) -> None:
    """Raises BadInput unless the metadata of a file (`info`) name this table of this cache."""
    if info != {"table": table, "cache": identity(header)}:
        expected = f"view {table}" if isinstance(table, int) else table
        raise BadInput(
            f"{path}: expected {expected} of this cache, got a table of another view or another cache; delete it, and "
            f"{AGAIN}"
        )
