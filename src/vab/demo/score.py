"""What a model of the demo world has learned: does the sound fit the picture, and does the picture matter?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from vab.commands.generation import Generator
from vab.data.format import write_atomically
from vab.data.records import ShardDataset
from vab.frozen.judges import load_judge
from vab.frozen.listening import class_columns, listen, sounds_of, true_classes
from vab.metrics.agreement import class_agreement
from vab.metrics.codes import GuessingQuality
from vab.metrics.uncertainty import mean_and_error
from vab.spec import Batch, UserError
from vab.tasks.checkpoints import find_checkpoint

CONDITIONS = ("true", "shuffled", "none")
"""The video that the model is given: the record's own, another record's, or none at all."""


@dataclass(frozen=True)
class Score:
    """Figures over a validation set; agreements are shares of 1, with their standard errors."""

    records: int
    """Records whose loss was taken."""
    generated: int
    """Records for which sound was made."""
    judge: str
    """Name and weights of the judge."""
    loss: dict[str, float]
    """Nats per hidden code, by the video given."""
    agreement: dict[str, tuple[float, float]]
    """Judge's agreement with the true classes: ``round_trip`` is the ceiling, then by the video given."""
    chance: float
    """Agreement of a judge that guesses blindly."""
    seconds_per_segment: float
    """Of generating the codes with the true video."""

    @property
    def share_of_ceiling(self) -> float:
        """Agreement with the true video over that of the codec's round trip."""
        return self.agreement["true"][0] / self.agreement["round_trip"][0]


def score(
    checkpoint: str, data: str, num_generated: int = 96, batch_size: int = 32, seed: int = 0, device: str = "auto"
) -> Score:
    """Score a pretrained model on a validation set of the demo world, and print the table.

    The validation loss and the generated sound each with the true video, with another record's and with none. The
    figures also go to ``score.json`` beside the checkpoint.

    Args:
        checkpoint: A .ckpt file, or a run's folder.
        data: Folder of shards with labels that the judge knows.
        num_generated: Records, from the start of the set, for which sound is made; all if there are fewer.
        batch_size: Records at once.
        seed: Of the decoding.
        device: auto, cpu, cuda, ...
    """
    generator = Generator.load(checkpoint, device=device)
    result = measure(generator, data, num_generated, batch_size, seed)
    place = find_checkpoint(checkpoint)
    write_atomically(place.parent / "score.json", (json.dumps(asdict(result), indent=2) + "\n").encode())
    _print(result, place)
    return result


