"""Measure the runs of the demo world and make one page of them: ``vab demo report``."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch

from vab import __version__
from vab.data.reading.dataset import ShardDataset
from vab.demo.report import measures, players
from vab.demo.report.page import Example, Found, page
from vab.demo.report.runs import Run, curves_svg, read_run
from vab.files import check_files, write_atomically
from vab.frozen import device_named
from vab.generation.generator import Generator
from vab.metrics.recall import match_ranks
from vab.spec import UserError
from vab.tasks import AlignTask, BaseTask, ClassifyTask, PretrainTask

_EXAMPLES, _QUERIES = 6, 4
_UNITS = {"PretrainTask": "nats per hidden code", "AlignTask": "InfoNCE, nats", "ClassifyTask": "cross-entropy, nats"}

Kind = TypeVar("Kind", bound=BaseTask)


def report(
    data: str,
    videos: str,
    out: str,
    pretrain: str = "runs/demo_pretrain",
    align: str = "runs/demo_align",
    classify: list[str] | None = None,
    num_generated: int = 96,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure the demo's runs on unseen segments: one page with tables, controls, curves and players.

    The page needs no network and no other file. All metrics are also written to a .json file of the same name.

    The arguments are the flags of ``vab demo report``.

    Raises:
        UserError: If a run is of another task or of other data, or a video does not exist.
    """
    figures_file = Path(out).with_suffix(".json")
    check_files({"out": (out, ".html")}, [], overwrite)
    check_files({"out": (str(figures_file), ".json")}, [], overwrite)
    dataset = ShardDataset(data)
    if len(dataset) < 2 or batch_size < 1:
        raise UserError(f"need 2 or more records and --batch_size of 1 or more, got {len(dataset)} and {batch_size}")
    files = [Path(videos) / str(dataset.record(number)["source"]) for number in range(len(dataset))]
    if lacking := [file for file in files if not file.exists()]:
        raise UserError(f"{lacking[0]} is not there: --videos is the folder of the CSV that {data} was extracted from")
    where = device_named(device)
    runs = {"pretrain": read_run(pretrain), "align": read_run(align)}
    tasks: dict[str, ClassifyTask] = {}
    for folder in classify if classify is not None else ["runs/demo_classify"]:
        run = read_run(folder)
        task = _of(run, ClassifyTask)
        if task.inputs in tasks:
            raise UserError(f"--classify has two runs that look at {task.inputs}: give one of each")
        if task.labels != tuple(dataset.labels):
            raise UserError(f"{folder} knows {len(task.labels)} classes, and {data} has others or another order")
        tasks[task.inputs] = task
        runs[f"classify, {task.inputs.replace('_', ' and ')}"] = run
    aligned = _of(runs["align"], AlignTask)
    _of(runs["pretrain"], PretrainTask)
    for run in runs.values():
        run.task.to(where)
        run.task.spec.require(dataset.spec, run.name, "shards")
        if run.info["data_sha256"] == dataset.manifest_hash:
            raise UserError(f"{run.name} was trained on {data}: give shards that no run has seen")
        if (most := run.info["max_steps"]) is not None and run.info["steps"] < most:
            print(f"note: {run.name} has made {run.info['steps']} of its {most} steps", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        sounds = Path(folder)
        generator = Generator.load(pretrain, device=device)
        generated = measures.generation(generator, data, files, sounds, num_generated, batch_size, seed)
        examples = [
            _example(dataset, files[row], sounds, row)
            for row in players.spread(dataset, _EXAMPLES, generated["generated"])
        ]
    retrieved, audio, video = measures.retrieval(aligned, dataset, batch_size)
    ranks = match_ranks(audio.double(), video.double())
    queries = players.spread(dataset, _QUERIES, len(dataset))
    found = [
        Found(
            _title(dataset, query),
            players.video_data(files[query]),
            int(ranks[query]) + 1,
            [(_title(dataset, hit), players.video_data(files[hit]), hit == query) for hit in hits],
        )
        for query, hits in zip(queries, players.nearest_videos(audio, video, queries), strict=True)
    ]
    result = {
        "data": {"folder": data, "records": len(dataset), "sha256": dataset.manifest_hash},
        "runs": {f"{name}: {run.name}": run.info for name, run in runs.items()},
        "generation": generated,
        "retrieval": retrieved,
        "classification": measures.classification(tasks, dataset, batch_size),
        "seed": seed,
        "versions": {"vab": __version__, "torch": torch.__version__},
    }
    plots = {
        f"{name}: {run.name}": curves_svg(run, _UNITS[run.info["task"]]) for name, run in runs.items() if run.curves
    }
    write_atomically(figures_file, (json.dumps(result, indent=1) + "\n").encode())
    write_atomically(Path(out), page(result, plots, examples, found))
    print(f"{out}: open it in a browser; figures in {figures_file}")
    return result


def _of(run: Run, kind: type[Kind]) -> Kind:
    if not isinstance(run.task, kind):
        raise UserError(f"{run.name} is a run of {type(run.task).__name__}, not of {kind.__name__}")
    return run.task


def _title(dataset: ShardDataset, number: int) -> str:
    return f"{' and '.join(dataset.label_names(number))} ({Path(str(dataset.record(number)['id'])).name})"


def _example(dataset: ShardDataset, video: Path, sounds: Path, row: int) -> Example:
    names = {"real": "its own", "round_trip": "round trip", "true": "generated", "shuffled": "other's video"}
    return Example(
        _title(dataset, row),
        players.video_data(video),
        players.with_sound(video, measures.place(sounds, "true", row)),
        players.spectrograms(sounds, row, names),
    )
