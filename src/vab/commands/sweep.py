"""``vab sweep``: compare sampler settings on validation records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vab import UserError

if TYPE_CHECKING:
    from vab.generation.sweep import Row


def sweep(
    checkpoint: str,
    data: str,
    grid: str,
    out: str,
    num_records: int = 96,
    batch_size: int = 16,
    metric: Literal["kld", "fad", "agreement", "warnings", "seconds"] = "kld",
    seed: int = 0,
    judge: str = "tiny",
    fine_checkpoint: str | None = None,
    device: str = "auto",
) -> list[Row]:
    """Try a grid of sampler settings on the same validation records, and print a table of their metrics.

    Each finished setting is a row of sweep.csv in the folder --out. Another run, with the same or another grid,
    measures only the settings that are missing. best.yaml holds the best setting, for vab generate --sampler.

    Args:
        checkpoint: A .ckpt file, or a run's folder.
        data: Folder of shards; records evenly spaced over it are used.
        grid: A YAML file: names of sampler settings, each with a list of values, which are tried in all combinations;
            or a list of such tables. Other settings are those of the checkpoint.
        out: Folder of the results.
        num_records: Records that each setting generates; all if there are fewer.
        batch_size: Records at once.
        metric: What the table is sorted by. kld: divergence of the judge's classes from those of the codec round trip,
            pair by pair; fad: Frechet distance to the round trips; agreement: the judge's agreement with the labels;
            warnings: share of sounds that seem wrong; seconds: time per record.
        seed: Seed of the decoding, the same for all settings.
        judge: The network that embeds and classifies the sounds.
        fine_checkpoint: The fine stage that belongs to a coarse checkpoint; it uses its own sampler settings.
        device: auto, cpu, cuda, ...
    """
    from vab.data.reading.dataset import ShardDataset
    from vab.files import sha256_of
    from vab.frozen.judges import load_judge
    from vab.generation.generator import Generator
    from vab.generation.sampler_files import read_grid
    from vab.generation.sweep import Subset, run_sweep
    from vab.tasks.checkpoints import find_checkpoint

    if num_records < 2 or batch_size < 1:
        raise UserError(f"need num_records of 2 or more and batch_size of 1 or more, got {num_records}, {batch_size}")
    generator = Generator.load(checkpoint, device=device, fine_checkpoint=fine_checkpoint)
    task = generator.task
    settings = read_grid(grid, task.sampler, task.predicted_levels)
    dataset = ShardDataset(data, levels=generator.levels)
    replace(task.spec, num_codebooks=generator.levels).require(dataset.spec, "checkpoint", "shards")
    subset = Subset(generator, dataset, load_judge(judge, task.device), num_records, batch_size, seed)
    files = {"checkpoint": find_checkpoint(checkpoint)}
    if fine_checkpoint is not None:
        files["fine_checkpoint"] = find_checkpoint(fine_checkpoint)
    hashes = {f"{name}_sha256": sha256_of(path) for name, path in files.items()}
    paths = {name: str(path) for name, path in files.items()} | {"data": str(dataset.folder)}
    return run_sweep(subset, settings, Path(out), metric, hashes, {"paths": paths})
