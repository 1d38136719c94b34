"""Stage one: predict hidden audio tokens from visible ones and the video. The trained model generates sound."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor
from torch.optim import AdamW, Optimizer

from vab.backbone import Backbone
from vab.engines import uncompiled
from vab.lightning_internals import is_accumulating
from vab.losses import (
    MaskedCodeSums,
    hidden_code_loss,
    hidden_code_loss_and_sums,
    mask_ratio_bucket,
    masked_code_sums,
)
from vab.metrics.codes import BUCKETS, GuessingQuality, guessing_table
from vab.spec import Batch, UserError
from vab.tasks.base import BaseTask
from vab.tokens.decoding import decode, guided_logits
from vab.tokens.expectation import expected_codes
from vab.tokens.masking import Masking
from vab.tokens.noise import Stream, record_keys, uniform
from vab.tokens.sampler import Sampler

_CURVES = (("validation", "val", "loss"), ("training", "train", "loss"), ("validation", "val", "accuracy"))


class PretrainTask(BaseTask):
    """Visual-conditioned masked audio token prediction.

    Source: VAB, Su et al. 2024, the pre-training stage; values that it does not print are the follow-up's (VATT).
    """

    generates = True
    loss_charts: ClassVar = {
        f"{stage} {name} by {split}": [rf"{tag}/codes/{name}_{pattern}$"]
        for stage, tag, name in _CURVES
        for split, pattern in [("level", r"level_\d+"), ("share of hidden codes (%)", r"hidden_\d+_\d+")]
    }
    main_metrics = ("val/accuracy",)

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
        masking: Masking | None = None,
        feature_dropout: float = 0.1,
        label_smoothing: float = 0.1,
        sampler: Sampler | None = None,
        conditioning_levels: int = 0,
        init_from: str | None = None,
        compile: bool | str = False,
    ) -> None:
        """Configure the stage.

        Args:
            backbone: The network.
            optimizer: Takes parameter groups. AdamW 2e-4, decay 1e-6 are VATT's values; VAB's own are not printed.
            warmup_steps: Steps over which the learning rate rises linearly from 0 (VATT's value); below 1, a share of
                the schedule.
            schedule_steps: Step at which the linear fall ends; none means the trainer's ``max_steps`` (VATT's value).
            final_lr_ratio: Learning rate at the end of the fall, as a share of the top one.
            seed: Of masks, feature dropout and dropout.
            masking: How many codes are hidden, and which.
            feature_dropout: Share of segments trained without video, for guidance (VATT's value).
            label_smoothing: Share of the target spread over the codebook (VATT's value).
            sampler: How ``predict`` and the media callback decode.
            conditioning_levels: How many levels, the first ones, are given and never predicted: the model predicts the
                finer ones, as the second stage of VAB-DAC does. 0 for a model that predicts all levels.
            init_from: Checkpoint, or a run's folder, whose weights the run begins with.
            compile: Compile the backbone's blocks for training (``torch.compile``); a string names the backend.

        Raises:
            UserError: If a number is out of range.
        """
        super().__init__(backbone, optimizer, warmup_steps, schedule_steps, final_lr_ratio, seed, init_from, compile)
        masking, sampler = _made(Masking, masking), _made(Sampler, sampler)
        self.remember(locals())
        if not 0 <= conditioning_levels < self.spec.num_codebooks:
            raise UserError(
                f"conditioning_levels must be at least 0 and leave a level to make of the shards' "
                f"{self.spec.num_codebooks}, got {conditioning_levels}"
            )
        if not 0 <= feature_dropout <= 1 or not 0 <= label_smoothing < 1:
            raise UserError(
                "feature_dropout must be in [0, 1] and label_smoothing in [0, 1), got "
                f"{feature_dropout} and {label_smoothing}"
            )
        self.conditioning_levels = conditioning_levels
        self.masking: Masking = masking
        self.sampler: Sampler = sampler
        self.feature_dropout = feature_dropout
        self.label_smoothing = label_smoothing
        self.audio_statistics: dict[str, float] | None = None
        """Statistics of the training audio (``vab.metrics.health``), if measured: generated sound is compared with
        them. Checkpoints carry them."""
        self.sampler.stages(self.predicted_levels)  # raises if a list is too long
        self.quality = GuessingQuality(self.spec.num_codebooks)

    @property
    def predicted_levels(self) -> int:
        """Number of levels that the model predicts: those after the conditioning ones."""
        return self.spec.num_codebooks - self.conditioning_levels

    def mask_for(self, keys: Tensor, steps: Tensor) -> Tensor:
        """(B, K, T) bool: the codes to hide, for records of (B,) valid steps; none of a conditioning level."""
        mask = self.masking.mask(keys, self.predicted_levels, self.spec.num_steps, steps)
        return F.pad(mask, (0, 0, self.conditioning_levels, 0))

    def logits(self, batch: Batch, mask: Tensor, drop_features: Tensor | None = None) -> Tensor:
        """Predictions for all codes of a batch: (B, K, T, S) float. Arguments as for `trunk`."""
        return self.backbone.score(self.trunk(batch, mask, drop_features))

    def trunk(self, batch: Batch, mask: Tensor, drop_features: Tensor | None = None) -> Tensor:
        """(B, T, D) float: the input of the backbone's heads.

        Args:
            batch: Records.
            mask: (B, K, T) bool. True = hidden.
            drop_features: (B,) bool. Records whose video the network does not see.
        """
        steps, frames = batch.lengths
        return self.backbone.trunk(
            batch.codes, batch.features, mask, drop_features=drop_features, steps=steps, frames=frames
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the statistics of the training audio."""
        checkpoint["audio_statistics"] = self.audio_statistics

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them, also without a trainer."""
        self.audio_statistics = checkpoint.get("audio_statistics")
        super().on_load_checkpoint(checkpoint)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Hide codes and predict them.

        The gradient is that of the sum over hidden codes, divided by the number of codes that are hidden on average in
        records without padding (`Masking.mean_ratio`), not by the batch's own number. What is logged is the mean.
        """
        batch = self.in_one_form(batch)
        keys = self.training_keys(batch)
        mask = self.mask_for(keys, batch.steps)
        dropped = uniform(keys, Stream.FEATURE_DROPOUT) < self.feature_dropout
        x = self.trunk(batch, mask, dropped)
        levels = slice(self.conditioning_levels, None)
        of_levels = (self.backbone.heads[levels], batch.codes[:, levels], mask[:, levels])
        if not self.logs_this_step or is_accumulating(self.trainer):
            loss = hidden_code_loss(x, *of_levels, self.label_smoothing)
        else:
            loss, sums = hidden_code_loss_and_sums(x, *of_levels, self.label_smoothing)
            self.log_after_step(torch.cat(self._by_level_and_bucket(sums, batch, mask)), self._training_table)
        return self.take_loss(loss, mask[:, levels].float().mean() / self.masking.mean_ratio)

    def _training_table(self, sums: Tensor) -> dict[str, float]:
        """`guessing_table` of a training batch, from both its arguments in one tensor."""
        table = guessing_table(*sums.split((self.spec.num_codebooks, BUCKETS)))
        return {f"train/codes/{name}": float(value) for name, value in table.items()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Predict codes under a mask that depends on the record alone."""
        batch = self.in_one_form(batch)
        mask = self.evaluation_mask(batch)
        self.quality.update(*self.guessing_sums(self.logits(batch, mask), batch, mask))

    def dataset_metrics(self, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        """Means over the whole data set; in validation those of levels and shares of hidden codes under ``codes/``."""
        table: dict[str, Tensor] = self.quality.compute()
        self.quality.reset()
        main = ("loss", "accuracy") if stage == "val" else table
        return {name if name in main else f"codes/{name}": value for name, value in table.items()}

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Codes generated from the video (and the conditioning levels), with ``index`` and ``valid`` of the records."""
        codes = self.generate_for(batch, self.seed)
        return {"codes": codes, "index": batch.index, "valid": batch.valid}

    def guessing_sums(self, logits: Tensor, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor]:
        """A batch's sums for ``guessing_table``, valid records only: (K, 3) by level, (BUCKETS, 3) by share hidden."""
        sums = masked_code_sums(logits, batch.codes, mask & batch.valid[:, None, None])
        return self._by_level_and_bucket(sums, batch, mask)

    def _by_level_and_bucket(self, sums: MaskedCodeSums, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As `guessing_sums`, from the sums of all levels or of those that the model predicts."""
        bucket = mask_ratio_bucket(mask[:, self.conditioning_levels :], batch.steps, BUCKETS)
        per_level = sums.per_level()
        per_level = F.pad(per_level, (0, 0, self.spec.num_codebooks - len(per_level), 0))
        return per_level, sums.per_bucket(bucket, BUCKETS)

    def evaluation_mask(self, batch: Batch) -> Tensor:
        """(B, K, T) bool: the mask under which a record is scored, the same in every epoch and on any rank."""
        return self.mask_for(record_keys(self.seed, batch.index), batch.steps)

    def generate_for(
        self, batch: Batch, seed: int, sampler: Sampler | None = None, *, drop_features: bool = False
    ) -> Tensor:
        """`generate` for records of a data set, given their conditioning levels: (B, K, T) int64 codes.

        A record's result depends on the seed and its number, not on its batch.
        """
        batch = batch.to(self.device)
        steps, frames = batch.lengths
        codes = batch.codes[:, : self.spec.num_codebooks] if self.conditioning_levels else None
        keys = record_keys(seed, batch.index)
        lengths = {"steps": steps, "frames": frames}
        return self.generate(batch.features, keys, sampler, codes=codes, drop_features=drop_features, **lengths)

    @torch.no_grad()
    def generate(
        self,
        features: Tensor,
        keys: Tensor,
        sampler: Sampler | None = None,
        *,
        codes: Tensor | None = None,
        mask: Tensor | None = None,
        steps: Tensor | None = None,
        frames: Tensor | None = None,
        drop_features: bool = False,
    ) -> Tensor:
        """Codes for a video by iterative parallel decoding.

        Args:
            features: (B, V, C) float32.
            keys: (B,) int64. The seed of each record's randomness; a record's result depends on no other.
            sampler: Decoding settings; the task's own by default.
            codes: (B, K, T) int64. Known codes, where ``mask`` is False. Required with conditioning levels.
            mask: (B, K, T) bool. True = to be predicted; by default all codes but those of conditioning levels.
            steps: (B,) int64. Steps to generate for each record, if some are fewer than T.
            frames: (B,) int64. Valid frames, if some are fewer than V.
            drop_features: Decode without the video.

        Returns:
            (B, K, T) int64. Steps at and after ``steps`` are padding.
        """
        sampler = sampler or self.sampler
        if drop_features:
            sampler = replace(sampler, guidance_scale=1.0)  # guided and unguided passes would be equal
        shape = (len(features), self.spec.num_codebooks, self.spec.num_steps)
        if codes is None and self.conditioning_levels:
            raise ValueError(f"the first {self.conditioning_levels} levels of the codes must be given to a fine stage")
        if codes is None:
            codes = torch.zeros(shape, dtype=torch.int64, device=features.device)
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=features.device)
            mask[:, : self.conditioning_levels] = False
        if (steps is None) != (frames is None):
            raise ValueError("give both steps and frames, or neither")

        def codes_to_logits(codes: Tensor, mask: Tensor, without_video: Tensor) -> Tensor:
            times = len(codes) // len(features)
            return self.backbone(
                codes,
                repeat(features, "B V C -> (times B) V C", times=times),
                mask,
                drop_features=without_video | drop_features,
                steps=None if steps is None else steps.repeat(times),
                frames=None if frames is None else frames.repeat(times),
            )

        with uncompiled(self.backbone.blocks):  # in training any number of sounds may be generated
            if not sampler.expected:
                return decode(codes_to_logits, codes, mask, sampler, keys, steps)
            if steps is not None:
                mask = mask & (torch.arange(self.spec.num_steps, device=mask.device) < steps[:, None])[:, None]
            scale, levels = sampler.guidance_scale, slice(None)
            logits = guided_logits(codes_to_logits, codes, mask, sampler.passes, scale, levels)
        return expected_codes(logits.softmax(-1), self.backbone.codebooks, codes, mask)


def _made(kind: type[Any], value: Any) -> Any:
    """Settings from an object, from JSON, or the defaults."""
    if value is None:
        return kind()
    return kind(**value) if isinstance(value, dict) else value
