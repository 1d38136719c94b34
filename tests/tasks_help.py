"""Small tasks, and a trainer that says nothing."""

import torch
from lightning.pytorch import Trainer

from tone_shards import short_spec
from vab.backbone import Backbone


def small_backbone(spec=None, **settings):
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_heads": 2, "num_modality_layers": 2, "num_joint_layers": 1, "dropout": 0.0}
    return Backbone(spec or short_spec(), **(sizes | settings))


def quiet_trainer(**settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(
        accelerator="cpu", use_distributed_sampler=False, **({"enable_checkpointing": False} | quiet | settings)
    )


def saved(task, path):
    trainer = quiet_trainer()
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path)
    return str(path)
