"""Kill commands at random moments: does each end, leave no process behind, and reach the same result when rerun?

    python -m bench.kills --count 60
    python -m bench.kills --count 10 --only precompute torchrun --seed 1
    python -m bench.kills --count 20 --only precompute-4 --lose-node

SIGINT, SIGTERM and SIGKILL are sent to `train`, `precompute`, `write`, `evaluate`, a `torchrun train` of two ranks and
a `torchrun precompute` of four, between their start and their end: to the process itself, to its whole group as a
terminal or a cluster does, or to one of its decoding processes or ranks. Then the same command runs again (`train` with
--resume) and is sometimes killed once more. It prints a line for each kill and a table. With --lose-node, two torchruns
of two ranks each, as on two nodes, make a cache. All processes of the second are killed; then it starts again. The exit
code is 1 if a command

- hung: it was still running 20 s after the signal,
- left processes behind: they were still running 20 s after its end,
- showed a traceback, or
- reached a different result than an undisturbed run.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from torchvision.io import write_png

from bench.lib import command_line
from bench.lib.record import markdown_table
from fastofa.data.open import open_dataset
from fastofa.system.files import load_tensors

ROOT, BIN = Path(__file__).parent.parent, Path(sys.executable).parent
PATIENCE_S = 20.0
MARK = "FASTOFA_KILLS"  # in the environment of every process that a command starts
SPEEDS = {"images_per_second", "loader_share", "epoch_seconds", "eval_seconds"}
TRAIN = (
    "train --recipe digits --data images --cache cache --student test_resnet --epochs 3 --batch-size 20 --workers 2 "
    "--pipeline torchvision --log-every 4 --checkpoint-every 3 --ema 0.9"
)
PRECOMPUTE = "precompute --data images --teacher teacher --topk 5 --batch-size 20"
TABLES = "*.safetensors", "*.png"


# --- Commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    name: str
    line: str
    """Arguments of `fastofa`, with OUT for its output."""
    again: str
    """Arguments that are added when the command runs again on the same output."""
    result: Callable[[Path], str]
    """A function that returns the sha256 of the result."""
    source: str = ""
    """The folder that is copied to the output before the start; "" for a new output."""
    ranks: int = 1

    def argv(self, out: Path, again: bool) -> list[str]:
        words = [str(out) if word == "OUT" else word for word in f"{self.line} {self.again if again else ''}".split()]
        if self.ranks == 1:
            return [str(BIN / "fastofa"), *words]
        meet = ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
        ranks = ["--no-python", "--nproc-per-node", str(self.ranks), "--max-restarts", "0", *meet]
        return [str(BIN / "torchrun"), *ranks, str(BIN / "fastofa"), *words]


def trained(run: Path) -> str:
    """Digest of the last weights, average and optimiser state, the best weights, and the log without speeds."""
    digest = hashlib.sha256()
    for file in (max((run / "checkpoints").glob("step-*.safetensors")), run / "checkpoints" / "best.safetensors"):
        tensors, _ = load_tensors(file)
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        digest.update(repr(sorted((k, v) for k, v in json.loads(line).items() if k not in SPEEDS)).encode())
    return digest.hexdigest()


def files(*patterns: str) -> Callable[[Path], str]:
    """Digest of the files that match the patterns, in a folder or beside a file."""

    def result(out: Path) -> str:
        digest = hashlib.sha256()
        for pattern in patterns:
            found = sorted(out.glob(pattern) if out.is_dir() else out.parent.glob(f"{out.stem}{pattern}"))
            assert found, f"{out}: expected {pattern}, found none"
            for file in found:
                digest.update(file.name.replace(out.stem, "").encode() + file.read_bytes())
        return digest.hexdigest()

    return result


COMMANDS = (
    Command("train", f"{TRAIN} --out OUT", "--resume", trained),
    Command("precompute", f"{PRECOMPUTE} --views 4 --workers 2 --out OUT", "", files(*TABLES)),
    Command("write", "write images OUT --max-size 48 --workers 2", "", files(".beton", ".val.beton")),
    Command("evaluate", "evaluate OUT --data images --batch-size 20 --workers 2", "", files("evaluation.json"), "run"),
    Command("torchrun", f"{TRAIN} --out OUT", "--resume", trained, ranks=2),
    Command("precompute-4", f"{PRECOMPUTE} --views 12 --workers 0 --out OUT", "", files(*TABLES), ranks=4),
)


def prepare(folder: Path) -> None:
    """Create the commands' input: 200 images for training, 100 for validation, a teacher, its cache and a run."""
    for split, count in (("train", 200), ("val", 100)):
        dataset = open_dataset("digits:200", split)
        step = len(dataset) // count
        for i in range(0, count * step, step):
            place = folder / "images" / split / dataset.classes[dataset.labels[i]]
            place.mkdir(parents=True, exist_ok=True)
            write_png(dataset.read(i).repeat_interleave(8, 1).repeat_interleave(8, 2), str(place / f"{i:04d}.png"))
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=10)
    torch.nn.init.normal_(model.get_classifier().weight)
    save_for_hf(model, str(folder / "teacher"), safe_serialization=True, data_config={"input_size": (3, 64, 64)})
    for line in (COMMANDS[1].line.replace("OUT", "cache"), f"{TRAIN} --out run"):
        done = subprocess.run([BIN / "fastofa", *line.split()], cwd=folder, env=_environment("0"), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()


# --- Processes --------------------------------------------------------------------------------------------------------


def _environment(mark: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    single = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, "PYTHONPATH": path, **single, MARK: mark}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Started:
    """A running command; finds every process that it and its children started."""

    def __init__(self, argv: list[str], folder: Path, mark: str, environment: dict[str, str] | None = None) -> None:
        self.mark, self.log = mark, folder / f"{mark}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                argv, cwd=folder, env=_environment(mark) | (environment or {}), stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def processes(self) -> list[int]:
        """All running processes, without zombies."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}\0".encode() in (place / "environ").read_bytes() + b"\0":
                    state = (place / "stat").read_text().rpartition(")")[2].split()[0]
                    found += [int(place.name)] if state not in "ZX" else []
            except OSError:  # it has ended, or belongs to another user
                continue
        return sorted(found)

    def ended(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def remove(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


# --- Kills ------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """The counts of a command."""

    kills: int = 0
    slowest_s: float = 0.0
    hung: int = 0
    left: int = 0
    tracebacks: int = 0
    finished: int = 0
    other: int = 0
    faults: list[str] = field(default_factory=list)

    def row(self, name: str) -> list[str]:
        numbers = (self.kills, self.hung, self.left, self.tracebacks, self.finished, self.other)
        return [name, *map(str, numbers), f"{self.slowest_s:.1f}"]


HEADER = ["command", "kills", "hung", "left processes", "tracebacks", "finished after", "other result", "slowest end s"]


def strike(started: Started, command: Command, rng: random.Random) -> str | None:
    """Send a signal. Returns the signal and its target, or None if the command had ended."""
    signum = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    main = started.process.pid
    others = [pid for pid in started.processes() if pid != main]
    # SIGKILL to torchrun itself would leave the ranks without a parent that ends them.
    targets = ["group"] if signum != signal.SIGKILL else ["another"]
    targets += ["process"] if command.ranks == 1 or signum != signal.SIGKILL else []
    target = rng.choice(targets)
    if target == "another" and not others:
        target, signum = "process", signal.SIGTERM if command.ranks > 1 else signum
    if started.process.poll() is not None:
        return None
    try:
        if target == "group":
            os.killpg(main, signum)
        else:
            os.kill(rng.choice(others) if target == "another" else main, signum)
    except ProcessLookupError:
        return None
    whom = {"group": "its group", "process": "the process", "another": "one of its processes"}[target]
    return f"{signal.Signals(signum).name} to {whom}"


def kill_once(started: Started, command: Command, seconds: float, rng: random.Random, tally: Tally) -> str | None:
    """Kill a command at a random moment of its undisturbed run time. Returns what happened, or None if it had ended."""
    moment = rng.uniform(rng.choice([0.02, 0.6]), 1) * seconds  # half of them after the imports
    if started.ended(moment) or (said := strike(started, command, rng)) is None:
        return None
    struck = time.monotonic()
    tally.kills += 1
    faults = []
    if not started.ended(PATIENCE_S):
        faults.append("hung")
        tally.hung += 1
    took = time.monotonic() - struck
    tally.slowest_s = max(tally.slowest_s, took)
    while (left := started.processes()) and time.monotonic() - struck - took < PATIENCE_S and not faults:
        time.sleep(0.1)
    if left and not faults:
        faults.append(f"left {len(left)} processes")
        tally.left += 1
    started.remove()
    if command.ranks == 1 and "Traceback" in started.log.read_text():  # torchrun shows its own
        faults.append("showed a traceback")
        tally.tracebacks += 1
    line = f"{said} after {moment:.1f} s: ended in {took:.1f} s with {started.process.returncode}"
    if faults:
        tail = started.log.read_text()[-1000:]
        tally.faults.append(f"{command.name}, {line}: {', '.join(faults)}\n{tail}")
    return line + (f": {', '.join(faults)}".upper() if faults else "")


def run(command: Command, folder: Path, number: int, count: int, rng: random.Random, tally: Tally, known: dict) -> None:
    """Kill a command once or more, then finish it and compare its output with the undisturbed result."""
    suffix = ".beton" if command.name == "write" else ""
    out = folder / f"{command.name}-{number}{suffix}"
    if command.source:
        shutil.copytree(folder / command.source, out)
    turn, kill = 0, True
    while True:
        started = Started(command.argv(out, turn > 0 and out.exists()), folder, f"{os.getpid()}-{number}-{turn}")
        turn += 1
        kill = kill and tally.kills < count
        line = kill_once(started, command, known[command.name][1], rng, tally) if kill else None
        if line:
            print(f"{command.name:12} {line}", flush=True)
            kill = rng.random() < 0.3
        # `write` renames its output when it is complete, and then does not write it again.
        is_written = command.name == "write" and out.exists()
        if line and not is_written and started.process.returncode != 0:
            continue
        if is_written or (started.ended(60 * PATIENCE_S) and started.process.returncode == 0):
            tally.finished += 1
            if command.result(out) != known[command.name][0]:
                tally.other += 1
                tally.faults.append(f"{command.name}: expected the result of an undisturbed run in {out}, got another")
        else:
            tally.other += 1
            tail = started.log.read_text()[-300:]
            tally.faults.append(
                f"{command.name}: rerun, expected exit code 0, got {started.process.returncode}: {tail}"
            )
        started.remove()
        shutil.rmtree(out, ignore_errors=True) if out.is_dir() else None
        return


def lose_node(folder: Path, rng: random.Random) -> list[str]:
    """Kill one of two nodes that make a cache, then start it again. Returns the faults."""
    line = f"{PRECOMPUTE} --views 100 --workers 0 --out OUT"
    result, seconds = undisturbed(Command("nodes", line, "", files(*TABLES), ranks=4), folder)
    out, endpoint = folder / "nodes", f"127.0.0.1:{_free_port()}"

    def start(node: int, turn: int) -> Started:
        conf = f"is_host={int(node == 0)},join_timeout=600,last_call_timeout=2"
        words = [
            *(str(BIN / "torchrun"), "--no-python", "--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "5"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "kills", "--rdzv-conf", conf),
            *("--local-addr", "127.0.0.1", str(BIN / "fastofa")),
            *(str(out) if word == "OUT" else word for word in line.split()),
        ]
        # A rank would look for rank 0 at its former address in torchrun's own store.
        return Started(words, folder, f"{os.getpid()}-node{node}-{turn}", {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})

    def ended(node: Started) -> int | None:
        return node.process.returncode if node.ended(30 * PATIENCE_S) else None

    nodes = [start(0, 0), start(1, 0)]
    moment = rng.uniform(0.6, 0.9) * seconds
    time.sleep(moment)
    made = len(list(out.glob("view-*")))
    nodes[1].remove()
    time.sleep(1)
    nodes[1] = start(1, 1)
    codes = [ended(node) for node in nodes]
    for node in nodes:
        node.remove()
    print(f"node lost after {moment:.1f} s with {made} views made; exit codes {codes}", flush=True)
    logs = "".join(node.log.read_text()[-2000:] for node in nodes)
    if codes[0] != 0:
        return [f"nodes: expected exit code 0 of the first node, got {codes[0]}\n{logs}"]
    return (
        []
        if files(*TABLES)(out) == result
        else [f"nodes: expected the result of an undisturbed run, got another\n{logs}"]
    )


def undisturbed(command: Command, folder: Path) -> tuple[str, float]:
    """The result of an undisturbed run, and the seconds that it takes."""
    out = folder / f"{command.name}-undisturbed{'.beton' if command.name == 'write' else ''}"
    if command.source:
        shutil.copytree(folder / command.source, out)
    began = time.monotonic()
    started = Started(command.argv(out, False), folder, f"{os.getpid()}-{command.name}")
    code = started.process.wait()
    assert code == 0, started.log.read_text()
    seconds = time.monotonic() - began
    print(f"{command.name:12} undisturbed: {seconds:.1f} s", flush=True)
    return command.result(out), seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line.parser(__doc__, out=None)
    parser.add_argument("--count", type=int, default=60, help="total number of kills")
    parser.add_argument(
        "--only", nargs="+", choices=[c.name for c in COMMANDS], help="commands to kill; by default all"
    )
    parser.add_argument("--lose-node", action="store_true", help="also kill one of two nodes that make a cache")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # commands would inherit an ignored SIGINT
    chosen = [c for c in COMMANDS if not args.only or c.name in args.only]
    tallies = {c.name: Tally() for c in chosen}
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        folder = Path(place)
        prepare(folder)
        known = {c.name: undisturbed(c, folder) for c in chosen}
        for number, command in enumerate(chosen):
            count = args.count // len(chosen) + (number < args.count % len(chosen))
            rng, attempt = random.Random(f"{args.seed} {command.name}"), 0
            while tallies[command.name].kills < count:
                run(command, folder, attempt, count, rng, tallies[command.name], known)
                attempt += 1
        lost = lose_node(folder, random.Random(args.seed)) if args.lose_node else []
    print(f"\n{markdown_table(HEADER, [tally.row(name) for name, tally in tallies.items()])}")
    faults = [fault for tally in tallies.values() for fault in tally.faults] + lost
    print("".join(f"\n{fault}" for fault in faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
