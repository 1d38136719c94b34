"""The exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from vab.engines import load_weights, local, local_share, whole
from vab.spec import UserError


class EMA(Callback):
    """Exponential moving average of the weights, for validation and generation, never for training.

    A checkpoint's ``state_dict`` holds the average and ``live_state_dict`` the weights that are being trained. Before
    the first update there is no average: nothing is swapped, and ``state_dict`` holds the live weights.

    The average follows the weights quickly at first: update n, counted from 0, which copies the weights, keeps
    min(decay, (1 + n) / (10 + n)) of the old average. So the random start does not stay in it: after 100 updates it has
    a share of 2e-12, where a constant 0.9999 would leave 99 %.

    The average is float32 also for a bfloat16 network, in which a decay of 0.9999 would round to no change. With
    sharded weights each rank averages its share. (Lightning's own callback can do neither, and stores the initial
    weights of a run that ends before the average starts.)
    """

    keeps_average = True
    """Marks this callback for tasks, which must not import it."""

    def __init__(self, decay: float = 0.999, start_step: int = 0) -> None:
        """Configure the average.

        Args:
            decay: Largest weight of the old average at a step. 0.999 suits short runs; the paper prints none.
            start_step: Optimizer steps before the first update, which copies the weights.
        """
        if not 0 <= decay < 1:
            raise UserError(f"EMA decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.start_step = start_step
        self._reset()

    def _reset(self) -> None:
        self._average: dict[str, Tensor] = {}  # of trained weights: this rank's share, float32, on their device
        self._live: dict[str, Tensor] = {}  # the live weights, while the average has replaced them in the network
        self._loaded: dict[str, Tensor] = {}  # a checkpoint's average, until the weights are on their device
        self._updates = self._latest_step = 0

    @property
    def started(self) -> bool:
        """Whether there is an average."""
        return self._updates > 0

    @property
    def weights(self) -> list[Tensor]:
        """This rank's share of the average and, during a validation, of the live weights."""
        return [*self._average.values(), *self._live.values()]

    def state_dict(self) -> dict[str, Any]:
        """The step of the latest update; the average itself is in the checkpoint's ``state_dict``."""
        return {"latest_update_step": self._latest_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the latest update."""
        self._latest_step = state_dict["latest_update_step"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin without an average."""
        if stage == "fit":
            self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move a checkpoint's average to the device of the weights."""
        if self._loaded:
            self._average = {
                name: local_share(self._loaded[name], weight).to(weight.device, torch.float32, copy=True)
                for name, weight in _trained(pl_module).items()
            }
            self._loaded = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *unused: Any) -> None:
        """Update after every optimizer step from ``start_step`` on."""
        step = trainer.global_step
        if step <= self._latest_step or step <= self.start_step:
            return
        weights = {name: local(weight).detach() for name, weight in _trained(pl_module).items()}
        if not self.started:
            self._average = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
        else:
            current = [weights[name].float() for name in self._average]
            decay = min(self.decay, (1 + self._updates) / (10 + self._updates))
            torch._foreach_lerp_(list(self._average.values()), current, 1 - decay)
        self._updates, self._latest_step = self._updates + 1, step

    @torch.no_grad()
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the network."""
        if self.started:
            for name, weight in _trained(pl_module).items():
                self._live[name] = local(weight).detach().clone()
                local(weight).copy_(self._average[name])

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the live weights back."""
        weights = _trained(pl_module)
        for name, live in self._live.items():
            local(weights[name]).copy_(live)
        self._live = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the live weights back after an error in validation, before anything is saved."""
        self.on_validation_epoch_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store both sets of weights."""
        if not self.started:
            return
        module, weights = checkpoint["state_dict"], _trained(pl_module)
        average = {name: _gathered(share, weights[name]) for name, share in self._average.items()}
        live = {name: _gathered(share, weights[name]) for name, share in self._live.items()}
        # During a validation, as for a requeued job, the network holds the average.
        checkpoint["live_state_dict"] = module | live
        checkpoint["state_dict"] = module | average
        checkpoint["ema_updates"] = self._updates

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore both sets of weights when a run resumes."""
        if not trainer.training or "live_state_dict" not in checkpoint:
            return
        self._loaded = checkpoint["state_dict"]
        self._updates = checkpoint["ema_updates"]
        load_weights(pl_module, checkpoint["live_state_dict"])


def _trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def _gathered(share: Tensor, like: Tensor) -> Tensor:
    """The whole tensor from every rank's share, which is divided as ``like`` is."""
    from torch.distributed.tensor import DTensor

    if not isinstance(like, DTensor):
        return share
    mesh, shape, stride = like.device_mesh, like.shape, like.stride()
    return whole(DTensor.from_local(share, mesh, like.placements, shape=shape, stride=stride)).cpu()
