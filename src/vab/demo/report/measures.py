"""Metrics of the demo's runs on unseen segments, each with its controls; plain JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vab.data.extract.sounds import Listening
from vab.data.media.segments import read_audio
from vab.data.media.write import write_wav
from vab.data.reading.dataset import ShardDataset
from vab.demo.score import Score, measure
from vab.evaluation.embedding import embed_records
from vab.evaluation.figures import Comparison
from vab.evaluation.sides import find_folder, judge_folder
from vab.frozen.judges import load_judge
from vab.generation.generator import Generator
from vab.metrics.classification import Classification
from vab.metrics.recall import CUTS, match_ranks, retrieval_table
from vab.spec import Batch
from vab.tasks import AlignTask, ClassifyTask

SOUNDS = {
    "round_trip": "the codec's round trip of the real sound: the floor",
    "true": "generated for the video",
    "shuffled": "generated for another segment's video",
    "none": "generated without video",
    "other": "real sound of another segment: what chance would do",
}
"""What is compared with the real sounds, in the order of the table."""
_METRICS = ("fad", "kld", "synchrony")


def generation(
    generator: Generator, data: str, files: Sequence[Path], folder: Path, num_generated: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Loss, agreement, and distances between generated sounds and the videos' own sounds.

    Args:
        generator: The pretrained model.
        data: Folder of unseen shards.
        files: For each record, its video with its own sound.
        folder: Where the sounds are written: a folder ``real`` and one for each of ``SOUNDS``, with 000000.wav, ...
        num_generated: How many records to generate sound for, from the start of the set.
        batch_size: Records per batch.
        seed: Seed of the decoding.

    Returns:
        The fields of ``Score``, and ``sounds``: name -> metric -> value, error and metric card.
    """
    rate = generator.codec.sample_rate

    def keep(name: str, rows: list[int], sounds: list[Tensor]) -> None:
        for row, sound in zip(rows, sounds, strict=True):
            write_wav(place(folder, name, row), sound.numpy(), rate)

    for name in ("real", *SOUNDS):
        (folder / name).mkdir(parents=True)
    score: Score = measure(generator, data, num_generated, batch_size, seed, keep)
    seconds = generator.task.spec.segment_seconds
    for row in range(score.generated):
        own = read_audio(files[row], rate, seconds=seconds).waveform
        write_wav(place(folder, "real", row), own, rate)
        write_wav(place(folder, "other", (row + score.generated // 2) % score.generated), own, rate)
    judge = load_judge("tiny", generator.task.device)
    listening = Listening((judge.sample_rate,), seconds, "keep", False)

    def side(name: str) -> Any:
        there = find_folder(folder / name)
        return judge_folder(there, [judge], listening, num_workers=0, batch_size=16, on_error="stop", title=name)

    real = side("real")
    sounds = {}
    for name in SOUNDS:
        metrics = _METRICS[1:] if name == "other" else _METRICS  # the same set of sounds, in another order
        measured = Comparison(real, side(name), True, listening, seed, 1).measure([judge], metrics)
        sounds[name] = {figure: asdict(found) for figure, found in measured.figures.items()}
    return asdict(score) | {"sounds": sounds}


def place(folder: Path, name: str, row: int) -> Path:
    """Path of a record's sound; ``name`` is ``real`` or one of ``SOUNDS``."""
    return folder / name / f"{row:06d}.wav"


def retrieval(task: AlignTask, dataset: ShardDataset, batch_size: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Recall among all records: of the task, of the same network untrained, and by chance.

    Returns:
        The metrics; and the (N, E) audio and video embeddings.
    """
    numbers = list(range(len(dataset)))
    torch.manual_seed(0)
    arguments = {name: value for name, value in task.hparams.items() if not name.startswith("_")}
    untrained = type(task)(**arguments).to(task.device).eval()
    untrained.backbone.set_codebooks(dataset.codebooks)
    two = torch.tensor([len(dataset.label_names(number)) > 1 for number in numbers])
    rows = {}
    for name, network in (("untrained", untrained), ("aligned", task)):
        audio, video = embed_records(network, dataset, numbers, batch_size, task.device)
        a2v, v2a = match_ranks(audio.double(), video.double()), match_ranks(video.double(), audio.double())
        rows[name] = {figure: float(value) for figure, value in retrieval_table(a2v, v2a).items()}
        if bool(two.any()):
            subset = {"a2v": a2v[two], "v2a": v2a[two]}
            rows[name] |= {
                f"recall_at_10_{way}_two_objects": float((ranks < 10).double().mean()) for way, ranks in subset.items()
            }
    return {"N": len(numbers), "two_objects": int(two.sum()), "chance": chance(len(numbers)), **rows}, audio, video


def chance(count: int) -> dict[str, float]:
    """What a random order of N items gives: recall k / N, median rank (N + 1) / 2, MRR the mean of 1 / n."""
    figures = {f"recall_at_{cut}": float(min(Fraction(1), Fraction(cut, count))) for cut in CUTS}
    reciprocal = statistics.fmean(1 / rank for rank in range(1, count + 1))
    return figures | {"median_rank": (count + 1) / 2, "mrr": reciprocal}


def classification(tasks: Mapping[str, ClassifyTask], dataset: ShardDataset, batch_size: int) -> dict[str, Any]:
    """Mean average precision over all records, also with shuffled labels, and top-1 accuracy over those of one class.

    Args:
        tasks: Classification tasks by their inputs.
        dataset: Shards with the classes of the tasks.
        batch_size: Records per batch.
    """
    truth = torch.zeros(len(dataset), len(dataset.labels), dtype=torch.bool)
    for number in range(len(dataset)):
        for label in dataset.label_names(number):
            truth[number, dataset.labels.index(label)] = True
    single = truth.sum(1) == 1
    found: dict[str, Any] = {}
    for inputs, task in tasks.items():
        scores = torch.cat([_scores(task, dataset, start, batch_size) for start in range(0, len(dataset), batch_size)])
        figures = _figures(scores, truth, dataset.labels)
        found[inputs] = {
            "map": float(figures["map"]),
            "map_shuffled": float(_figures(scores, truth.roll(len(truth) // 2, 0), dataset.labels)["map"]),
            "per_class": _by_class(figures["average_precision_per_class"]),
        }
        if bool(single.any()):
            found[inputs]["top_1"] = float(_figures(scores[single], truth[single], dataset.labels)["top_1"])
    return {
        "N": len(dataset),
        "single": int(single.sum()),
        "labels": list(dataset.labels),
        "records_per_class": truth.sum(0).tolist(),
        "inputs": found,
    }


def _scores(task: ClassifyTask, dataset: ShardDataset, start: int, batch_size: int) -> Tensor:
    batch: Batch = dataset.read(range(start, min(start + batch_size, len(dataset)))).to(task.device)
    sound = (batch.codes, batch.steps) if task.inputs != "video" else (None, None)
    picture = (batch.features, batch.frames) if task.inputs != "audio" else (None, None)
    return task.probabilities(sound[0], picture[0], sound[1], picture[1]).cpu()


def _figures(scores: Tensor, truth: Tensor, labels: Sequence[str]) -> dict[str, Tensor]:
    metric = Classification(labels)
    metric.update(scores, truth, torch.arange(len(scores)))
    return metric.compute()


def _by_class(values: Tensor) -> list[float | None]:
    """A list with None for NaN, which JSON does not have."""
    return [None if value != value else value for value in values.tolist()]
