"""A long run that is killed, and taken up again, beside one that is left alone: do both end alike, is memory flat?

    make bench BENCH=soak ARGS="--steps 3000"

``vab fit`` on the demo world, as ``make pretrain`` runs it: validation, sound made and judged, averaged weights,
checkpoints. One run is killed hard (the whole process group) some seconds after validations a third and two thirds of
the way to its middle, so that its last life is the longest. Both run at once, one thread each. Memory is what the
processes of a run hold together, without pages of files (whose share depends on who else has them open), every few
seconds; its slope is fitted to each life without its first third.
Exit status 1 where the two do not end alike.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bench.timing import machine, run_as_program
from vab.spec import UserError
from vab.tasks.checkpoints import find_checkpoint

_RECIPE = Path(__file__).parents[1] / "configs" / "demo" / "pretrain.yaml"
_AT_REST = 1 / 3
"""Share of a life after which memory counts: what is needed once is there by then."""


@dataclass
class Life:
    """A process from its start to its end."""

    name: str
    first_step: int
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    samples: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the start, MiB."""
    last_step: int | None = None
    ended: float | None = None

    def sample(self) -> None:
        """Look at its memory."""
        if (held := _held(self.process.pid)) is not None:
            self.samples.append((time.monotonic() - self.started, held))

    def slope(self) -> tuple[float, float] | None:
        """MiB/hour and its standard error, of a line through the samples of the time at rest; None of too few."""
        seconds, held = np.array(self.samples).T if self.samples else (np.empty(0), np.empty(0))
        at_rest = seconds > _AT_REST * seconds[-1] if len(seconds) else []
        if np.sum(at_rest) < 10:
            return None
        (slope, _), covariance = np.polyfit(seconds[at_rest] / 3600, held[at_rest], 1, cov=True)
        return float(slope), float(covariance[0, 0] ** 0.5)


def main(argv: list[str] | None = None) -> None:
    """Run, watch, print; a mistake in the options is one line and exit status 2."""
    run_as_program(run, _parser(), argv)


