"""Lightning's private names, all of them: one function or method for each, checked against the installed release.

Checked with Lightning 2.6.4 and 2.6.6. ``tests/test_lightning_internals.py`` checks each of them, and that no other
file uses one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The trainer that uses a module, or None; the public ``trainer`` raises where there is none."""
    return module._trainer


def set_device(module: LightningModule, device: torch.device) -> None:
    """Let ``module.device`` say where the weights are, which were made there and not moved."""
    module._device = device


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the current batch only accumulates gradients: no optimizer step follows it."""
    return trainer.fit_loop._should_accumulate()


def log_numbers(trainer: Trainer, numbers: Mapping[str, float]) -> None:
    """Log numbers of the current training batch; they are the trainer's ``callback_metrics`` too."""
    values = {name: torch.tensor(float(number)) for name, number in numbers.items()}
    trainer.callback_metrics.update(values)
    trainer._logger_connector.log_metrics(values)


def set_global_step(trainer: Trainer, step: int) -> None:
    """Let a trainer that only validates or tests log at the step of its checkpoint; it would log at step 0."""
    loop = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step  # trainer.global_step
    loop._batches_that_stepped = step


def processed_batches(trainer: Trainer) -> int:
    """Training batches of the trainer's current epoch that are finished, weight update included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.processed)  # type: ignore[attr-defined]


def begin_epoch(trainer: Trainer) -> None:
    """Begin the next epoch after resuming; the trainer would first run a step of the old one."""
    trainer.fit_loop.epoch_loop.restarting = False


def progress_in(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The progress counts of a checkpoint, to be changed in place: of batches, and of epochs.

    Each maps ``total`` and ``current`` to the numbers of ``ready``, ``started``, ``processed`` and ``completed`` ones.
    That of batches has ``is_last_batch`` as well.
    """
    loop = checkpoint["loops"]["fit_loop"]
    return loop["epoch_loop.batch_progress"], loop["epoch_progress"]


def add_to_logged_step(checkpoint: dict[str, Any], steps: int) -> None:
    """Change the step from which a checkpoint's run continues to log."""
    checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] += steps


def cluster_environment(trainer: Trainer) -> ClusterEnvironment | None:
    """SLURM, torchrun, ...; also of a trainer with a single device, whose strategy does not know it."""
    return trainer._accelerator_connector.cluster_environment


def last_saved_step(trainer: Trainer) -> int:
    """The step of the newest checkpoint of this process; 0 before the first."""
    return max((getattr(saver, "_last_global_step_saved", 0) for saver in trainer.checkpoint_callbacks), default=0)


def loss_scale(trainer: Trainer) -> Tensor | None:
    """Scalar: the factor of the loss in 16-mixed, on the device, so that the host need not wait; None without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else scaler._scale


def unscales_gradients(optimizer: Optimizer) -> bool:
    """Whether the optimizer itself divides by the loss scale of 16-mixed, and skips non-finite steps (a fused one).

    The name is torch's; the trainer's precision plugin relies on it too.
    """
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def shard_over_all_ranks(strategy: ModelParallelStrategy) -> None:
    """Divide the weights over all ranks of all nodes; by default Lightning divides within a node only."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


def save_last(saver: ModelCheckpoint, trainer: Trainer) -> None:
    """Save ``last.ckpt`` now, if the callback's ``save_last`` is set."""
    saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))


class CheckpointHooks(ModelCheckpoint):
    """``ModelCheckpoint`` with public names for the steps of saving that a subclass changes."""

    def has_nothing_to_save(self, trainer: Trainer) -> bool:
        """Whether this step is saved already, or the trainer does not train, or only tries out with fast_dev_run."""
        return self._should_skip_saving_checkpoint(trainer)

    def write_best(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Save if the monitored metric is among the best.

        Raises:
            MisconfigurationException: If a validation has run and there is no such metric.
        """
        super()._save_topk_checkpoint(trainer, metrics)

    def write_last(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Save ``last.ckpt``."""
        super()._save_last_checkpoint(trainer, metrics)

    def write(self, trainer: Trainer, path: str) -> None:
        """Save to this path."""
        super()._save_checkpoint(trainer, path)

    def may_remove(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Whether the previous checkpoint is removed once the current one is saved."""
        return super()._should_remove_checkpoint(trainer, previous, current)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self.write_best(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.save_last:
            self.write_last(trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.write(trainer, filepath)

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        return self.may_remove(trainer, previous, current)


class CommandHooks(LightningCLI):
    """``LightningCLI`` with public names for two steps of parsing that a subclass changes."""

    def add_command_arguments(self, parser: LightningArgumentParser, command: str) -> None:
        """Add flags to one command; ``add_arguments_to_parser`` adds them to all."""

    def check_checkpoint_path(self) -> None:
        """Check ``--ckpt_path`` once the arguments are parsed. Lightning would take hyper-parameters from that file."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self.add_command_arguments(parser, subcommand)
        return parser

    def _parse_ckpt_path(self) -> None:
        self.check_checkpoint_path()
