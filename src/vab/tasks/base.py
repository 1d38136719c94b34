"""What every task shares: the backbone, the optimizer with its schedule, and reading a checkpoint back."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from vab.backbone import Backbone
from vab.engines import FSDP, compile_blocks, local, shard, whole
from vab.flops import step_flops
from vab.lightning_internals import attached_trainer, is_accumulating
from vab.spec import Batch, SegmentSpec, UserError
from vab.tasks.building import Built, build, build_later, class_of, class_or_none, described_as
from vab.tasks.checkpoints import find_checkpoint, reading, require_finite
from vab.tasks.exported import WEIGHTS, plain_names, read_exported
from vab.tasks.optim import decay_groups, linear_warmup_decay, made_optimizer, take_settings
from vab.tokens.noise import fold_in, record_keys

_LENGTHS = ("segment_seconds", "num_steps", "video_fps", "num_frames")
"""What may differ between a run and the one that it begins with: positions are computed, not learned."""
_FREE = ("spec", "dropout", "num_joint_layers", "activation_checkpointing")
"""Arguments of a backbone that may differ, too."""
_SHOWN = 3
"""Weights that are named where many do not fit."""

Charts = dict[str, dict[str, list[str]]]
"""Category -> chart -> patterns of the tags that it draws: pages of TensorBoard's custom scalars."""


