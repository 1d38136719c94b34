"""Score a model of the demo world: how well its sounds match the video, and how much the video matters."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vab.console import print_table, track
from vab.data.media.segments import read_audio
from vab.data.reading.dataset import ShardDataset
from vab.demo.world import EVENTS
from vab.files import write_atomically
from vab.frozen.batches import class_columns, decode_sounds, judge_sounds, true_classes
from vab.frozen.judges import load_judge
from vab.generation.generator import Generator
from vab.metrics.agreement import class_agreement
from vab.metrics.codes import GuessingQuality
from vab.metrics.synchrony import TOLERANCE_SECONDS, chance_counts, find_onsets, onset_counts, onset_ratios
from vab.metrics.uncertainty import mean_and_error
from vab.spec import Batch, UserError
from vab.tasks.checkpoints import find_checkpoint

CONDITIONS = ("true", "shuffled", "none")
"""The video that the model gets: that of the record, that of another record, or none."""
SHIFT_SECONDS = 0.25
"""Shift of the sound generated for the true video, as a control: more than the tolerance."""


@dataclass(frozen=True)
class Score:
    """Metrics over a validation set; agreements are shares of 1, each with its standard error."""

    records: int
    """Number of records in the loss."""
    generated: int
    """Number of records for which sound was generated."""
    judge: str
    """Name and weights of the judge."""
    loss: dict[str, float]
    """Nats per hidden code, by the video given."""
    agreement: dict[str, tuple[float, float]]
    """Judge's agreement with the true classes: ``round_trip`` is the ceiling, then by the video given."""
    chance: float
    """Agreement of random guesses."""
    seconds_per_segment: float
    """Time to generate the codes with the true video."""
    onset_f1: dict[str, tuple[float, float | None]] | None = None
    """F1 of onsets against the true events, within `TOLERANCE_SECONDS`, with its standard error by record: of ``real``
    sound, of the ``round_trip``, by the video given, of the sound for the true video ``shifted``, and by ``chance``.
    None where the true events are not known."""


def score(
    checkpoint: str,
    data: str,
    videos: str | None = None,
    num_generated: int = 96,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "auto",
) -> Score:
    """Score a pretrained model on a validation set of the demo world, and print a table.

    Loss and generated sound are measured with the true video, with that of another record, and without video. A sound
    has two metrics: what is heard (agreement), and when (F1 of its onsets against the true events). All metrics are
    also written to ``score.json`` in the checkpoint's folder.

    The arguments are the flags of ``vab demo score``.
    """
    usual = Path(data).parent.parent / "videos"
    if videos is None and (usual / EVENTS).is_file():
        videos = str(usual)
    generator = Generator.load(checkpoint, device=device)
    result = measure(generator, data, num_generated, batch_size, seed, videos=videos)
    place = find_checkpoint(checkpoint)
    write_atomically(place.parent / "score.json", (json.dumps(asdict(result), indent=2) + "\n").encode())
    print_score(result, place)
    if videos is None:
        print(f"no onset F1: there is no {usual / EVENTS}; give --videos, the demo world's folder", file=sys.stderr)
    return result


