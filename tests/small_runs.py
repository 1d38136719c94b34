"""Runs of a few steps that write down what they saw, and keep a checkpoint of every moment."""

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.nn import functional as F

from vab.data.reading.datamodule import ShardDataModule

BATCH_SIZE, MAX_STEPS = 4, 8  # of a data set of 14 records, 8 steps end inside the third epoch


class SmallTask(LightningModule):
    """A few parameters, and dropout, so that a step done twice, left out or drawn otherwise shows in the weights."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 2)
        self.seen = []
        self.validated = []

    def before_step(self, number):
        """For a test to break in."""

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(1000 * self.current_epoch + batch_idx)

    def training_step(self, batch, batch_idx):
        logged_step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        self.seen.append((self.current_epoch, batch_idx, logged_step, batch.index.tolist()))
        self.before_step(len(self.seen))
        hidden = F.dropout(self.layer(batch.features.mean(1)), 0.5, training=True)
        return F.mse_loss(hidden, batch.codes.float().mean(2) / 300)

    def validation_step(self, batch, batch_idx):
        self.validated.append((self.global_step, batch.index[batch.valid].tolist()))
        self.log("val_loss", self.layer(batch.features.mean(1)).mean(), batch_size=len(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
                "interval": "step",
            },
        }


class SaveEverywhere(Callback):
    """A checkpoint at every moment at which one may be taken: what a run killed just afterwards would find."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.paths = {}

    def save(self, trainer, moment):
        if trainer.fit_loop._should_accumulate():
            return  # gradients of a step that is not done are in no checkpoint
        path = self.folder / f"{trainer.global_step:02d}-{moment}.ckpt"
        trainer.save_checkpoint(path)
        self.paths[path.stem] = path

    def on_train_start(self, trainer, pl_module):
        self.save(trainer, "train_start")

    def on_train_epoch_start(self, trainer, pl_module):
        self.save(trainer, "epoch_start")

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "batch_end")

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "epoch_end")


def run(folders, resume=None, callbacks=(), trainer_settings=None, make_task=SmallTask, **data_settings):
    """Train; answers the task."""
    seed_everything(0, verbose=False)
    task = make_task()
    data = ShardDataModule(*folders, **{"batch_size": BATCH_SIZE, "num_workers": 0, **data_settings})
    settings = {
        "max_steps": MAX_STEPS,
        "max_epochs": -1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        **(trainer_settings or {}),
    }
    trainer = Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(task, data, ckpt_path=resume, weights_only=True)
    return task


class RankTask(SmallTask):
    """Writes down what its rank has seen."""

    def __init__(self, folder):
        super().__init__()
        self.folder = str(folder)

    def on_fit_end(self):
        text = json.dumps({"seen": self.seen, "validated": self.validated})
        Path(self.folder, f"rank{self.global_rank}.json").write_text(text)