class BaseTask(LightningModule):
    """The backbone and how it is optimised; a task adds its steps.

    Hyper-parameters are plain JSON (see ``described_as``), so every checkpoint opens with
    ``torch.load(..., weights_only=True)``.
    """

    generates: ClassVar[bool] = False
    """Whether the task makes sound."""
    loss_charts: ClassVar[dict[str, list[str]]] = {}
    """What a run's page in TensorBoard draws beside the loss: chart -> patterns of the tags."""
    charts: ClassVar[Charts] = {}
    """The page's categories for this task alone."""
    main_metrics: Sequence[str] = ()
    """Tags of the metrics by which runs are compared, beside ``val/loss``."""

    def __init__(
        self,
        backbone: Backbone,
        optimizer: Callable[[Iterable], Optimizer] = lambda params: AdamW(
            params, lr=2e-4, weight_decay=1e-6, fused=True
        ),
        warmup_steps: int = 20_000,
        schedule_steps: int | None = 300_000,
        final_lr_ratio: float = 0.0,
        seed: int = 0,
        init_from: str | None = None,
        compile: bool | str = False,
    ) -> None:
        """Configure the optimisation.

        Args:
            backbone: The network.
            optimizer: Takes parameter groups. The values are the follow-up's (VATT): AdamW 2e-4, decay 1e-6; VAB's own
                are not printed.
            warmup_steps: Steps over which the learning rate rises linearly from 0 (VATT's value).
            schedule_steps: Step at which the linear fall ends; none means the trainer's ``max_steps`` (VATT's value).
            final_lr_ratio: Learning rate at the end of the fall, as a share of the top one.
            seed: Of the task's own randomness (masks, feature dropout, dropout), apart from the order's.
            init_from: Checkpoint, or a run's folder, with whose weights a run begins; of whatever task.
            compile: Compile the backbone's blocks for training (``torch.compile``); a string names the backend.

        Raises:
            UserError: If a number is out of range, or the optimizer refuses its arguments.
        """
        super().__init__()
        if warmup_steps < 0 or not 0 <= final_lr_ratio <= 1:
            raise UserError(
                f"warmup_steps must be 0 or more and final_lr_ratio in [0, 1], got {warmup_steps} and {final_lr_ratio}"
            )
        self.backbone = backbone if isinstance(backbone, nn.Module) else build(backbone)
        # By its description: a callable of the command line's drags its parser into every copy of the module.
        described = described_as(optimizer)
        self.optimizer_class: str = described["class_path"]
        self.make_optimizer = build_later(described)
        self.warmup_steps = warmup_steps
        self.schedule_steps = schedule_steps
        self.final_lr_ratio = final_lr_ratio
        self.seed = seed
        self.init_from = init_from
        self.compile_backend = compile if isinstance(compile, str) else "inductor" if compile else None
        self._losses_of_step: list[Tensor] = []  # times their weights, and the weights
        self.step_loss: Tensor | None = None
        """Scalar: the loss of the last optimizer step, over all its batches and ranks."""
        self._beginning: str | UserError | None = None
        # Of the checkpoint that a run continues from: its step, learning rate as a share of the top, and whether that
        # is where its schedule ended.
        self._resumed: tuple[int, float, bool] | None = None

    @property
    def logs_this_step(self) -> bool:
        """Whether the trainer will write what this training step logs."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.global_step + 1) % every == 0

    @property
    def spec(self) -> SegmentSpec:
        """The segment that this model knows."""
        return self.backbone.spec

    def remember(self, arguments: Mapping[str, Any]) -> None:
        """Store the arguments of a task as hyper-parameters, in JSON.

        Args:
            arguments: ``locals()`` of ``__init__``, before it has variables of its own.

        Raises:
            UserError: If an argument has no form in JSON.
        """
        given = {name: described_as(value) for name, value in arguments.items() if name not in ("self", "__class__")}
        self.save_hyperparameters(given, logger=False)
        self.hparams.setdefault("_class_path", f"{type(self).__module__}.{type(self).__name__}")
        try:
            json.dumps(dict(self.hparams))
        except TypeError as error:
            raise UserError(f"hyper-parameters must be plain JSON, or checkpoints would not reload: {error}") from error

    def setup(self, stage: str) -> None:
        """Take the codec's codebooks from the data set, and refuse data that the model was not made for."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        self.spec.require(data.spec, "model", "shards")
        if not self.backbone.has_codebooks:
            self.backbone.set_codebooks(data.codebooks)
        if stage == "fit" and self.init_from is not None:
            # Here, before the strategy takes the weights over; only later is it known whether the run is a resumed one,
            # which has its own weights, and for which the file may be gone.
            try:
                self._beginning = self.begin_with(self.init_from)
            except UserError as error:
                self._beginning = error

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BaseTask:
        """Move or convert the network; sums of metrics stay in their own types, also where weights are bfloat16."""
        types = [
            (metric, name, default.dtype)
            for metric in self.modules()
            if isinstance(metric, Metric)
            for name, default in metric._defaults.items()
            if isinstance(default, Tensor)
        ]
        super()._apply(fn, recurse)
        for metric, name, dtype in types:
            default = metric._defaults[name]
            assert isinstance(default, Tensor)
            metric._defaults[name] = default.to(dtype)
            setattr(metric, name, getattr(metric, name).to(dtype))
        return self

    def configure_model(self) -> None:
        """Make the network what the run's engine needs, in place; names and shapes of weights stay.

        Raises:
            UserError: If this task cannot be trained on that engine.
        """
        blocks = self.backbone.blocks
        trainer = attached_trainer(self)
        if self.compile_backend is not None and trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            compile_blocks(blocks, self.compile_backend)
        if trainer is not None and isinstance(trainer.strategy, FSDP):
            self.require_shardable()
            mesh = trainer.strategy.device_mesh["data_parallel"]
            shard(self, blocks, mesh)

    def require_shardable(self) -> None:
        """Refuse weights that cannot be sharded.

        Raises:
            UserError: If there are any that are trained.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 0 and parameter.requires_grad:
                raise UserError(
                    f"{name} is a single number, which cannot be sharded: train with --trainer.strategy ddp"
                )

    def take_loss(self, loss: Tensor, weight: Tensor | None = None) -> Tensor:
        """What a training step gives back of its loss; the step's loss over all its batches and ranks is logged.

        A step on several ranks, or with gradients accumulated, takes the mean of the batches' losses. Of batches with
        unlike numbers of hidden codes that is not the mean over codes which one large batch would have. So each mean
        is multiplied by its weight here, and the gradient divided by all ranks' and batches' weights at the end.

        Args:
            loss: Scalar, a mean.
            weight: Scalar, how much it is a mean of; where not given all batches of a step are alike.
        """
        trainer = self.trainer
        if trainer.world_size * trainer.accumulate_grad_batches == 1:
            self.step_loss = loss.detach()
            self.log("train/loss", loss, prog_bar=True)
            return loss
        if weight is None:
            weight = torch.ones_like(loss)
        loss = loss * weight
        self._losses_of_step.append(torch.stack((loss, weight)).detach().float())
        return loss

    def on_after_backward(self) -> None:
        """Once a step's gradients are all there, divide them by what they are a sum of. See `take_loss`."""
        trainer = self.trainer
        if not self._losses_of_step or is_accumulating(trainer):
            return
        loss, total = trainer.strategy.reduce(torch.stack(self._losses_of_step).sum(0), reduce_op="sum")
        self._losses_of_step.clear()
        self.step_loss = loss / total
        self.log("train/loss", self.step_loss, prog_bar=True)
        # The trainer has divided by the batches of a step, and the strategy by the ranks.
        factor = trainer.world_size * trainer.accumulate_grad_batches / total
        for parameter in self.parameters():
            if parameter.grad is not None:
                local(parameter.grad).mul_(factor.to(parameter.grad.dtype))

    def gradient_norm(self) -> Tensor:
        """Scalar, L2, of all gradients as they are now; of sharded ones all ranks must ask at once."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        return whole(torch.nn.utils.get_total_norm(gradients))

    def on_fit_start(self) -> None:
        """Say what a new run began with, or why it could not."""
        self._losses_of_step.clear()
        if isinstance(self._beginning, UserError):
            raise self._beginning
        if self._beginning is not None:
            rank_zero_info(self._beginning)
        self._compare_schedules()

    def step_flops(self, records: int) -> int:
        """Floating-point operations of the backbone in a training step of so many records, forward and backward."""
        return step_flops(self.spec, self.backbone.init_args, records)

    def lr_factor(self, name: str) -> float:
        """What the learning rate of a parameter is multiplied by."""
        return 1.0

    def training_keys(self, batch: Batch) -> Tensor:
        """(B,) int64: a key for each record of a training batch, another in each epoch and each time it is drawn."""
        keys = fold_in(record_keys(self.seed, batch.index), self.current_epoch)
        return torch.where(batch.draw > 0, fold_in(keys, batch.draw), keys)

    def require_video(self, doing: str) -> None:
        """Refuse data of which some records are sound alone.

        Raises:
            UserError: If there are any.
        """
        data = getattr(self.trainer, "datamodule", None)
        for dataset in () if data is None else (data.train_dataset, data.val_dataset):
            if count := dataset.without_video():
                raise UserError(
                    f"{count} of {len(dataset)} records of {dataset.folder} have no video, and there is nothing to "
                    f"{doing}: extract with --without_video leave_out"
                )

    def begin_with(self, checkpoint: str | Path) -> str:
        """Take the weights that a trained task and this one have in common; averaged ones, where it has them.

        Segments may be of another length or frame rate; codec, vision encoder and the backbone's sizes must be equal.

        Returns:
            What was taken, what is new, and what of the other was left, in words.

        Raises:
            UserError: If there is no checkpoint, or it does not fit.
        """
        other = load_task(checkpoint)
        lengths = {name: getattr(self.spec, name) for name in _LENGTHS}
        replace(other.spec, **lengths).require(self.spec, "init_from", "shards")
        self._require_sizes(other.backbone.init_args, f"init_from {checkpoint}", _FREE)
        mine, theirs = self.state_dict(), other.state_dict()
        taken = {name: value for name, value in theirs.items() if name in mine and mine[name].shape == value.shape}
        self.load_state_dict(taken, strict=False)
        self.backbone.has_codebooks = True
        told = f"began with {find_checkpoint(checkpoint)} ({type(other).__name__}): took {_parts(taken)}"
        if new := mine.keys() - taken.keys():
            told += f"; new: {_parts(new)}"
        if left := theirs.keys() - taken.keys():
            told += f"; not taken: {_parts(left)}"
        return told

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on other segments, codecs or features than the data at hand.

        Weights do not show it: their shapes fit, and the codebooks of the checkpoint would take the data's place.
        """
        self._beginning = None
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
            # Without an average the run goes on with the weights that its optimizer state belongs to.
            checkpoint["state_dict"] = checkpoint["live_state_dict"]

    def on_train_start(self) -> None:
        """Sharded weights are read later than others."""
        self._compare_schedules()

    def _compare_schedules(self) -> None:
        """Say so if this run's schedule continues with another learning rate than the checkpoint's.

        Raises:
            UserError: If that schedule has ended, and none is named that would raise the learning rate again.
        """
        if self._resumed is None:
            return
        (step, before, has_ended), self._resumed = self._resumed, None
        end = self._end_of_schedule()
        after = linear_warmup_decay(self.warmup_steps, end, self.final_lr_ratio)(step)
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
            f" now ends at step {end}"
        )

    def _end_of_schedule(self) -> int:
        return self.schedule_steps if self.schedule_steps is not None else int(self.trainer.estimated_stepping_batches)

    def _require_own(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the state of another task, network or optimizer, whose names and shapes torch would stumble over.

        Where no trainer has read the file the task was made from it, and the segments alone are compared.

        Raises:
            UserError: Saying what differs.
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
        free = [name for name in _FREE if name != "num_joint_layers" or not has_joint_part]
        self._require_sizes(backbone, f"checkpoint {path}", free)
        if self.strict_loading:
            self._require_weights(checkpoint["state_dict"], f"checkpoint {path}")
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
        """Whether that is the name of this task's class; the command line may write a shorter one than Python."""
        kind = class_or_none(class_path, BaseTask)
        is_kin = kind is not None and (isinstance(self, kind) or issubclass(kind, type(self)))
        return is_kin or class_path == self.hparams["_class_path"]

    def _require_sizes(self, theirs: Built, called: str, free: Iterable[str]) -> None:
        """Refuse a backbone with other arguments than this one's, but for the ``free`` ones.

        Raises:
            UserError: With both values of each.
        """
        defaults = {name: parameter.default for name, parameter in inspect.signature(Backbone).parameters.items()}
        sizes = [
            f"{name}: {theirs.get(name, defaults[name])} != {mine}"
            for name, mine in self.backbone.init_args.items()
            if name not in free and theirs.get(name, defaults[name]) != mine
        ]
        if sizes:
            raise UserError(
                f"{called} has another backbone (its value != this one's: {'; '.join(sizes)}): give the same"
                " --model.backbone"
            )

    def _require_weights(self, theirs: dict[str, Tensor], called: str) -> None:
        """Refuse weights of other names or shapes than this task's.

        Raises:
            UserError: With the first that do not fit.
        """
        mine = self.state_dict()
        wrong = [f"it has no {name}" for name in mine.keys() - theirs.keys()]
        wrong += [f"there is no {name} here" for name in theirs.keys() - mine.keys()]
        wrong += [
            f"{name}: {tuple(theirs[name].shape)} != {tuple(mine[name].shape)}"
            for name in mine.keys() & theirs.keys()
            if theirs[name].shape != mine[name].shape
        ]
        if wrong:
            more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise UserError(
                f"the weights of {called} do not fit this model ({'; '.join(sorted(wrong)[:_SHOWN])}{more}): give the"
                " config.yaml of its run as --config"
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed this step's dropout from its place in the run, so that a resumed run draws what it would have drawn."""
        torch.manual_seed(fold(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Any | None = None,
    ) -> None:
        """Clip as the trainer does, and a fused optimizer's gradients too, which it refuses with bfloat16 for no cause.

        The reason for refusing is a scale on the gradients, which a fused optimizer takes off after the clipping.
        Only 16-mixed has one.

        Raises:
            UserError: If that is the precision.
        """
        precision = self.trainer.precision_plugin
        if gradient_clip_val and getattr(precision, "scaler", None) is not None and optimizer.defaults.get("fused"):
            raise UserError(
                "a fused optimizer cannot have its gradients clipped in 16-mixed: --trainer.precision bf16-mixed, or "
                "--model.optimizer.fused false"
            )
        algorithm = gradient_clip_algorithm or GradClipAlgorithmType.NORM
        Precision.clip_gradients(precision, optimizer, gradient_clip_val or 0.0, algorithm)

    def configure_optimizers(self) -> Any:
        """Groups with and without weight decay, and a linear rise and fall of the learning rate.

        Raises:
            UserError: If the optimizer refuses its arguments or these weights, or the schedule ends before its top.
        """
        optimizer = made_optimizer(self.make_optimizer, decay_groups(self, self.lr_factor))
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_factor"]
        end = self._end_of_schedule()
        if self.warmup_steps >= end and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise UserError(
                f"warmup_steps {self.warmup_steps} must be below the schedule's {end} steps: "
                f"lower --model.warmup_steps or raise --trainer.max_steps"
            )
        schedule = LambdaLR(optimizer, linear_warmup_decay(self.warmup_steps, end, self.final_lr_ratio))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _parts(names: Iterable[str]) -> str:
    """Names of weights as a short list of the modules that they belong to."""
    modules = (name.removeprefix("backbone.").partition(".")[0] for name in names)
    return ", ".join(dict.fromkeys(sorted(modules)))


def sum_over(positions: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum over each record's positions that are there, and how many those are.

    Args:
        positions: (B, P, D) float. Padding holds anything.
        lengths: (B,) int64, 0 or more: the first so many count; None if all do.

    Returns:
        (B, D) and (B, 1) float32, to be divided for a mean.
    """
    if lengths is None:
        total = positions.sum(1, dtype=torch.float32)
        return total, total.new_full((len(positions), 1), positions.shape[1])
    counted = torch.arange(positions.shape[1], device=lengths.device) < lengths[:, None]  # (B, P)
    kept = positions.masked_fill(~counted[..., None], 0.0)
    return kept.sum(1, dtype=torch.float32), lengths[:, None].to(torch.float32)


def linear_in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in float32 or wider, also under autocast and with weights in bfloat16.

    For outputs whose order is a metric: in bfloat16 scores are often equal, and ties count against the right one.

    Args:
        layer: (D, E).
        x: (..., D) float.

    Returns:
        (..., E) float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        if layer.weight.dtype in (torch.float32, torch.float64):
            scores: Tensor = layer(x.to(layer.weight.dtype))
            return scores.float()
        return F.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())


def fold(*values: int) -> int:
    """One non-negative integer below 2**31 from several, every one of which counts (FNV-1a over the values)."""
    folded = 0xCBF29CE484222325
    for value in values:
        folded = ((folded ^ (value & 0xFFFFFFFFFFFFFFFF)) * 0x100000001B3) % 2**64
    return (folded >> 32) % 2**31


def load_task(checkpoint: str | Path, weights: Literal["ema", "live"] = "ema") -> BaseTask:
    """Read a trained task back, on the CPU and ready to use, whatever run or command wrote it.

    Args:
        checkpoint: A ``.ckpt`` file, a run's folder, of which the newest ``last.ckpt`` is taken, or an exported model.
        weights: The averaged weights where the run kept an average, or the live ones.

    Raises:
        UserError: If there is no checkpoint there, or it is not one of vab's.
    """
    path = find_checkpoint(checkpoint)
    with reading(path):
        if path.suffix == Path(WEIGHTS).suffix:
            content = read_exported(path)
            if weights == "live" and content["weights"] == "ema":
                raise UserError(f"{path.parent} holds averaged weights only: leave --weights out, or export live ones")
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        settings = {name: value for name, value in content["hyper_parameters"].items() if not name.startswith("_")}
        task: BaseTask = class_of(content["hyper_parameters"]["_class_path"], BaseTask)(**settings)
        state = content["state_dict"] if weights == "ema" else content.get("live_state_dict", content["state_dict"])
        task.load_state_dict(plain_names(state))
        require_finite(state, path)
        task.on_load_checkpoint(content)
    return task.eval()
