"""Open the data sets of a datamodule, mixtures and folds included, and check that they fit together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vab.data.reading.dataset import ShardDataset
from vab.data.reading.mixed import MixedDataset, Records
from vab.data.reading.order import apportion
from vab.spec import UserError

_SHOWN = 100  # characters of a value that differs between ranks


def open_training(
    train: str | Mapping[str, float], records_per_epoch: int | None, open_one: Callable[[str], ShardDataset]
) -> tuple[Records, list[ShardDataset], tuple[int, ...]]:
    """Open the data that ``data.train`` names.

    Args:
        train: A folder, or folders and their weights.
        records_per_epoch: Records in an epoch; default: all.
        open_one: Opens a folder.

    Returns:
        The training data, the data sets that they consist of, and the records of each in an epoch.

    Raises:
        UserError: If a folder is not a data set, a weight is not above 0 or is so small that its data set would give no
            record, or the data sets do not fit together.
    """
    if isinstance(train, str) and train.lstrip().startswith("{"):
        raise UserError(f"data.train must be a folder, or folders and numbers as in {{A: 3, B: 1}}; got {train}")
    if isinstance(train, str):
        dataset = open_one(train)
        return dataset, [dataset], (records_per_epoch or len(dataset),)
    if not train:
        raise UserError("data.train names no folder")
    for name, weight in train.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"data.train: the weight of {name} must be a number above 0, got {weight}")
    datasets = [open_one(_resolved(name)) for name in train]
    if twice := {one.folder for one in datasets if sum(one.folder == other.folder for other in datasets) > 1}:
        raise UserError(f"data.train names {twice.pop()} more than once: give it one weight")
    total = records_per_epoch or sum(map(len, datasets))
    counts = apportion(list(train.values()), total)
    if 0 in counts:
        dataset = datasets[counts.index(0)]
        raise UserError(
            f"data.train: {dataset.folder} would give no record to an epoch of {total}: raise its weight, or "
            "--data.records_per_epoch"
        )
    return datasets[0] if len(datasets) == 1 else MixedDataset(datasets), datasets, counts


def _resolved(name: str) -> str:
    """A folder's name with ``${oc.env:...}`` resolved, which YAML readers do for values only, not for keys."""
    try:
        return str(OmegaConf.create([name])[0])
    except OmegaConfBaseException as error:
        raise UserError(f"data.train: {name}: {str(error).splitlines()[0]}") from error


def refuse_tiny(train: Records) -> None:
    """Refuse shards of the toy networks.

    Raises:
        UserError: If the name of the codec or vision encoder begins with ``tiny``.
    """
    kinds = {"codec": train.spec.codec, "vision encoder": train.spec.vision}
    toys = [f"{kind} {name}" for kind, name in kinds.items() if name.startswith("tiny")]
    if toys:
        raise UserError(
            f"{train.folder} was extracted with {' and '.join(toys)}, made for the synthetic world, and this recipe is"
            " for real data: extract again with vab extract --config configs/extract/paper.yaml; to train on it anyway:"
            " --data.allow_tiny true"
        )


def require_alike(train: Records, other: ShardDataset) -> None:
    """Compare validation or test data with the training data.

    Raises:
        UserError: If they differ in a number or in their labels.
    """
    differences = train.spec.differences(other.spec)
    if train.labels != other.labels:
        missing, extra = sorted({*train.labels} - {*other.labels}), sorted({*other.labels} - {*train.labels})
        order = "" if missing or extra else " (same names in another order)"
        differences.append(
            f"labels: {len(train.labels)} != {len(other.labels)}, missing {missing[:5]}, extra {extra[:5]}{order}"
        )
    if differences:
        raise UserError(
            f"{train.folder} and {other.folder} do not go together ({'; '.join(differences)}):"
            " extract both with the same settings, or, if it is the labels, give the list of all of them with"
            " --data.vocabulary FILE"
        )


def divide(train: ShardDataset, val: ShardDataset, fold: int, pattern: str) -> None:
    """Use one fold for validation and the others for training.

    Raises:
        UserError: If the pattern is invalid or does not match the id of a record, or if one side is empty.
    """
    for dataset, of_fold in ((train, False), (val, True)):
        folds = folds_of(dataset, pattern)
        numbers = [number for number, its in enumerate(folds) if (its == fold) == of_fold]
        if not numbers:
            raise UserError(
                f"{dataset.folder} has the folds {sorted(set(folds))}: with data.fold {fold} there is nothing to "
                + ("validate on" if of_fold else "train on")
            )
        dataset.choose(numbers)


def folds_of(dataset: ShardDataset, pattern: str) -> list[int]:
    """The fold of each record.

    Args:
        dataset: The ids of its records contain the number of the fold.
        pattern: ``fold_pattern`` of ``ShardDataModule``.

    Raises:
        UserError: If the pattern is invalid or does not match the id of a record.
    """
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise UserError(f"data.fold_pattern {pattern!r} is not a regular expression: {error}") from error
    folds = []
    for number in range(len(dataset)):
        record_id = dataset.record_id(number)
        found = search(record_id)
        if not found or not found.groups() or not found.group(1).isdecimal():
            raise UserError(
                f"{dataset.folder}: data.fold_pattern {pattern!r} finds no fold in the id {record_id!r}: its first "
                "group must be the fold's number"
            )
        folds.append(int(found.group(1)))
    return folds


def require_same_on_all_ranks(trainer: Trainer, mine: dict[str, Any]) -> None:
    """Compare settings and data over all ranks, before a rank can wait for others that read fewer batches.

    Raises:
        UserError: On every rank, with the differences, if any two ranks differ.
    """
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, mine)
    first = everyone[0]
    if differing := [rank for rank, theirs in enumerate(everyone) if theirs != first]:
        theirs = everyone[differing[0]]
        values = "; ".join(
            f"{name}: {str(theirs.get(name))[:_SHOWN]} != {str(first.get(name))[:_SHOWN]}"
            for name in {**first, **theirs}
            if first.get(name) != theirs.get(name)
        )
        raise UserError(
            f"ranks {differing} see other data than rank 0, or have other settings ({values}): give each process the"
            " same folders and flags"
        )
