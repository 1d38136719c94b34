"""Resuming: check that a checkpoint is of this task and data, and continue its optimizer and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from vab.backbone import Backbone
from vab.lightning_internals import attached_trainer
from vab.spec import SegmentSpec, UserError
from vab.tasks.building import class_or_none
from vab.tasks.checkpoints import require_finite, require_same_sizes, require_same_weights
from vab.tasks.optim import decay_groups, linear_warmup_decay, steps_of_warmup, take_settings

FREE = ("spec", "dropout", "num_joint_layers", "activation_checkpointing")
"""Arguments of a backbone that may differ."""


class Resumable(LightningModule):
    """The part of a task that takes its state from a checkpoint of its own run."""

    backbone: Backbone
    optimizer_class: str
    make_optimizer: Callable[[Iterable], Optimizer]
    warmup_steps: int | float
    schedule_steps: int | None
    final_lr_ratio: float

    def __init__(self) -> None:
        super().__init__()
        # Of the checkpoint that the run resumes: step, learning rate as a share of the top, and whether its schedule
        # has ended.
        self._resumed: tuple[int, float, bool] | None = None

    @property
    def spec(self) -> SegmentSpec:
        """The segments that the model is made for."""
        return self.backbone.spec

    def lr_factor(self, name: str) -> float:
        """Factor of a parameter's learning rate."""
        return 1.0

    def on_fit_start(self) -> None:
        """Compare the schedules of checkpoint and run."""
        self._compare_schedules()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on other segments, codecs or features than the data of this run.

        Shapes of weights do not show it, and the checkpoint's codebooks would replace those of the data.
        """
        self._require_own(checkpoint)
        trainer = attached_trainer(self)
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        for saved in checkpoint.get("lr_schedulers", [])[:1]:
            ratio = saved["_last_lr"][0] / (saved["base_lrs"][0] or 1.0)
            final = checkpoint["hyper_parameters"].get("final_lr_ratio", 0.0)
            self._resumed = (saved["last_epoch"], ratio, math.isclose(ratio, final, abs_tol=1e-9))
        made = self.make_optimizer(decay_groups(self, self.lr_factor))
        if changes := take_settings(checkpoint, made):
            rank_zero_info(f"the optimizer goes on with the config's settings ({', '.join(changes)})")
        if "live_state_dict" not in checkpoint:
            return
        if not any(getattr(callback, "keeps_average", False) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            # Without an average the run continues with the weights that its optimizer state belongs to.
            checkpoint["state_dict"] = checkpoint["live_state_dict"]

    def on_train_start(self) -> None:
        """Compare schedules again: sharded checkpoints are read after ``on_fit_start``."""
        self._compare_schedules()

    def _compare_schedules(self) -> None:
        """Print a line if this run's schedule continues with another learning rate than the checkpoint's.

        Raises:
            UserError: If the checkpoint's schedule has ended, this run's would raise the learning rate again, and no
                ``schedule_steps`` says that it should.
        """
        if self._resumed is None:
            return
        (step, before, has_ended), self._resumed = self._resumed, None
        end = self._end_of_schedule()
        after = self.lr_schedule()(step)
        if math.isclose(before, after, rel_tol=1e-6, abs_tol=1e-9):
            return
        if has_ended and after > before and self.schedule_steps is None:
            path = self.trainer.ckpt_path
            raise UserError(
                f"the learning rate of checkpoint {path} has fallen to its end, {before:.3g} of its top; a longer run"
                f" would raise it to {after:.3g}: type --model.schedule_steps {end} to do so, or begin a run with its"
                f" weights and a new warm-up: --model.init_from {path}"
            )
        rank_zero_info(
            f"the learning rate continues at {after:.3g} of its top, not at the checkpoint's {before:.3g}: the schedule"
            f" now ends at step {end}, its warm-up at step {steps_of_warmup(self.warmup_steps, end)}"
        )

    def _require_own(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another task, network or optimizer, before torch fails on names and shapes.

        Without a trainer the task was made from the checkpoint, and only the segments are compared.

        Raises:
            UserError: With what differs.
        """
        theirs, trainer = checkpoint["hyper_parameters"], attached_trainer(self)
        path = None if trainer is None else trainer.ckpt_path
        is_fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if path is not None and not self._is_kind(theirs["_class_path"]):
            mine, other = type(self).__name__, theirs["_class_path"].rpartition(".")[2]
            remedy = (
                f"another, or begin with its weights: --model.init_from {path}" if is_fitting else "its own --config"
            )
            raise UserError(f"checkpoint {path} is of the task {other}, this one is {mine}: give {remedy}")
        backbone = theirs["backbone"]["init_args"]
        SegmentSpec.from_dict(dict(backbone["spec"])).require(self.spec, "checkpoint", "shards")
        if path is None:
            return
        has_joint_part = self.backbone.joint_blocks is not None
        free = [name for name in FREE if name != "num_joint_layers" or not has_joint_part]
        require_same_sizes(backbone, self.backbone.init_args, f"checkpoint {path}", free)
        if self.strict_loading:
            require_same_weights(checkpoint["state_dict"], self.state_dict(), f"checkpoint {path}")
        for name in ("state_dict", "live_state_dict"):
            require_finite(checkpoint.get(name, {}), path)
        if not is_fitting:
            return
        if "optimizer_states" not in checkpoint:
            raise UserError(
                f"checkpoint {path} holds weights alone, no state to go on with: --model.init_from {path} begins a run"
                " with them"
            )
        optimizer = theirs.get("optimizer", {}).get("class_path", self.optimizer_class)
        if class_or_none(optimizer, Optimizer) is not class_or_none(self.optimizer_class, Optimizer):
            raise UserError(
                f"checkpoint {path} has the state of the optimizer {optimizer}, this run's is {self.optimizer_class}:"
                f" give the same --model.optimizer, or begin with its weights: --model.init_from {path}"
            )

    def _is_kind(self, class_path: str) -> bool:
        """Whether that is the name of this task's class, which may be importable from several modules."""
        kind = class_or_none(class_path, Resumable)
        is_kin = kind is not None and (isinstance(self, kind) or issubclass(kind, type(self)))
        return is_kin or class_path == self.hparams["_class_path"]

    def lr_schedule(self) -> Callable[[int], float]:
        """Factor of the learning rate after a number of steps.

        Raises:
            UserError: If the warm-up does not end before the schedule.
        """
        end = self._end_of_schedule()
        warmup = 0 if self.trainer.fast_dev_run else steps_of_warmup(self.warmup_steps, end)  # type: ignore[attr-defined]
        return linear_warmup_decay(warmup, end, self.final_lr_ratio)

    def _end_of_schedule(self) -> int:
        return self.schedule_steps if self.schedule_steps is not None else int(self.trainer.estimated_stepping_batches)
