"""``vab demo``: write the synthetic world, and measure what models have learned of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vab.demo.score import Score


def world(out: str, seed: int = 0, num_train: int = 2000, num_val: int = 200, num_workers: int = 2) -> None:
    """Write the synthetic world: videos of 4 s, lists with labels, and the ground truth.

    If interrupted, type the same command again: it writes what is missing. Equal flags give equal bytes.

    Args:
        out: Folder to write; made if absent.
        seed: Seed of the world, 0 or more.
        num_train: Segments to train on.
        num_val: Segments to validate on.
        num_workers: Processes; 0 to work in this one.
    """
    from vab.demo.world import write_world

    write_world(out, seed, num_train, num_val, num_workers)


def score(
    checkpoint: str,
    data: str,
    videos: str | None = None,
    num_generated: int = 96,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "auto",
) -> Score:
    """Score a pretrained model on a validation set of the world: loss, and what is heard and when in its sounds.

    Each is measured with the true video, with another record's and with none. The table also goes to score.json beside
    the checkpoint.

    Args:
        checkpoint: A .ckpt file, or a run's folder.
        data: Folder of shards with labels that the judge knows.
        videos: Folder of the videos that the shards were made from, with its events.json; by default the folder
            "videos" beside the folder of the shards (data/demo/videos for data/demo/shards/val), if it is there.
        num_generated: Records, from the start of the set, for which sound is generated; all if there are fewer.
        batch_size: Records at once.
        seed: Seed of the decoding.
        device: Where the networks run: auto, cpu, cuda, ...
    """
    from vab.demo.score import score

    return score(checkpoint, data, videos, num_generated, batch_size, seed, device)


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
    """Measure what the demo's runs have learned, on unseen segments: one page with tables, controls and players.

    The page needs no network and no other file. A .json file of the same name, beside it, has all numbers.

    Args:
        data: Folder of shards that no run has seen.
        videos: Folder of the videos that they were made from.
        out: The .html file to write.
        pretrain: The pretraining: a run's folder, or a .ckpt file.
        align: The alignment.
        classify: The classifications, one for each kind of input; runs/demo_classify if not given.
        num_generated: Segments for which sound is generated.
        batch_size: Segments at once.
        seed: Seed of the decoding.
        device: Where the networks run: auto, cpu, cuda, ...
        overwrite: Replace files that are there.
    """
    from vab.demo.report import report

    return report(data, videos, out, pretrain, align, classify, num_generated, batch_size, seed, device, overwrite)
