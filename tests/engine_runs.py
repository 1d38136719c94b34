"""A short pretraining under any engine, in processes of its own."""

import json
from pathlib import Path

import torch

from ranks import in_ranks


def run(folder, shards, devices=1, **settings):
    """Train; gives the losses of the steps, the last figures, the checkpoint's content, and what was said."""
    folder.mkdir()
    settings = {"folder": str(folder), "shards": str(shards), "devices": devices, **settings}
    in_ranks(devices, train, settings, said=folder / "said.txt")
    told = json.loads((folder / "told.json").read_text())
    said = (folder / "said.txt").read_text()
    return told | {"checkpoint": torch.load(folder / "last.ckpt", weights_only=True), "said": said}


def train(settings):
    """In the process: the run that ``settings`` describe."""
    from lightning.pytorch import Callback, Trainer, seed_everything

    from vab.backbone import Backbone
    from vab.callbacks import EMA, AtomicCheckpoints, Checkpoints, Meters
    from vab.data.reading.datamodule import ShardDataModule
    from vab.engines import FSDP
    from vab.tasks import PretrainTask

    class Losses(Callback):
        def __init__(self):
            self.losses = []

        def on_train_batch_end(self, trainer, module, *unused):
            if not trainer.fit_loop._should_accumulate():
                self.losses.append(float(trainer.callback_metrics["train/loss"]))

    seed_everything(0)
    folder, shards, devices = (settings.pop(name) for name in ("folder", "shards", "devices"))
    strategy = settings.pop("strategy", "ddp" if devices > 1 else "auto")
    resume = settings.pop("resume", None)
    data = ShardDataModule(
        f"{shards}/train", f"{shards}/val", batch_size=settings.pop("batch_size", 8 // devices), num_workers=0
    )
    sizes = {"dim": 32, "num_heads": 2, "num_modality_layers": 2, "num_joint_layers": 1, "dropout": 0.0}
    task = PretrainTask(
        Backbone(data.spec, **(sizes | settings.pop("backbone", {}))), warmup_steps=2, schedule_steps=50,
        **settings.pop("task", {}),
    )  # fmt: skip
    losses = Losses()
    steps = settings.pop("max_steps", 6)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=FSDP() if strategy == "fsdp" else strategy, max_steps=steps,
        max_epochs=-1, logger=False, plugins=[AtomicCheckpoints()], use_distributed_sampler=False,
        callbacks=[EMA(decay=0.9), Meters(), losses, Checkpoints(dirpath=folder, save_last=True, save_top_k=0)],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=1.0,
        check_val_every_n_epoch=None, val_check_interval=steps * settings.get("accumulate_grad_batches", 1),
        log_every_n_steps=1, **settings,
    )  # fmt: skip
    trainer.fit(task, data, ckpt_path=resume, weights_only=True)
    if trainer.is_global_zero:
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        (Path(folder) / "told.json").write_text(json.dumps({"losses": losses.losses, "figures": figures}))
