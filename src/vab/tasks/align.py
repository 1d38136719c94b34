"""Stage two: contrastive alignment of sound and video, for retrieval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from vab.backbone import Backbone
from vab.flops import step_flops
from vab.lightning_internals import is_accumulating
from vab.losses import info_nce
from vab.metrics.recall import CUTS, Retrieval
from vab.spec import Batch, UserError
from vab.tasks.base import BaseTask
from vab.tasks.layers import linear_in_float32, sum_over

_LARGEST_SCALE = 100.0
"""CLIP's bound: a temperature of 0.01. Beyond it training becomes unstable."""


class AlignTask(BaseTask):
    """Contrastive alignment of the two modalities, each alone through the backbone's modality blocks.

    Source: VAB, Su et al. 2024, the contrastive stage: the first N1 layers, unmasked tokens, mean over positions; the
    width of the projection is the follow-up's (VATT). Temperature and learning rate are not printed.
    """

    charts: ClassVar = {
        "Retrieval": {
            "recall, video for a sound": [r"val/recall_at_\d+_a2v$"],
            "recall, sound for a video": [r"val/recall_at_\d+_v2a$"],
            "median rank": [r"val/median_rank_\w+$"],
            "temperature": [r"train/temperature$"],
        }
    }
    accumulates = False
    main_metrics = tuple(f"val/recall_at_{cut}_{way}" for way in ("a2v", "v2a") for cut in CUTS)

    def __init__(
        self,
        backbone: Backbone,
        optimizer: Callable[[Iterable], Optimizer] = lambda params: AdamW(
            params, lr=1e-4, weight_decay=1e-6, fused=True
        ),
        warmup_steps: int | float = 2_000,
        schedule_steps: int | None = None,
        final_lr_ratio: float = 0.0,
        seed: int = 0,
        init_from: str | None = None,
        embedding_dim: int = 768,
        temperature: float = 0.05,
        learn_temperature: bool = True,
        micro_batch_size: int | None = None,
        compile: bool | str = False,
    ) -> None:
        """Configure the stage.

        Args:
            backbone: The network; its joint blocks and heads are removed.
            optimizer: Takes parameter groups (our values: none are printed).
            warmup_steps: Steps over which the learning rate rises linearly from 0; below 1, a share of the schedule.
            schedule_steps: Step at which the linear fall ends; none means the trainer's ``max_steps``.
            final_lr_ratio: Learning rate at the end of the fall, as a share of the top one.
            seed: Of dropout.
            init_from: Checkpoint, or a run's folder, whose weights the run begins with.
            embedding_dim: E (VATT's value).
            temperature: What cosines are divided by at the start (CAV-MAE's value).
            learn_temperature: Train the temperature, down to 0.01 (CLIP's bound).
            micro_batch_size: Records that go through the network at once. Activations are recomputed in the backward
                pass; the gradient is that of the whole batch (as in GradCache, Gao et al. 2021). It needs memory for
                this many records and about a third more time. None: the datamodule's ``batch_size``.
            compile: Compile the backbone's blocks for training (``torch.compile``); a string names the backend.

        Raises:
            UserError: If a number is out of range.
        """
        super().__init__(backbone, optimizer, warmup_steps, schedule_steps, final_lr_ratio, seed, init_from, compile)
        self.remember(locals())
        if embedding_dim < 1 or temperature <= 0 or (micro_batch_size is not None and micro_batch_size < 1):
            raise UserError(
                "embedding_dim and micro_batch_size must be 1 or more and temperature above 0, got "
                f"{embedding_dim}, {micro_batch_size} and {temperature}"
            )
        self.backbone.drop_joint_part()
        self.audio_projection = nn.Linear(self.backbone.dim, embedding_dim)
        self.video_projection = nn.Linear(self.backbone.dim, embedding_dim)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learn_temperature)
        self.micro_batch_size = self._records_at_once = micro_batch_size
        self.retrieval = Retrieval()

    def setup(self, stage: str) -> None:
        """As every task; and refuse records without video."""
        super().setup(stage)
        self.require_video("align")
        if stage == "fit" and self.trainer.accumulate_grad_batches > 1:
            rank_zero_info(
                "accumulated batches are not negatives of each other: for a large batch use --data.global_batch_size"
            )
        self._records_at_once = self.micro_batch_size or getattr(
            getattr(self.trainer, "datamodule", None), "max_batch_size", None
        )

    def step_flops(self, records: int) -> int:
        """Each modality alone through the modality blocks; recomputing for micro-batches is not counted."""
        sizes = self.backbone.init_args
        alone = [{"visual": modality == "video", "audio": modality == "audio"} for modality in ("audio", "video")]
        return sum(step_flops(self.spec, sizes, records, joint=False, **which) for which in alone)

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by: the inverse of the temperature, scalar."""
        return self.log_scale.exp()

    def embed_audio(self, codes: Tensor, steps: Tensor | None = None) -> Tensor:
        """Embed sounds: (B, K, T) int64 codes, (B,) valid steps or None, to (B, E) float32 of unit length."""
        return _embedding(self.backbone.encode(codes=codes, steps=steps)[1], steps, self.audio_projection)

    def embed_video(self, features: Tensor, frames: Tensor | None = None) -> Tensor:
        """Embed videos: (B, V, C) float features, (B,) valid frames or None, to (B, E) float32 of unit length."""
        return _embedding(self.backbone.encode(features=features, frames=frames)[0], frames, self.video_projection)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Audio and video embeddings, (B, E) float32 each, of unit length."""
        steps, frames = batch.lengths
        return self.embed_audio(batch.codes, steps), self.embed_video(batch.features, frames)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """InfoNCE against the records of all ranks."""
        audio, video = self._embed_in_parts(self.in_one_form(batch))
        # With gradients: other ranks' queries train a record's embedding as well.
        gallery = (self._of_all_ranks(audio), self._of_all_ranks(video))
        same_source = batch.source[:, None] == self._of_all_ranks(batch.source)
        loss = info_nce(audio, video, self.scale, gallery, self.global_rank * len(batch), same_source)
        if self.logs_this_step and not is_accumulating(self.trainer):
            self.log_after_step(1 / self.scale, "train/temperature")
        return self.take_loss(loss)

    def on_train_batch_end(self, *unused: Any) -> None:
        """Keep the temperature at or above CLIP's bound."""
        super().on_train_batch_end()
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(_LARGEST_SCALE))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Embed; the whole data set is the gallery, in which all segments of a recording match each other."""
        batch = self.in_one_form(batch)
        audio, video = self(batch)
        rows = (audio, video, batch.index, batch.source)
        self.retrieval.update(*(tensor[batch.valid] for tensor in rows))

    def dataset_metrics(self, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        """The loss, and recall by recording, both ways over the whole data set."""
        self.retrieval.scale = float(self.scale)
        metrics: dict[str, Tensor] = self.retrieval.compute()
        self.retrieval.reset()
        return metrics

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Embeddings, with ``index`` and ``valid`` of the records."""
        audio, video = self(batch)
        return {"audio": audio, "video": video, "index": batch.index, "valid": batch.valid}

    def _of_all_ranks(self, rows: Tensor) -> Tensor:
        """(B, ...) of each rank to (ranks * B, ...), rank by rank, with gradients."""
        if self.trainer.world_size == 1:
            return rows
        gathered = self.all_gather(rows, sync_grads=rows.is_floating_point())
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1)

    def _embed_in_parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embed some records at a time; the backward pass recomputes each part, with equal dropout."""
        size, (steps, frames) = self._records_at_once, batch.lengths
        if size is None or size >= len(batch):
            return self.embed_audio(batch.codes, steps), self.embed_video(batch.features, frames)

        def in_parts(embed: Callable[..., Tensor], inputs: Tensor, lengths: Tensor | None) -> Tensor:
            parts = zip_longest(inputs.split(size), () if lengths is None else lengths.split(size))
            return torch.cat([checkpoint(embed, *part, use_reentrant=False) for part in parts])

        return in_parts(self.embed_audio, batch.codes, steps), in_parts(self.embed_video, batch.features, frames)


def _embedding(positions: Tensor | None, lengths: Tensor | None, projection: nn.Linear) -> Tensor:
    """(B, P, D) outputs of the backbone to (B, E) float32: mean over valid positions, projection, unit length."""
    assert positions is not None
    total, count = sum_over(positions, lengths)
    return F.normalize(linear_in_float32(projection, total / count), dim=1)
