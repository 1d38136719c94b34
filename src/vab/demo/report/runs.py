"""Read a training run: its task, its data, how long it took, its curves."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vab.spec import UserError
from vab.tasks import BaseTask, load_task
from vab.tasks.checkpoints import find_checkpoint

_CURVES = {"train/loss": "training", "val/loss": "unseen by training"}
_COLOURS = ("#1f5fa8", "#c65d13")


@dataclass(frozen=True)
class Run:
    """One training run."""

    name: str
    """Folder of the run, or path of the checkpoint."""
    task: BaseTask
    """With the averaged weights, if the run kept any."""
    info: dict[str, Any]
    """Plain JSON."""
    curves: dict[str, list[tuple[int, float]]]
    """Name of the curve -> steps and values; empty if there is no log."""


def read_run(place: str) -> Run:
    """Read the newest checkpoint of a run, and the log and config in the run's folder.

    Raises:
        UserError: If there is no checkpoint.
    """
    path = find_checkpoint(place)
    if path.suffix == ".safetensors":
        raise UserError(f"{place}: the report needs a run, and this is an exported model: give the folder of the run")
    task = load_task(path)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    folder = path.parent.parent
    settings = folder / "config.yaml"
    config = yaml.safe_load(settings.read_text()) if settings.exists() else {}
    data = config.get("data", {})
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    log.Reload()
    there = log.Tags().get("scalars", [])
    scalars = {tag: log.Scalars(tag) for tag in _CURVES if tag in there}
    walls = [point.wall_time for points in scalars.values() for point in points]
    info = {
        "task": type(task).__name__,
        "parameters": sum(parameter.numel() for parameter in task.parameters()),
        "steps": content["global_step"],
        "max_steps": config.get("trainer", {}).get("max_steps"),
        "batch_size": data.get("global_batch_size") or data.get("batch_size"),
        "init_from": task.hparams.get("init_from"),
        "averaged_weights": "live_state_dict" in content,
        "logged_seconds": max(walls) - min(walls) if walls else None,
        "data": data.get("train"),
        "data_sha256": content.get("ShardDataModule", {}).get("manifest_hash"),
    }
    curves = {_CURVES[tag]: [(point.step, point.value) for point in points] for tag, points in scalars.items()}
    return Run(str(place), task, info, curves)


def curves_svg(run: Run, unit: str) -> str:
    """The losses of a run over its steps, as an SVG element."""
    figure = Figure(figsize=(4.2, 2.6), layout="constrained")
    axes = figure.add_subplot()
    for (name, points), colour in zip(run.curves.items(), _COLOURS, strict=False):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=colour, label=name, marker="o" if len(points) < 12 else None, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(color="#d9dde2", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
