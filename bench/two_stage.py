"""Measure what the fine stage adds to the coarse one: is its sound nearer to the codec round trip with all levels?

make two-stage
python -m bench.two_stage --coarse runs/demo_coarse --fine runs/demo_fine --data data/demo8/shards/val
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jsonargparse
import torch
from torch import Tensor

from vab.audio import log_mel_distance
from vab.console import print_table, track
from vab.data.reading.dataset import ShardDataset
from vab.errors import fail
from vab.files import write_atomically
from vab.frozen.protocols import Codec
from vab.generation.generator import Generator
from vab.metrics.uncertainty import mean_and_error
from vab.spec import Batch, UserError
from vab.tasks.checkpoints import find_checkpoint
from vab.tokens.noise import Stream, fold_in, record_keys, uniform
from vab.tokens.sampler import Sampler

_RANDOM = 2
"""Folded into the keys of the random levels, which so have random numbers of their own."""


@dataclass(frozen=True)
class TwoStageScore:
    """Log-mel distances to the codec round trip with all levels, each with its standard error over the records."""

    records: int
    codec: str
    """Name and weights of the codec."""
    coarse_levels: int
    levels: int
    distance: dict[str, tuple[float, float]]
    """By the names of ``_ROWS``."""
    gain: dict[str, tuple[float, float]]
    """Mean decrease of the distance against the coarse levels alone, record by record; above 0 is better."""
    nearer: dict[str, float]
    """Share of the records whose distance decreases with the fine levels."""


_ROWS = {
    "reference_coarse": "the reference's {coarse} coarse levels alone",
    "reference_next": "the reference's first {next} levels",
    "reference_fine": "the reference's coarse levels, fine ones made",
    "reference_likeliest": "the reference's coarse levels, the likeliest fine ones",
    "reference_drawn": "the reference's coarse levels, fine ones drawn",
    "reference_random": "the reference's coarse levels, fine ones random",
    "generated_coarse": "generated coarse levels alone",
    "generated_fine": "generated coarse levels, fine ones made",
}
_WITH_FINE = ("reference_fine", "reference_likeliest", "reference_drawn", "reference_random", "generated_fine")
_DRAWN = Sampler(decode_steps=1, temperature=1.0, top_k=None, choice_temperature=0.0, guidance_scale=1.0)
_LIKELIEST = replace(_DRAWN, temperature=0.0)


def two_stage(
    coarse: str, fine: str, data: str, num_records: int = 64, batch_size: int = 32, seed: int = 0, device: str = "auto"
) -> TwoStageScore:
    """Score the two stages of a model on a validation set, and print a table.

    Each sound is compared with the codec round trip of its record, with all levels. The scores are also written to
    ``two_stage.json``, next to the checkpoint of the fine stage.

    Args:
        coarse: Checkpoint of the coarse stage: a .ckpt file, or the folder of a run.
        fine: Checkpoint of the fine stage, a file or folder too.
        data: Folder of shards with all the levels.
        num_records: How many records, from the start of the set; all if it has fewer.
        batch_size: Records per batch.
        seed: Seed of the decoding.
        device: auto, cpu, cuda, ...
    """
    if num_records < 2 or batch_size < 1:
        raise UserError(f"need num_records of 2 or more and batch_size of 1 or more, got {num_records}, {batch_size}")
    generator = Generator.load(coarse, device=device, fine_checkpoint=fine)
    assert generator.fine is not None
    dataset = ShardDataset(data)
    generator.fine.spec.require(dataset.spec, "fine checkpoint", "shards")
    count = min(num_records, len(dataset))
    if count < 2:
        raise UserError(f"{data} has {count} record: there is no standard error of one")
    parts: dict[str, list[Tensor]] = {name: [] for name in _ROWS}
    starts = range(0, count, batch_size)
    for start in track(starts, "generating", len(starts)):
        batch = dataset.read(range(start, min(start + batch_size, count))).to(generator.task.device)
        for name, codes in _versions(generator, batch, seed).items():
            parts[name].append(_distances(generator.codec, codes, batch))
    distance = {name: torch.cat(values) for name, values in parts.items()}
    gain = {name: distance[name.split("_")[0] + "_coarse"] - distance[name] for name in _WITH_FINE}
    result = TwoStageScore(
        records=count,
        codec=f"{generator.codec.name} {generator.codec.weight_hash[:12]}",
        coarse_levels=generator.task.spec.num_codebooks,
        levels=generator.levels,
        distance={name: mean_and_error(values) for name, values in distance.items()},
        gain={name: mean_and_error(values) for name, values in gain.items()},
        nearer={name: float((values > 0).double().mean()) for name, values in gain.items()},
    )
    checkpoint = find_checkpoint(fine)
    write_atomically(checkpoint.parent / "two_stage.json", (json.dumps(asdict(result), indent=2) + "\n").encode())
    print_score(result, checkpoint)
    return result


@torch.inference_mode()
def _versions(generator: Generator, batch: Batch, seed: int) -> dict[str, Tensor]:
    """The codes that are compared, by the names of ``_ROWS``: each (B, k, T), k the levels that are decoded."""
    fine = generator.fine
    assert fine is not None
    first, levels = generator.task.spec.num_codebooks, fine.spec.num_codebooks

    def with_fine_levels(sampler: Sampler | None = None) -> Tensor:
        """(B, K, T): the reference's coarse levels with generated fine levels."""
        return generator.codes_of_records(batch, seed, fine_sampler=sampler, keep_levels=first)

    reference = batch.codes[:, :first]
    generated = generator.codes_of_records(batch, seed)
    draws = uniform(
        fold_in(record_keys(seed, batch.index), _RANDOM), Stream.TOKEN, (levels - first, batch.codes.shape[2])
    )
    random = (draws * fine.spec.codebook_size).long()
    return {
        "reference_coarse": reference,
        "reference_next": batch.codes[:, : first + 1],
        "reference_fine": with_fine_levels(),
        "reference_likeliest": with_fine_levels(_LIKELIEST),
        "reference_drawn": with_fine_levels(_DRAWN),
        "reference_random": torch.cat([reference, random], dim=1),
        "generated_coarse": generated[:, :first],
        "generated_fine": generated,
    }


