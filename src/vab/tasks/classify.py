"""Stage three: classification of segments by sound, video or both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanMetric

from vab.backbone import Backbone
from vab.flops import pass_flops, step_flops
from vab.metrics.classification import Classification
from vab.spec import Batch, UserError
from vab.tasks.base import BaseTask
from vab.tasks.layers import linear_in_float32, sum_over, without_padding
from vab.tokens.noise import Stream, uniform

Inputs = Literal["audio_video", "audio", "video"]
_LISTED = 5


class ClassifyTask(BaseTask):
    """Classification with the backbone's modality blocks and one linear layer.

    Source: VAB, Su et al. 2024, the classification stage: mean over the output positions of all inputs, then a linear
    layer, trained end to end from the contrastive model. Learning rates, mixup, smoothing and balancing are not
    printed; their form is CAV-MAE's (Gong et al. 2023).
    """

    charts: ClassVar = {
        "Classification": {
            "accuracy (records of one class)": [r"val/top_\d+$", r"val/top_1_macro$"],
            "mean average precision": [r"val/map$"],
            "area under the ROC curve": [r"val/roc_auc$"],
            "separation, d-prime": [r"val/d_prime$"],
        }
    }

    def __init__(
        self,
        backbone: Backbone,
        labels: Sequence[str],
        optimizer: Callable[[Iterable], Optimizer] = lambda params: AdamW(
            params, lr=1e-4, weight_decay=5e-7, fused=True
        ),
        warmup_steps: int | float = 1_000,
        schedule_steps: int | None = None,
        final_lr_ratio: float = 0.0,
        seed: int = 0,
        init_from: str | None = None,
        inputs: Inputs = "audio_video",
        multi_label: bool = False,
        label_smoothing: float = 0.1,
        mixup: float = 0.5,
        mixup_order: int = 10,
        head_lr_factor: float = 10.0,
        layer_lr_decay: float = 1.0,
        freeze_backbone: bool = False,
        head_dropout: float = 0.0,
        compile: bool | str = False,
    ) -> None:
        """Configure the stage.

        Args:
            backbone: The network; its joint blocks and heads are removed.
            labels: Names of the L classes; the command line takes them from the data.
            optimizer: Takes parameter groups (CAV-MAE's learning rate and decay for VGGSound).
            warmup_steps: Steps over which the learning rate rises linearly from 0; below 1, a share of the schedule.
            schedule_steps: Step at which the linear fall ends; none means the trainer's ``max_steps``.
            final_lr_ratio: Learning rate at the end of the fall, as a share of the top one.
            seed: Of mixup and dropout.
            init_from: Checkpoint, or a run's folder, whose weights the run begins with: an alignment's, a
                pretraining's, or another classification's, whose last layer is used if its size is the same.
            inputs: What the model sees, in training and later.
            multi_label: A record may have several classes: a sigmoid and a binary cross-entropy for each class instead
                of a softmax.
            label_smoothing: Share of the target spread over the classes; with a softmax only.
            mixup: Share of records that training mixes with their neighbour in the batch: sound and video before the
                first block, and targets.
            mixup_order: The share of each is Beta(order, order) distributed; a whole number (CAV-MAE's: 10).
            head_lr_factor: Learning rate of the linear layer as a multiple (CAV-MAE's: 10 to 100).
            layer_lr_decay: Learning rate of each block as a share of that of the block above it; 1 for equal ones.
            freeze_backbone: Train the linear layer alone: a linear probe.
            head_dropout: Share of the mean's channels that training drops before the linear layer.
            compile: Compile the backbone's blocks for training (``torch.compile``); a string names the backend.

        Raises:
            UserError: If a number is out of range, there are fewer than two labels, or one is repeated.
        """
        super().__init__(backbone, optimizer, warmup_steps, schedule_steps, final_lr_ratio, seed, init_from, compile)
        self.remember(locals())
        if inputs not in get_args(Inputs):
            raise UserError(f"inputs must be one of {', '.join(get_args(Inputs))}, got {inputs!r}")
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise UserError(
                f"classification needs two different labels or more, got {list(labels)[:_LISTED]}: extract with labels "
                "(a CSV with a column labels, or --labels_from folder), or give --data.vocabulary FILE"
            )
        if not 0 <= mixup <= 1:
            raise UserError(f"mixup must be in 0..1, got {mixup}")
        for name, share in {"label_smoothing": label_smoothing, "head_dropout": head_dropout}.items():
            if not 0 <= share < 1:
                raise UserError(f"{name} must be 0 or more and below 1, got {share}")
        if mixup_order < 1 or head_lr_factor <= 0 or not 0 < layer_lr_decay <= 1:
            raise UserError(
                "mixup_order must be 1 or more, head_lr_factor above 0 and layer_lr_decay in (0, 1], got "
                f"{mixup_order}, {head_lr_factor} and {layer_lr_decay}"
            )
        self.backbone.drop_joint_part()
        self.labels = tuple(labels)
        self.inputs = inputs
        self.multi_label = multi_label
        self.main_metrics = ["val/map"] if multi_label else ["val/top_1", "val/map"]
        self.label_smoothing = label_smoothing
        self.mixup, self.mixup_order = mixup, mixup_order
        self.head_lr_factor, self.layer_lr_decay = head_lr_factor, layer_lr_decay
        self.freeze_backbone = freeze_backbone
        self.dropout = nn.Dropout(head_dropout)
        self.classifier = nn.Linear(self.backbone.dim, len(self.labels))
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        if inputs != "audio_video":
            self.backbone.freeze_modality("visual" if inputs == "audio" else "audio")
        if freeze_backbone:
            self.backbone.requires_grad_(False)
        self.classification = Classification(self.labels)
        self.mean_loss = MeanMetric().set_dtype(torch.float64)
        self.last_metrics: dict[str, Tensor] = {}
        """The last evaluation's metrics, of each class too: see ``vab.metrics.classification.Classification``."""

    def step_flops(self, records: int) -> int:
        """Of the inputs through the modality blocks; forward only with a frozen backbone."""
        count = pass_flops if self.freeze_backbone else step_flops
        which = {"visual": self.inputs != "audio", "audio": self.inputs != "video"}
        return count(self.spec, self.backbone.init_args, records, joint=False, **which)

    def setup(self, stage: str) -> None:
        """As every task; and refuse data without the video or labels that are needed."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        if self.inputs == "video":
            self.require_video("see")
        datasets = [data.train_dataset, data.val_dataset] if stage == "fit" else []
        if datasets and not self.multi_label and getattr(data, "splice", None):
            raise UserError(
                "a spliced record has the labels of two, a softmax needs one: give --data.splice 0, or "
                "--model.multi_label true"
            )
        for dataset in datasets:
            counts = dataset.labels_per_record()
            if not self.multi_label and (counts != 1).any():
                number = int((counts != 1).argmax())
                raise UserError(
                    f"{dataset.folder}: record {dataset.key(number)} has {counts[number]} labels, a softmax needs one: "
                    "give --model.multi_label true, or extract with one label a record"
                )
            if not counts.any():
                raise UserError(f"{dataset.folder}: no record has a label: extract with labels")
        for dataset in datasets[1:]:
            counts = dataset.label_counts()
            if not ((counts > 0) & (counts < len(dataset))).any():
                raise UserError(
                    f"{dataset.folder}: all {len(dataset)} records to validate on are of the same classes: there is "
                    "nothing to tell apart"
                )
        if stage == "fit":
            rare = [name for name, count in zip(self.labels, datasets[0].label_counts(), strict=True) if not count]
            if rare:
                named = ", ".join(map(repr, rare[:_LISTED])) + (", ..." if len(rare) > _LISTED else "")
                rank_zero_info(f"{len(rare)} of {len(self.labels)} classes have no training record: {named}")

    def train(self, mode: bool = True) -> ClassifyTask:
        """Switch to training; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def lr_factor(self, name: str) -> float:
        """Factor of the linear layer; of a block, by its depth; of the layers before the blocks."""
        if name.startswith("classifier."):
            return self.head_lr_factor
        number = len(self.backbone.modality_blocks)
        if name.startswith("backbone.modality_blocks."):
            return self.layer_lr_decay ** (number - 1 - int(name.split(".")[2]))
        return 1.0 if name.startswith("backbone.modality_norm.") else self.layer_lr_decay**number

    def forward(
        self,
        codes: Tensor | None = None,
        features: Tensor | None = None,
        steps: Tensor | None = None,
        frames: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Tensor:
        """Score the classes.

        Args:
            codes: (B, K, T) int64; None where ``inputs`` is video.
            features: (B, V, C) float; None where ``inputs`` is audio.
            steps: (B,) int64, valid steps; None if all are.
            frames: (B,) int64, valid frames; None if all are.
            mix: (B,) float in [0, 1]. Share of each record; the rest is its neighbour's. None for no mixing.

        Returns:
            (B, L) float32 logits.
        """
        audio = None if codes is None else self.backbone.embed_codes(codes)
        visual = None if features is None else self.backbone.embed_features(features)
        if mix is not None:
            audio, steps = (None, steps) if audio is None else _mixed(audio, steps, mix)
            visual, frames = (None, frames) if visual is None else _mixed(visual, frames, mix)
        ends = {"steps": steps if audio is not None else None, "frames": frames if visual is not None else None}
        visual, audio = self.backbone.encode_inputs(visual, audio, **ends)
        sides = [
            sum_over(positions, lengths)
            for positions, lengths in ((visual, frames), (audio, steps))
            if positions is not None
        ]
        # Over the positions of both modalities: many more steps than frames, as in the paper.
        mean = sum(total for total, _ in sides) / sum(count for _, count in sides)
        return linear_in_float32(self.classifier, self.dropout(mean))

    @torch.no_grad()
    def probabilities(
        self,
        codes: Tensor | None = None,
        features: Tensor | None = None,
        steps: Tensor | None = None,
        frames: Tensor | None = None,
    ) -> Tensor:
        """(B, L) float32 in [0, 1]. Those of a record add up to 1, unless the model is multi-label."""
        return self._probabilities(self(codes, features, steps, frames))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Score the classes of records and of mixtures of them."""
        batch = self.in_one_form(batch)
        mix = self.shares(batch) if self.mixup else None
        logits = self._logits(batch, mix)
        targets = self._targets(batch)
        if mix is not None:
            targets = _mixed_rows(targets, mix)
        loss = self._losses(logits, targets, self.label_smoothing).mean()
        return self.take_loss(loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score the classes."""
        batch = self.in_one_form(batch)
        logits, valid = self._logits(batch), batch.valid
        self.mean_loss.update(self._losses(logits, self._targets(batch), 0.0)[valid].double())
        self.classification.update(logits[valid], batch.labels[valid].bool(), batch.index[valid])

    def dataset_metrics(self, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        """The loss and the scalars of ``Classification``; those of each class stay in ``last_metrics``."""
        self.last_metrics, loss = self.classification.compute(), self.mean_loss.compute()
        self.classification.reset()
        self.mean_loss.reset()
        return {"loss": loss} | {name: value for name, value in self.last_metrics.items() if value.ndim == 0}

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Probabilities, with ``index`` and ``valid`` of the records."""
        probabilities = self._probabilities(self._logits(batch))
        return {"probabilities": probabilities, "index": batch.index, "valid": batch.valid}

    def shares(self, batch: Batch) -> Tensor:
        """(B,) float32: the share of each record in its mixture in this epoch; 1 for those that are not mixed.

        It depends on the record, not on its batch. The ratio of two sums of ``mixup_order`` exponential numbers is Beta
        distributed. The last record of an odd batch has no neighbour.
        """
        keys = self.training_keys(batch)
        waits = -uniform(keys, Stream.MIX_SHARE, (2, self.mixup_order)).log().sum(2)  # (B, 2)
        share = waits[:, 0] / waits.sum(1)
        alone = _neighbours(len(batch), keys.device) == torch.arange(len(batch), device=keys.device)
        return share.masked_fill((uniform(keys, Stream.MIX) >= self.mixup) | alone, 1.0)

    def _logits(self, batch: Batch, mix: Tensor | None = None) -> Tensor:
        codes = None if self.inputs == "video" else batch.codes
        features = None if self.inputs == "audio" else batch.features
        logits: Tensor = self(codes, features, *batch.lengths, mix)
        return logits

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.multi_label else logits.softmax(1)

    def _targets(self, batch: Batch) -> Tensor:
        if batch.labels.shape[1] != len(self.labels):
            raise UserError(
                f"the data have {batch.labels.shape[1]} classes, this model knows {len(self.labels)} "
                f"({', '.join(self.labels[:_LISTED])}, ...): give --data.vocabulary, the list that it was trained on"
            )
        return batch.labels.float()

    def _losses(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """(B,) float32, nats: cross-entropy of each record; for several labels the mean over classes."""
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
        return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every task; and refuse a checkpoint of other classes, even if its last layer fits."""
        theirs = tuple(checkpoint["hyper_parameters"].get("labels", self.labels))
        if theirs != self.labels:
            at = next((i for i, pair in enumerate(zip(theirs, self.labels, strict=False)) if pair[0] != pair[1]), None)
            first = "" if at is None else f"; class {at} is {theirs[at]!r} there and {self.labels[at]!r} here"
            raise UserError(
                f"the checkpoint knows {len(theirs)} classes and the data have {len(self.labels)}{first}: give "
                "--data.vocabulary with the list that it was trained on"
            )
        super().on_load_checkpoint(checkpoint)


def _neighbours(count: int, device: torch.device) -> Tensor:
    """(B,) int64: 1 0 3 2 ...; the last of an odd number is its own neighbour. No even part of a batch cuts a pair."""
    number = torch.arange(count, device=device)
    other = number + 1 - 2 * (number % 2)
    return torch.where(other < count, other, number)


def _mixed(x: Tensor, lengths: Tensor | None, mix: Tensor) -> tuple[Tensor, Tensor | None]:
    """Inputs (B, P, D) mixed with the neighbours', and their lengths: those of the longer of the two."""
    if lengths is None:
        return _mixed_rows(x, mix), None
    x = without_padding(x, lengths)
    longer = torch.maximum(lengths, lengths[_neighbours(len(lengths), lengths.device)])
    return _mixed_rows(x, mix), torch.where(mix < 1, longer, lengths)


def _mixed_rows(x: Tensor, mix: Tensor) -> Tensor:
    share = mix.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return share * x + (1 - share) * x[_neighbours(len(x), x.device)]
