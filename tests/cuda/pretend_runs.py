"""Unmodified ``vab`` commands on pretended CUDA, and what they made the host wait for.

To run one and print the counts: ``python tests/cuda/pretend_runs.py fit --config ... --trainer.accelerator gpu``.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch import Callback
from pretend_cuda import install, waits


class StepWaits(Callback):
    """Counts the waits from the start of a training step to the start of the next one."""

    by_step: ClassVar[list] = []  # of the last command, in the order of steps

    def __init__(self):
        self.before = None

    def on_train_batch_start(self, *_):
        self.on_train_end()
        self.before = waits.copy()

    def on_train_end(self, *_):
        if self.before is not None:
            self.by_step.append(waits - self.before)


def run(arguments):
    """Run ``vab``; answers the traceback of what it raised, its waits, those of each step, and whether TF32 is on."""
    from vab.cli import main

    waits.clear()
    StepWaits.by_step.clear()
    error = ""
    try:
        main([str(argument) for argument in arguments])
    except (Exception, SystemExit):
        error = traceback.format_exc()
    products = torch.get_float32_matmul_precision()
    return {"error": error, "waits": waits.copy(), "by_step": [*StepWaits.by_step], "float32_products": products}


def start(folder, device, commands):
    """Run commands in one process of their own, in ``folder``; answers for each what `run` does.

    Args:
        device: ``cuda``, which is pretended, or ``cpu``. A GPU of this machine is hidden.
    """
    code = (
        "import json, sys, pretend_runs; device, *commands = json.load(sys.stdin)\n"
        "if device == 'cuda': pretend_runs.install()\n"
        "json.dump([pretend_runs.run(one) for one in commands], open('ended.json', 'w'))"
    )
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, input=json.dumps([device, *commands], default=str), text=True,
        env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        check=False, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "ended.json").read_text())


if __name__ == "__main__":
    import pretend_runs  # this file, once more: callbacks are named on the command line by this name

    install()
    ended = pretend_runs.run(sys.argv[1:])
    for place, times in ended["waits"].most_common():
        print(f"{times:6d} x {place}", file=sys.stderr)
    sys.exit(ended["error"])