def measure(
    generator: Generator,
    data: str,
    num_generated: int = 96,
    batch_size: int = 32,
    seed: int = 0,
    keep: Callable[[str, list[int], list[Tensor]], None] | None = None,
) -> Score:
    """The figures alone.

    Args:
        generator: The model.
        data: As in ``score``.
        num_generated: As in ``score``.
        batch_size: As in ``score``.
        seed: As in ``score``.
        keep: Called with what was heard (``round_trip`` or the video given), numbers of records, and their sounds (N,).
    """
    if num_generated < 2 or batch_size < 1:
        raise UserError(
            f"need num_generated of 2 or more and batch_size of 1 or more, got {num_generated}, {batch_size}"
        )
    dataset = ShardDataset(data, levels=generator.task.spec.num_codebooks)
    if len(dataset) < 2:
        raise UserError(f"{data} has {len(dataset)} record: a video of another record cannot be given")
    generator.task.spec.require(dataset.spec, "checkpoint", "shards")
    judge = load_judge("tiny", generator.task.device)
    columns = class_columns(judge, dataset.labels)

    losses = {video: _loss(generator, dataset, video, batch_size) for video in CONDITIONS}
    count = min(num_generated, len(dataset))
    heard: dict[str, list[Tensor]] = {name: [] for name in ("round_trip", *CONDITIONS)}
    seconds = 0.0
    chances = []

    def agreement(name: str, rows: list[int], batch: Batch, codes: Tensor, truth: Tensor) -> Tensor:
        sounds = sounds_of(generator.codec, codes, batch.steps)
        if keep is not None:
            keep(name, rows, sounds)
        return class_agreement(listen(judge, sounds, generator.codec.sample_rate).probabilities, truth)

    console = Console(stderr=True)
    starts = range(0, count, batch_size)
    for start in track(starts, "generating", console=console, disable=not console.is_terminal):
        rows = list(range(start, min(start + batch_size, count)))
        batch = dataset.__getitems__(rows)
        truth = true_classes(judge, columns, batch.labels)  # (B, L) in the judge's order
        chances += (truth.sum(1) / truth.shape[1]).tolist()
        heard["round_trip"].append(agreement("round_trip", rows, batch, batch.codes, truth))
        for video in CONDITIONS:
            given = _with_video(dataset, batch, rows, video)
            begun = time.perf_counter()
            codes = generator.task.generate_for(given, seed, drop_features=video == "none")
            seconds += (time.perf_counter() - begun) if video == "true" else 0.0
            heard[video].append(agreement(video, rows, batch, codes, truth))
    agreements = {name: mean_and_error(torch.cat(values)) for name, values in heard.items()}
    if not agreements["round_trip"][0] > 0:
        raise UserError(
            f"judge {judge.name} hears none of the true classes in the codec's round trip: nothing to compare"
        )
    return Score(
        records=len(dataset),
        generated=count,
        judge=f"{judge.name} {judge.weight_hash[:12]}",
        loss=losses,
        agreement=agreements,
        chance=sum(chances) / len(chances),
        seconds_per_segment=seconds / count,
    )


def _with_video(dataset: ShardDataset, batch: Batch, rows: list[int], video: str) -> Batch:
    """The batch, with the features of records half a data set away if ``video`` is ``shuffled``."""
    if video != "shuffled":
        return batch
    other = dataset.__getitems__([(row + len(dataset) // 2) % len(dataset) for row in rows])
    return replace(batch, features=other.features, frames=other.frames, ragged=batch.ragged or other.ragged)


@torch.inference_mode()
def _loss(generator: Generator, dataset: ShardDataset, video: str, batch_size: int) -> float:
    task = generator.task
    quality = GuessingQuality(task.spec.num_codebooks).to(task.device)
    for start in range(0, len(dataset), batch_size):
        rows = list(range(start, min(start + batch_size, len(dataset))))
        batch = _with_video(dataset, dataset.__getitems__(rows), rows, video).to(task.device)
        mask = task.evaluation_mask(batch)
        dropped = torch.full((len(batch),), video == "none", device=task.device)
        quality.update(*task.guessing_sums(task.logits(batch, mask, dropped), batch, mask))
    return float(quality.compute()["loss"])


def _print(result: Score, checkpoint: Path) -> None:
    table = Table(title=f"{checkpoint}", title_justify="left")
    for column in ("video given", "validation loss", "judge's agreement", "share of ceiling"):
        table.add_column(column, justify="left" if column == "video given" else "right")
    ceiling = result.agreement["round_trip"][0]
    table.add_row("(codec round trip: the ceiling)", "", _pair(result.agreement["round_trip"]), "1.00")
    for video in CONDITIONS:
        mean = result.agreement[video][0]
        table.add_row(video, f"{result.loss[video]:.3f}", _pair(result.agreement[video]), f"{mean / ceiling:.2f}")
    table.add_row("(chance)", "", f"{result.chance:.3f}", f"{result.chance / ceiling:.2f}")
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    console.print(
        f"loss: nats per hidden code over {result.records} records; agreement: share of the true classes among the "
        f"judge's top guesses, mean and standard error over {result.generated} records, judge {result.judge}; "
        f"{result.seconds_per_segment:.2f} s per segment to generate its codes",
        style="dim",
        highlight=False,
    )


def _pair(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3f} +- {pair[1]:.3f}"
