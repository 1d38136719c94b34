"""The average of the weights over the steps of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vab.spec import UserError


class EMA(WeightAveraging):
    """Exponential moving average of the weights: used to validate and to generate, never to train.

    A checkpoint's ``state_dict`` holds the average and ``live_state_dict`` the weights that are being trained. Before
    the first update there is no average: nothing is swapped, and ``state_dict`` holds the live weights. (Lightning's
    own callback puts the initial weights there, and leaves a run that ends early with them.)
    """

    def __init__(self, decay: float = 0.999, start_step: int = 0) -> None:
        """Configure the average.

        Args:
            decay: Weight of the past at each step. 0.999 suits short runs; the paper prints none.
            start_step: Optimizer steps before the first update, which copies the weights.
        """
        if not 0 <= decay < 1:
            raise UserError(f"EMA decay must be in [0, 1), got {decay}")
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.decay = decay
        self.start_step = start_step
        self._swapped = False  # whether the module holds the average, and the average the live weights

    @property
    def started(self) -> bool:
        """Whether the average holds anything yet."""
        return self._average_model is not None and int(self._average_model.n_averaged) > 0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every optimizer step from ``start_step`` on."""
        return step_idx is not None and step_idx >= self.start_step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the average where the model will be: at this point of a run the model is still on the CPU."""
        self._device = self._device or trainer.strategy.root_device
        pl_module.trainer = None  # or the copy would hold a copy of the whole run
        super().setup(trainer, pl_module, stage)
        pl_module.trainer = trainer

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        if self.started:
            self._swap_models(pl_module)
            self._swapped = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the live weights."""
        self._swap_back(pl_module)

    def _swap_back(self, pl_module: LightningModule) -> None:
        if self._swapped:
            self._swap_models(pl_module)
            self._swapped = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the live weights in place: a checkpoint written from here on must continue the run exactly."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo a swap that an error in validation left behind, before anything is saved."""
        self._swap_back(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store both sets of weights."""
        if not self.started:
            return
        assert self._average_model is not None
        stored = self._average_model.state_dict()
        kept = {name.removeprefix("module."): value for name, value in stored.items() if name.startswith("module.")}
        module = checkpoint["state_dict"]
        # Within a validation, as when a cluster asks for the job back, the two have changed places.
        checkpoint["state_dict"], checkpoint["live_state_dict"] = (module, kept) if self._swapped else (kept, module)
        checkpoint["ema_updates"] = int(self._average_model.n_averaged)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up both sets where they were left."""
        if self._average_model is None or "live_state_dict" not in checkpoint:
            return
        self._average_model.module.load_state_dict(checkpoint["state_dict"])
        self._average_model.n_averaged.fill_(checkpoint["ema_updates"])
        pl_module.load_state_dict(checkpoint["live_state_dict"])
