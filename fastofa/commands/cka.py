"""Compare the layers of two networks by centred kernel alignment (CKA) of their features.

    fastofa cka --a teacher --b run --data photos                   two folders; of a run, also its student's exits
    fastofa cka --a swin_tiny_patch4_window7_224.ms_in1k --b resnet18.a1_in1k --data /data/imagenet
    fastofa cka --a run --b run --data photos --no-exits            a network with itself: 1 on the diagonal

CKA is 1 for features that agree up to a rotation and a common scale, and about 0 for unrelated features; the numbers of
channels and positions may differ. Both networks see the same validation images, each with its own normalisation, input
size and central crop. The layers are every block, the exits of a run's student, and the logits.

Prints the mean CKA by stages, writes the CKA of every pair of layers to OUT/cka.json, and draws it in OUT/cka.png. The
estimate is unbiased for any batch size and takes one pass; its memory does not depend on the number of images. More
images make it more precise; larger batches do, too, but take more memory and time per image.
"""

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastofa.commands.arguments import CkaConfig
from fastofa.reports.heat_map import draw_heat_map
from fastofa.system.errors import counted, escaped
from fastofa.system.files import write_json
from fastofa.system.progress import notice, plain
from fastofa.training.compare_networks import Comparison, Network, compare_networks


def main(config: CkaConfig) -> None:
    c = config
    comparison = compare_networks(c.a, c.b, c.data, c.images, c.batch_size, c.exits, c.device, c.precision, c.workers)
    for layer in comparison.undefined:
        notice(f"{layer}: its features are the same for every image, so that its CKA is undefined")
    write_json(c.out / "cka.json", comparison.to_json())
    _draw(comparison, c)
    _print(comparison)
    images, seconds = comparison.images, comparison.seconds
    notice(f"compared on {counted(images, 'image')} in {seconds:,.1f} s, {images / seconds:,.0f} images/s")
    print(escaped(f"{c.out / 'cka.json'}: every pair of layers"))
    print(escaped(f"{c.out / 'cka.png'}: the same as a heat map"))


def _draw(comparison: Comparison, config: CkaConfig) -> None:
    networks = (comparison.a, comparison.b)
    names = tuple([layer.name for layer in network.layers] for network in networks)
    title = f"CKA on {counted(comparison.images, 'image')} of {comparison.data}"
    draw_heat_map(
        comparison.cka,
        (names[0], names[1]),
        (config.a, config.b),
        (_part_starts(comparison.a), _part_starts(comparison.b)),
        escaped(title),
        config.out / "cka.png",
    )


def _part_starts(network: Network) -> list[int]:
    """The layers with which a new part of the network begins, except the first; all exits count as one part."""
    parts = [layer.part.replace("exit", "stage exit").split()[:2] for layer in network.layers]
    return [i for i in range(1, len(parts)) if parts[i] != parts[i - 1]]


def _print(comparison: Comparison) -> None:
    rows, columns, means = comparison.by_parts()
    title = f"mean CKA of the layers of {comparison.a.name} (rows) and {comparison.b.name} (columns)"
    table = Table(title=plain(title), title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, show_edge=False)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for name, values in zip(rows, means, strict=True):
        table.add_row(name, *("-" if np.isnan(value) else f"{value:.2f}" for value in values))
    Console().print(table)
