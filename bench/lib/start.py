"""Time the start of a training step in a new process: cold, with an empty compiler cache, then warm, with a full one.

The seconds count from building the student to the end of its first step, without imports.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from bench.lib.steps import Job, StepOptions, our_step
from bench.lib.timing import wait


def start_seconds(job: Job, options: StepOptions) -> dict[str, float]:
    """{"cold": seconds, "warm": seconds}."""
    device = str(job.device)
    described = json.dumps([{**dataclasses.asdict(job), "device": device}, dataclasses.asdict(options)])
    with tempfile.TemporaryDirectory() as cache:
        own = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, "-m", "bench.lib.start", described]
        return {
            name: float(
                subprocess.run(command, env=own, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
            )
            for name in ("cold", "warm")
        }


def main(described: str) -> None:
    job, options = json.loads(described)
    began = time.monotonic()
    device = torch.device(job["device"])
    our_step(Job(**{**job, "device": device}), StepOptions(**{**options, "kernels": tuple(options["kernels"])}))()
    wait(device)
    print(time.monotonic() - began)


if __name__ == "__main__":
    main(sys.argv[1])
