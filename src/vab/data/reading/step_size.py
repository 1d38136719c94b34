"""How the records of an optimizer step are divided: over devices, and over batches whose gradients are added up."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from vab.spec import UserError


def batches_of_step(global_batch_size: int, devices: int, batch_size: int) -> int:
    """The fewest batches of equal size that each device needs for its part of an optimizer step.

    Args:
        global_batch_size: Records in an optimizer step, on all devices together.
        devices: On all nodes together.
        batch_size: Maximum of records in a batch on each device.

    Raises:
        UserError: If the records cannot be divided equally among the devices.
    """
    if global_batch_size % devices:
        lower = global_batch_size // devices * devices
        sizes = " or ".join(str(size) for size in (lower, lower + devices) if size)
        counts = ", ".join(str(count) for count in range(1, global_batch_size + 1) if not global_batch_size % count)
        raise UserError(
            f"data.global_batch_size {global_batch_size} cannot be divided equally among {devices} devices: type"
            f" --data.global_batch_size {sizes}, or train on one of {counts} devices"
        )
    per_device = global_batch_size // devices
    return next(
        count for count in range(1, per_device + 1) if not per_device % count and per_device // count <= batch_size
    )


def accumulate(trainer: Trainer, batches: int) -> dict[str, Any]:
    """Let a trainer add up the gradients of so many batches; its counts of training batches become counts of steps.

    Returns:
        The trainer's settings before, by name.

    Raises:
        UserError: If the trainer was told to accumulate.
    """
    given = trainer.accumulate_grad_batches
    if given != 1:
        raise UserError(
            f"--trainer.accumulate_grad_batches {given}: data.global_batch_size fills it in; leave it out and lower"
            " --data.batch_size for less memory, or add --data.global_batch_size null"
        )
    counts = ("val_check_interval", "limit_train_batches")  # the latter holds fast_dev_run and overfit_batches, too
    before = {name: getattr(trainer, name) for name in ("accumulate_grad_batches", *counts)}
    trainer.accumulate_grad_batches = batches
    for name in counts:
        if isinstance(before[name], int):
            setattr(trainer, name, before[name] * batches)
    return before