@torch.inference_mode()
def _distances(codec: Codec, codes: Tensor, batch: Batch) -> Tensor:
    """(B,) float64 on the CPU: log-mel distance of each record to its round trip with all levels, without padding."""
    rows = []
    for row, reference, steps in zip(codes, batch.codes, batch.steps.tolist(), strict=True):
        sound, reference_sound = (codec.decode(one[None, :, :steps]) for one in (row, reference))  # (1, 1, N)
        rows.append(log_mel_distance(sound, reference_sound, codec.sample_rate)[0, 0])
    return torch.stack(rows).cpu().double()


def print_score(result: TwoStageScore, checkpoint: Path) -> None:
    """Print the table of a score."""
    words = {"coarse": result.coarse_levels, "next": result.coarse_levels + 1}
    rows = []
    for name, row in _ROWS.items():
        gain = (_pair(result.gain[name]), f"{100 * result.nearer[name]:.0f} %") if name in result.gain else ("", "")
        rows.append([row.format(**words), _pair(result.distance[name]), *gain])
    print_table(
        f"{checkpoint}",
        ["sound", "log-mel distance", "decrease against coarse alone", "records nearer"],
        rows,
        notes=[
            f"to the round trip with all {result.levels} levels of codec {result.codec}; natural-log units, mean and "
            f"standard error over {result.records} records; made: by the fine checkpoint's sampler; likeliest, drawn: "
            "all in one pass"
        ],
    )


def _pair(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.4f} +- {pair[1]:.4f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line on `argv`, or on the process's own arguments."""
    try:
        jsonargparse.auto_cli(two_stage, args=argv, as_positional=False, prog="python -m bench.two_stage")
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