def measure(
    generator: Generator,
    data: str,
    num_generated: int = 96,
    batch_size: int = 32,
    seed: int = 0,
    keep: Callable[[str, list[int], list[Tensor]], None] | None = None,
    videos: str | None = None,
) -> Score:
    """Compute the metrics of ``score``.

    Args:
        generator: The model.
        data: As in ``score``.
        num_generated: As in ``score``.
        batch_size: As in ``score``.
        seed: As in ``score``.
        keep: Called with ``round_trip`` or the video given, the numbers of records, and their sounds (N,).
        videos: Folder of the demo world, to measure onsets; None to leave them out.
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

    events = None if videos is None else Events(dataset, Path(videos))
    rate = generator.codec.sample_rate

    losses = {video: _loss(generator, dataset, video, batch_size) for video in CONDITIONS}
    count = min(num_generated, len(dataset))
    by_video: dict[str, list[Tensor]] = {name: [] for name in ("round_trip", *CONDITIONS)}
    seconds = 0.0
    chances = []

    def agreement(name: str, rows: list[int], batch: Batch, codes: Tensor, truth: Tensor) -> Tensor:
        sounds = decode_sounds(generator.codec, codes, batch.steps)
        if keep is not None:
            keep(name, rows, sounds)
        if events is not None:
            events.add(name, rows, sounds, rate)
        return class_agreement(judge_sounds(judge, sounds, rate).probabilities, truth)

    starts = range(0, count, batch_size)
    for start in track(starts, "generating", len(starts)):
        rows = list(range(start, min(start + batch_size, count)))
        batch = dataset.__getitems__(rows)
        truth = true_classes(judge, columns, batch.labels)  # (B, L) in the judge's order
        chances += (truth.sum(1) / truth.shape[1]).tolist()
        by_video["round_trip"].append(agreement("round_trip", rows, batch, batch.codes, truth))
        for video in CONDITIONS:
            given = _with_video(dataset, batch, rows, video)
            begun = time.perf_counter()
            codes = generator.task.generate_for(given, seed, drop_features=video == "none")
            seconds += (time.perf_counter() - begun) if video == "true" else 0.0
            by_video[video].append(agreement(video, rows, batch, codes, truth))
        if events is not None:
            events.add("real", rows, [events.real_sound(row, rate) for row in rows], rate)
    agreements = {name: mean_and_error(torch.cat(values)) for name, values in by_video.items()}
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
        onset_f1=None if events is None else events.f1(),
    )


class Events:
    """The true events of a demo world's records, and the onsets of sounds that should follow them."""

    def __init__(self, dataset: ShardDataset, videos: Path) -> None:
        """Read the true events.

        Args:
            dataset: Its records name their videos.
            videos: Folder of the demo world: the videos, and events.json.

        Raises:
            UserError: If there is no such file, or it does not have the records' videos.
        """
        if not (videos / EVENTS).is_file():
            raise UserError(f"{videos} has no {EVENTS}: --videos is the folder that vab demo world wrote")
        self._scenes = json.loads((videos / EVENTS).read_text())
        self._dataset, self._videos = dataset, videos
        self._rows: list[int] = []
        self._onsets: dict[str, list[Tensor]] = {}
        if (source := str(dataset.record(0)["source"])) not in self._scenes:
            raise UserError(
                f"{videos / EVENTS} has no {source}: give --videos, the folder that the shards are made from"
            )

    def real_sound(self, row: int, rate: int) -> Tensor:
        """(N,) the video's own sound in the record's span."""
        record, spec = self._dataset.record(row), self._dataset.spec
        span = read_audio(self._videos / record["source"], rate, record["start_seconds"], spec.segment_seconds)
        return torch.from_numpy(span.waveform[: span.valid_samples])

    def add(self, name: str, rows: list[int], sounds: list[Tensor], rate: int) -> None:
        """Add sounds of these records; each record must have a sound ``round_trip``."""
        self._onsets.setdefault(name, []).extend(find_onsets(sound, rate) for sound in sounds)
        if name == "round_trip":
            self._rows += rows

    def f1(self) -> dict[str, tuple[float, float | None]]:
        """F1 against the true events with its standard error, of all sounds added and of the controls."""
        seconds = self._dataset.spec.segment_seconds
        truth = [self._true(row, seconds) for row in self._rows]
        pairs_of = {
            name: [(t, o) for t, o in zip(truth, onsets, strict=True) if len(t)]
            for name, onsets in self._onsets.items()
        }
        # Shifted round the end, so that none is lost.
        pairs_of["shifted"] = [(true, (onsets + SHIFT_SECONDS) % seconds) for true, onsets in pairs_of["true"]]
        counts = {name: onset_counts(pairs) for name, pairs in pairs_of.items()}
        counts["chance"] = chance_counts(pairs_of["true"])
        return {name: onset_ratios(table)["onset_f1"] for name, table in counts.items()}

    def _true(self, row: int, seconds: float) -> Tensor:
        """Onsets of all events of a record, seconds from its start."""
        record = self._dataset.record(row)
        scene = self._scenes[record["source"]]
        events = [event - record["start_seconds"] for item in scene["objects"] for event in item["events"]]
        return torch.tensor([event for event in events if 0 <= event < seconds], dtype=torch.float64)


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


def print_score(result: Score, checkpoint: Path) -> None:
    """Print the table of a score."""
    onsets = {} if result.onset_f1 is None else {name: _pair(pair) for name, pair in result.onset_f1.items()}
    headings = ["video given", "validation loss", "judge's agreement", "share of ceiling", *["onset F1"] * bool(onsets)]
    ceiling = result.agreement["round_trip"][0]
    rows = []

    def add(words: str, name: str, agreement: tuple[float, float] | None = None) -> None:
        cells = [f"{result.loss[name]:.3f}" if name in result.loss else "", "", ""]
        if agreement is not None:
            cells[1:] = _pair(agreement), f"{agreement[0] / ceiling:.2f}"
        rows.append([words, *cells, *([onsets[name]] if onsets else [])])

    if onsets:
        add("(real sound)", "real")
    add("(codec round trip: the ceiling)", "round_trip", result.agreement["round_trip"])
    for video in CONDITIONS:
        add(video, video, result.agreement[video])
        if onsets and video == "true":
            add(f"true, sound shifted by {SHIFT_SECONDS:g} s", "shifted")
    chance = ["", f"{result.chance:.3f}", f"{result.chance / ceiling:.2f}"]
    rows.append(["(chance)", *chance, *([onsets["chance"]] if onsets else [])])
    words = (
        f"loss: nats per hidden code over {result.records} records; agreement (what is heard): share of the true "
        f"classes among the judge's top guesses, judge {result.judge}; "
    )
    if onsets:
        words += (
            f"onset F1 (when): onsets of the sound against the true events, one to one within "
            f"{1000 * TOLERANCE_SECONDS:.0f} ms, pooled; by chance: against other records' events; "
        )
    words += (
        f"mean and standard error by record over {result.generated} records; "
        f"{result.seconds_per_segment:.2f} s per segment to generate its codes"
    )
    print_table(f"{checkpoint}", headings, rows, notes=[words])


def _pair(pair: tuple[float, float | None]) -> str:
    return f"{pair[0]:.3f}" if pair[1] is None else f"{pair[0]:.3f} +- {pair[1]:.3f}"
