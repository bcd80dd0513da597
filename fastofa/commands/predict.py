"""Predict the classes of images without labels.

    fastofa predict run photos                          print the five most probable classes of each image
    fastofa predict student a.jpg b.png --topk 1        use an exported model, or one saved by timm
    fastofa predict run photos --csv predictions.csv    columns file, rank, class, probability

Folders are searched recursively; hidden files are skipped. Images that cannot be read are listed, and all others are
predicted. The command then exits with code 2, or with code 0 if --skip-corrupt is given.
"""

import csv
import io
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastofa.commands.arguments import PredictConfig
from fastofa.data.image_files import image_files
from fastofa.system.device import choose_workers
from fastofa.system.errors import counted, escaped
from fastofa.system.files import replacing
from fastofa.system.progress import notice, plain, track
from fastofa.training.predict_files import Prediction, UnreadableImages, open_classifier, predict_images

PRINTED, PRINTED_BESIDE_CSV = 1000, 10  # maximum number of images in the table
QUICK_S = 2  # the speed is reported if a command takes longer


def main(config: PredictConfig) -> None:
    c, began = config, time.monotonic()
    files = image_files(c.files)
    classifier = open_classifier(c.model, c.weights, c.device)
    predictions = predict_images(classifier, files, c.topk, c.batch_size, choose_workers(c.workers), c.skip_corrupt)
    printed: list[Prediction] = []
    most, done, unreadable = PRINTED if c.csv is None else PRINTED_BESIDE_CSV, 0, None
    with nullcontext() if c.csv is None else _csv(c.csv) as writer:
        try:
            for done, prediction in enumerate(track(predictions, len(files), "predict"), start=1):
                if done <= most:
                    printed.append(prediction)
                if writer is not None:
                    writer.writerows(_rows(prediction))
        except UnreadableImages as error:
            unreadable = error
    seconds = time.monotonic() - began
    if printed:
        _print(c.model, printed)
    if c.csv is not None:
        print(escaped(f"{c.csv}: predictions for {counted(done, 'image')}"))
    elif done > most:
        print(f"and {counted(done - most, 'more image')}; --csv FILE writes all")
    if seconds > QUICK_S:
        notice(f"predicted {counted(done, 'image')} in {seconds:,.1f} s, {done / seconds:,.0f} images/s")
    if unreadable:
        raise unreadable


@contextmanager
def _csv(path: Path) -> Iterator[Any]:
    """A CSV writer for a UTF-8 file that replaces an existing one only once it is complete."""
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("file", "rank", "class", "probability"))
        yield writer
        text.detach()


def _rows(prediction: Prediction) -> Iterable[tuple[object, ...]]:
    """Yield a row for each class, best first."""
    for rank, (name, share) in enumerate(zip(prediction.classes, prediction.probabilities, strict=True), start=1):
        yield prediction.file, rank, name, f"{share:.6g}"


def _print(model: str, predictions: list[Prediction]) -> None:
    table = Table(title=plain(f"predictions of {model}"), title_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("classes", overflow="fold")
    for p in predictions:
        classes = ", ".join(f"{name} {share:.1%}" for name, share in zip(p.classes, p.probabilities, strict=True))
        table.add_row(plain(str(p.file)), plain(classes))
    Console().print(table)
