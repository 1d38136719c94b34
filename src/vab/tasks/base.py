"""What all tasks share: the backbone, the optimizer with its schedule, evaluation, and loading a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from vab.backbone import Backbone
from vab.engines import FSDP, compile_blocks, shard, whole
from vab.flops import step_flops
from vab.lightning_internals import attached_trainer
from vab.spec import Batch, UserError
from vab.tasks.building import build, build_later, class_of, described_as
from vab.tasks.checkpoints import find_checkpoint, reading, require_finite, require_same_sizes
from vab.tasks.exported import WEIGHTS, plain_names, read_exported
from vab.tasks.optim import decay_groups, made_optimizer
from vab.tasks.resuming import FREE, Resumable
from vab.tasks.step_metrics import StepMetrics
from vab.tokens.noise import fold_in, record_keys

_LENGTHS = ("segment_seconds", "num_steps", "video_fps", "num_frames")
"""Numbers of a segment that may differ from those of ``init_from``: positions are computed, not learned."""
Charts = dict[str, dict[str, list[str]]]
"""Category -> chart -> patterns of the tags that it draws: pages of TensorBoard's custom scalars."""


class BaseTask(StepMetrics, Resumable):
    """The backbone and how it is optimised. A task adds its steps and ``dataset_metrics``.

    Hyper-parameters are plain JSON (see ``described_as``), so every checkpoint opens with
    ``torch.load(..., weights_only=True)``.
    """

    generates: ClassVar[bool] = False
    """Whether the task makes sound."""
    accumulates: ClassVar[bool] = True
    """Whether the gradients of several small batches add up to that of a large one."""
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
        warmup_steps: int | float = 20_000,
        schedule_steps: int | None = 300_000,
        final_lr_ratio: float = 0.0,
        seed: int = 0,
        init_from: str | None = None,
        compile: bool | str = False,
    ) -> None:
        """Configure the optimisation; defaults as for ``PretrainTask``.

        Args:
            backbone: The network.
            optimizer: Takes parameter groups.
            warmup_steps: Steps over which the learning rate rises linearly from 0; below 1, a share of the schedule.
            schedule_steps: Step at which the linear fall ends; none means the trainer's ``max_steps``.
            final_lr_ratio: Learning rate at the end of the fall, as a share of the top one.
            seed: Of the task's own randomness (masks, feature dropout, dropout), apart from the order's.
            init_from: Checkpoint, or a run's folder, whose weights the run begins with; of any task.
            compile: Compile the backbone's blocks for training (``torch.compile``); a string names the backend.

        Raises:
            UserError: If a number is out of range, or the optimizer refuses its arguments.
        """
        super().__init__()
        if not warmup_steps >= 0 or (warmup_steps > 1 and warmup_steps % 1) or not 0 <= final_lr_ratio <= 1:
            raise UserError(
                "warmup_steps must be a number of steps or a share of the schedule below 1, and final_lr_ratio in"
                f" [0, 1], got {warmup_steps} and {final_lr_ratio}"
            )
        self.backbone = backbone if isinstance(backbone, nn.Module) else build(backbone)
        # Not the callable itself: the command line's holds its parser, and would copy it with the module.
        described = described_as(optimizer)
        self.optimizer_class: str = described["class_path"]
        self.make_optimizer = build_later(described)
        self.warmup_steps = warmup_steps
        self.schedule_steps = schedule_steps
        self.final_lr_ratio = final_lr_ratio
        self.seed = seed
        self.init_from = init_from
        self.compile_backend = compile if isinstance(compile, str) else "inductor" if compile else None
        self._init_message: str | UserError | None = None
        self._ragged_if_compiled: bool | None = None

    def remember(self, arguments: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """Store the arguments of a task as hyper-parameters, in JSON.

        Args:
            arguments: ``locals()`` of ``__init__``, before it has variables of its own.
            **named: Arguments one by one, for a task that adds some to those of its base class.

        Raises:
            UserError: If an argument has no form in JSON.
        """
        pairs = {**(arguments or {}), **named}.items()
        given = {name: described_as(value) for name, value in pairs if name not in ("self", "__class__")}
        self.save_hyperparameters(given, logger=False)
        self.hparams.setdefault("_class_path", f"{type(self).__module__}.{type(self).__name__}")
        try:
            json.dumps(dict(self.hparams))
        except TypeError as error:
            raise UserError(f"hyper-parameters must be plain JSON, or checkpoints would not reload: {error}") from error

    def setup(self, stage: str) -> None:
        """Take the codec's codebooks from the data set; refuse data that the model is not made for."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        self.spec.require(data.spec, "model", "shards")
        if not self.backbone.has_codebooks:
            self.backbone.set_codebooks(data.codebooks)
        if stage == "fit" and self.init_from is not None:
            # Weights must be read before the strategy takes them over. Whether the run is a resumed one is known only
            # later: it has its own weights, and the file may be gone, so the error waits.
            try:
                self._init_message = self.begin_with(self.init_from)
            except UserError as error:
                self._init_message = error

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BaseTask:
        """Move or convert the network; states of metrics keep their types, also with weights in bfloat16."""
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
        """Compile or shard the network as the run's engine needs, in place; names and shapes of weights stay.

        Raises:
            UserError: If this task cannot be trained on that engine.
        """
        blocks = self.backbone.blocks
        trainer = attached_trainer(self)
        if self.compile_backend is not None and trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            compile_blocks(blocks, self.compile_backend)
            datasets = self._datasets()
            self._ragged_if_compiled = not datasets or any(dataset.has_short_records() for dataset in datasets)
        if trainer is not None and isinstance(trainer.strategy, FSDP):
            self.require_shardable()
            mesh = trainer.strategy.device_mesh["data_parallel"]
            shard(self, blocks, mesh, torch.bfloat16 if trainer.precision == "bf16-mixed" else None)

    def in_one_form(self, batch: Batch) -> Batch:
        """For compiled blocks: a full batch, with a mask if any record of the run needs one. Else the batch itself."""
        if self._ragged_if_compiled is None or self.trainer.state.fn != TrainerFn.FITTING:
            return batch
        if not self.trainer.training:
            size = getattr(getattr(self.trainer, "datamodule", None), "val_batch_size", len(batch))
            batch = batch.filled_up(size)
        return replace(batch, ragged=self._ragged_if_compiled)

    def _datasets(self) -> list[Any]:
        """Training and validation data of the run; empty without a datamodule of ours."""
        data = getattr(self.trainer, "datamodule", None)
        return [getattr(data, name) for name in ("train_dataset", "val_dataset") if hasattr(data, name)]

    def require_shardable(self) -> None:
        """Refuse trained weights that cannot be sharded.

        Raises:
            UserError: If there is one.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 0 and parameter.requires_grad:
                raise UserError(
                    f"{name} is a single number, which cannot be sharded: train with --trainer.strategy ddp"
                )

    def dataset_metrics(self, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        """Scalar metrics of all records that ``validation_step`` was given since the last call, by the name to log."""
        return {}

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole data set, each record once."""
        self._log_metrics("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole data set, each record once."""
        self._log_metrics("test")

    def _log_metrics(self, stage: Literal["val", "test"]) -> None:
        for name, value in self.dataset_metrics(stage).items():
            self.log(f"{stage}/{name}", value.float(), prog_bar=name == "loss")

    def on_fit_start(self) -> None:
        """Print which weights were loaded from ``init_from``, or raise the error that it met."""
        if isinstance(self._init_message, UserError):
            raise self._init_message
        if self._init_message is not None:
            rank_zero_info(self._init_message)
        super().on_fit_start()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed run has its own weights instead of those of ``init_from``."""
        self._init_message = None
        super().on_load_checkpoint(checkpoint)

    def gradient_norm(self) -> Tensor:
        """Scalar: L2 norm of all gradients now. With sharded weights all ranks must call this."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        return whole(torch.nn.utils.get_total_norm(gradients))

    def step_flops(self, records: int) -> int:
        """Floating-point operations of the backbone in a training step, forward and backward."""
        return step_flops(self.spec, self.backbone.init_args, records)

    def training_keys(self, batch: Batch) -> Tensor:
        """(B,) int64: a key for each record of a training batch, different in each epoch and at each draw."""
        keys = fold_in(record_keys(self.seed, batch.index), self.current_epoch)
        return torch.where(batch.draw > 0, fold_in(keys, batch.draw), keys)

    def require_video(self, doing: str) -> None:
        """Refuse data if some records have no video.

        Raises:
            UserError: If some have none.
        """
        for dataset in self._datasets():
            if count := dataset.without_video():
                raise UserError(
                    f"{count} of {len(dataset)} records of {dataset.folder} have no video, and there is nothing to "
                    f"{doing}: extract with --without_video leave_out"
                )

    def begin_with(self, checkpoint: str | Path) -> str:
        """Take the weights that a trained task and this one have in common; averaged ones if the checkpoint has them.

        Segments may differ in length and frame rate; codec, vision encoder and the backbone's sizes must be equal.

        Returns:
            A message that names which weights were loaded, which are new and which were not used.

        Raises:
            UserError: If there is no checkpoint, or it does not fit.
        """
        other = load_task(checkpoint)
        lengths = {name: getattr(self.spec, name) for name in _LENGTHS}
        replace(other.spec, **lengths).require(self.spec, "init_from", "shards")
        require_same_sizes(other.backbone.init_args, self.backbone.init_args, f"init_from {checkpoint}", FREE)
        mine, theirs = self.state_dict(), other.state_dict()
        taken = {name: value for name, value in theirs.items() if name in mine and mine[name].shape == value.shape}
        self.load_state_dict(taken, strict=False)
        self.backbone.has_codebooks = True
        message = f"began with {find_checkpoint(checkpoint)} ({type(other).__name__}): took {_parts(taken)}"
        if new := mine.keys() - taken.keys():
            message += f"; new: {_parts(new)}"
        if left := theirs.keys() - taken.keys():
            message += f"; not taken: {_parts(left)}"
        return message

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed this step's dropout from its place in the run, so that a resumed run draws the same."""
        torch.manual_seed(fold(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Any | None = None,
    ) -> None:
        """Clip as the trainer does, also with a fused optimizer in bf16-mixed, which the trainer refuses.

        The trainer's reason is a scale on the gradients, which a fused optimizer removes after the clipping. Only
        16-mixed has one.

        Raises:
            UserError: If the precision is 16-mixed and the optimizer fused.
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
            UserError: If the optimizer refuses its arguments or these weights, or the warm-up does not end before the
                schedule.
        """
        optimizer = made_optimizer(self.make_optimizer, decay_groups(self, self.lr_factor))
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_factor"]
        schedule = LambdaLR(optimizer, self.lr_schedule())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fold(*values: int) -> int:
    """One integer in [0, 2**31) that depends on all of several (FNV-1a over the values)."""
    folded = 0xCBF29CE484222325
    for value in values:
        folded = ((folded ^ (value & 0xFFFFFFFFFFFFFFFF)) * 0x100000001B3) % 2**64
    return (folded >> 32) % 2**31


def _parts(names: Iterable[str]) -> str:
    """The modules that weights of these names belong to, as a short list."""
    modules = (name.removeprefix("backbone.").partition(".")[0] for name in names)
    return ", ".join(dict.fromkeys(sorted(modules)))


def load_task(checkpoint: str | Path, weights: Literal["ema", "live"] = "ema") -> BaseTask:
    """Load a trained task, on the CPU and in evaluation mode.

    Args:
        checkpoint: A ``.ckpt`` file, a run's folder (its newest ``last.ckpt``), or an exported model.
        weights: The averaged weights if the run kept an average, or the live ones.

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
