import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vab.backbone import Backbone
from vab.data.reading.datamodule import ShardDataModule
from vab.tasks import PretrainTask
from vab.tokens.sampler import Sampler


@pytest.fixture
def run(shards, tmp_path):
    """Train a small network; gives the trainer, the task and the checkpoint's path."""

    def train(*callbacks, steps=4, resume=None, logger=False, name="run", **flags):
        torch.manual_seed(0)
        data = ShardDataModule(train=str(shards / "train"), val=str(shards / "val"), batch_size=8, num_workers=0)
        backbone = Backbone(data.spec, dim=32, num_heads=2, num_modality_layers=1, num_joint_layers=1)
        task = PretrainTask(backbone, warmup_steps=1, schedule_steps=100, sampler=Sampler(decode_steps=2))
        saver = ModelCheckpoint(tmp_path / name, save_last=True, every_n_train_steps=2, save_top_k=-1)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=[*callbacks, saver],
            logger=logger,
            use_distributed_sampler=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            **({"enable_progress_bar": False} | flags),
        )
        trainer.fit(task, data, ckpt_path=resume)
        return trainer, task, tmp_path / name / "last.ckpt"

    return train


@pytest.fixture
def events():
    """Reads what a logger has written."""

    def read(logger):
        logger.finalize("success")
        found = EventAccumulator(logger.log_dir)
        found.Reload()
        return found

    return read
