"""Windows has none of the modules of POSIX systems: vab is imported, fetches data and trains without them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vab
from tone_shards import short_spec, write_shards

POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
PROGRAM = """
import importlib, pkgutil, sys
import filelock, fsspec, lightning.pytorch, matplotlib.pyplot, torch  # which look at the system by themselves
for name in ("fcntl", "grp", "resource", "termios"):
    sys.modules[name] = None
import vab
for module in pkgutil.walk_packages(vab.__path__, "vab."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

from lightning.pytorch import Trainer
from vab.backbone import Backbone
from vab.callbacks import Meters, StepProgress
from vab.data.reading.datamodule import ShardDataModule
from vab.tasks import PretrainTask

data = ShardDataModule(train=sys.argv[1], val=sys.argv[1], batch_size=4, num_workers=0, cache="cache")
backbone = Backbone(data.spec, dim=32, num_heads=2, num_modality_layers=1, num_joint_layers=1)
task = PretrainTask(backbone, warmup_steps=1, schedule_steps=10)
trainer = Trainer(accelerator="cpu", max_steps=2, callbacks=[Meters(), StepProgress()], logger=False,
                  use_distributed_sampler=False, enable_checkpointing=False)
trainer.fit(task, data)
print("trained", trainer.global_step, "steps")
"""


def test_no_module_imports_one_of_posix_before_it_is_needed():
    wrong = []
    for path in Path(vab.__file__).parent.rglob("*.py"):
        waiting = list(ast.parse(path.read_text(encoding="utf-8")).body)
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.FunctionDef):
                continue  # imported when it is called
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path.name}: {name}" for name in names if name in POSIX]
            waiting += ast.iter_child_nodes(node)
    assert wrong == []


@pytest.mark.slow
def test_a_run_trains_from_an_address(tmp_path):
    write_shards(tmp_path / "shards", short_spec(), 8)
    command = [sys.executable, "-c", PROGRAM, f"file://{tmp_path}/shards"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "trained 2 steps"