def run(options: argparse.Namespace) -> None:
    """Both runs, then the tables."""
    if options.steps < 6 * options.every or options.every < 1:
        raise UserError("steps must be at least 6 times --every, and every at least 1")
    for folder in (options.train, options.val):
        if not Path(folder).is_dir():
            raise UserError(f"there is no data set at {folder}: make demo-data, or give --train and --val")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.out or scratch)
        if (folder / "runs").exists():
            raise UserError(f"--out {folder} holds runs already: give an empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        lives = _both(folder, options)
        same = _print(folder, lives)
    if not same:
        raise SystemExit(1)


def _both(folder: Path, options: argparse.Namespace) -> list[Life]:
    """Run one that is left alone and one that is killed twice, side by side."""
    moments = random.Random(options.seed)
    kills = [options.steps * part // 6 // options.every * options.every for part in (1, 2)]
    alone, killed = _start(folder, "alone", options), _start(folder, "killed", options)
    lives, at_work, kill_at = [alone, killed], [alone, killed], 0.0
    try:
        while at_work:
            time.sleep(options.interval)
            for life in list(at_work):
                life.sample()
                if life.process.poll() is not None:
                    at_work.remove(life)
                    if life.process.returncode:
                        said = (folder / f"{life.name}.log").read_text().strip().splitlines()[-1]
                        raise UserError(f"the run {life.name} ended with status {life.process.returncode}: {said}")
                    life.ended, life.last_step = time.monotonic(), _last(folder, life.name)["global_step"]
            if not kills or killed not in at_work:
                continue
            if not kill_at and f"step {kills[0]}:" in (folder / "killed.log").read_text():
                kill_at = time.monotonic() + moments.uniform(0, options.interval * 6)
            if kill_at and time.monotonic() >= kill_at:
                os.killpg(killed.process.pid, signal.SIGKILL)
                killed.process.wait()
                killed.ended, killed.last_step, kill_at = time.monotonic(), _last(folder, "killed")["global_step"], 0.0
                at_work.remove(killed)
                kills.pop(0)
                killed = _start(folder, "killed", options, find_checkpoint(folder / "runs" / "killed"))
                lives.append(killed)
                at_work.append(killed)
    finally:
        for life in at_work:
            if life.process.poll() is None:
                os.killpg(life.process.pid, signal.SIGKILL)
    return lives


def _start(folder: Path, name: str, options: argparse.Namespace, resume: Path | None = None) -> Life:
    command = [
        *(sys.executable, "-m", "vab.cli", "fit", f"--config={_RECIPE}", f"--trainer.max_steps={options.steps}"),
        *(f"--data.train={Path(options.train).absolute()}", f"--data.val={Path(options.val).absolute()}"),
        *(f"--trainer.val_check_interval={options.every}", f"--trainer.logger.init_args.name={name}"),
    ]
    first = 0
    if resume is not None:
        command.append(f"--ckpt_path={resume}")
        first = torch.load(resume, weights_only=True)["global_step"]
    with (folder / f"{name}.log").open("ab") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True, env=environment)
    return Life(name, first, process)


def _last(folder: Path, name: str) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(find_checkpoint(folder / "runs" / name), weights_only=True)
    return checkpoint


def _held(group: int) -> float | None:
    """MiB that a process group holds, what several share counted once, without files' pages; None if it is gone."""
    held = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                lines = (process / "smaps_rollup").read_text().splitlines()
                held += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
        except OSError:
            continue
    return held / 1024 if held else None


def _figures(folder: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: (step, value) of each of its lines, a later life's from its first step on."""
    lives = sorted((folder / "runs" / name).glob("version_*"), key=lambda life: int(life.name.rpartition("_")[2]))
    lines: dict[str, list[tuple[int, float]]] = {}
    for life in lives:
        read = EventAccumulator(str(life), size_guidance={"scalars": 0})
        read.Reload()
        for tag in read.Tags()["scalars"]:
            points = [(point.step, point.value) for point in read.Scalars(tag)]
            lines[tag] = [point for point in lines.get(tag, []) if point[0] < points[0][0]] + points
    return lines


def _print(folder: Path, lives: list[Life]) -> bool:
    """The tables; whether the runs ended alike."""
    here = machine(torch.device("cpu"))
    print(f"machine: {here['cpu']}, {here['cores']} cores; torch {here['torch']}")
    table = Table("run", "steps", "minutes", "MiB at rest", "MiB at the end", "slope, MiB/hour")
    for life in lives:
        assert life.ended is not None
        held = [mib for _, mib in life.samples]
        slope = life.slope()
        table.add_row(
            life.name,
            f"{life.first_step} to {life.last_step}",
            f"{(life.ended - life.started) / 60:.1f}",
            f"{held[int(len(held) * _AT_REST)]:.0f}" if held else "-",
            f"{held[-1]:.0f}" if held else "-",
            "-" if slope is None else f"{slope[0]:.1f} +- {slope[1]:.1f}",
        )
    Console(width=120).print(table)
    one, other = _last(folder, "alone"), _last(folder, "killed")
    weights = all(
        one[name].keys() == other[name].keys()
        and all(torch.equal(one[name][key], other[name][key]) for key in one[name])
        for name in ("state_dict", "live_state_dict")
    )
    seen, seen_again = _figures(folder, "alone"), _figures(folder, "killed")
    learned = [tag for tag in seen if tag.startswith(("train/loss", "train/codes", "val/"))]
    differing = [tag for tag in learned if seen[tag] != seen_again.get(tag)]
    print(f"weights, live and averaged, bit for bit the same: {'yes' if weights else 'NO'}")
    print(
        f"lines of TensorBoard the same, point for point: {len(learned) - len(differing)} of {len(learned)}"
        + (f"; not: {', '.join(differing)}" if differing else "")
    )
    return weights and not differing


def _parser() -> argparse.ArgumentParser:
    data = Path(os.environ.get("VAB_DATA", "data")) / "demo" / "shards"
    parser = argparse.ArgumentParser("bench.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--train", default=str(data / "train"), help="data set")
    parser.add_argument("--val", default=str(data / "val"), help="data set")
    parser.add_argument("--steps", type=int, default=3000, help="of each run")
    parser.add_argument("--every", type=int, default=125, help="steps from one validation to the next")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds from one look at the memory to the next")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", help="folder that keeps the runs")
    return parser


if __name__ == "__main__":
    main()
