"""Two processes (gloo) are one: the same records, the same numbers."""

import json

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.optim import SGD

from ranks import in_ranks
from tone_shards import short_spec, write_shards
from vab.backbone import Backbone
from vab.data.reading.datamodule import ShardDataModule
from vab.tasks import AlignTask, ClassifyTask, PretrainTask


def train_and_write(shards, out, devices, batch_size):
    """Five steps on one of ``devices`` ranks: what it saw, what it measured, the weights."""

    class Seen(Callback):
        def __init__(self):
            self.train, self.val = [], []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.train.append(batch.index.tolist())

        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            self.val.append([i for i, valid in zip(batch.index.tolist(), batch.valid.tolist(), strict=True) if valid])

    seed_everything(0)
    data = ShardDataModule(train=f"{shards}/train", val=f"{shards}/val", batch_size=batch_size, num_workers=0)
    backbone = Backbone(data.spec, dim=32, num_heads=2, num_modality_layers=1, num_joint_layers=1, dropout=0.0)
    task = PretrainTask(backbone, warmup_steps=1, schedule_steps=100)
    seen = Seen()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=5,
        logger=False,
        callbacks=[seen],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        val_check_interval=5,
        check_val_every_n_epoch=None,
    )
    trainer.fit(task, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    with open(f"{out}/rank{trainer.global_rank}.json", "w") as file:
        json.dump({"train": seen.train, "val": seen.val, "metrics": metrics}, file)
    if trainer.is_global_zero:
        torch.save(task.state_dict(), f"{out}/weights.pt")


def run(shards, folder, devices, batch_size):
    folder.mkdir()
    in_ranks(devices, train_and_write, shards, folder, devices, batch_size)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(devices)]
    return ranks, torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.ddp
@pytest.mark.timeout(300)
def test_two_processes_see_what_one_sees_and_score_the_same(shards, tmp_path):
    (one,), weights = run(shards, tmp_path / "one", 1, 8)
    two, weights_of_two = run(shards, tmp_path / "two", 2, 4)

    for step, records in enumerate(one["train"]):
        shares = [rank["train"][step] for rank in two]
        assert not set(shares[0]) & set(shares[1])
        assert shares[0] + shares[1] == records

    scored = [index for rank in two for batch in rank["val"] for index in batch]
    assert sorted(scored) == list(range(20))
    assert sorted(index for batch in one["val"] for index in batch) == list(range(20))

    assert two[0]["metrics"] == two[1]["metrics"]
    assert two[0]["metrics"].keys() == one["metrics"].keys()
    for name, value in one["metrics"].items():
        assert two[0]["metrics"][name] == pytest.approx(value, rel=1e-4), name
    for name, value in weights.items():
        torch.testing.assert_close(weights_of_two[name], value, rtol=1e-4, atol=1e-6, msg=name)


def step_of_each_task(shards, out, devices, batch_size, accumulated=1):
    """Loss and gradient of one step of each kind of task; of pretraining alone with accumulated gradients."""
    # The masks hide between half and all of a record's codes, so batches have unlike numbers of hidden codes.
    cases = {
        "pretrain": (PretrainTask, "plain", {}, {}),
        "pretrain ragged": (PretrainTask, "ragged", {}, {}),
    }
    others = {
        "align": (AlignTask, "plain", {"embedding_dim": 16}, {}),
        "align in parts": (AlignTask, "plain", {"embedding_dim": 16, "micro_batch_size": 3}, {}),
        "align ragged": (AlignTask, "ragged", {"embedding_dim": 16}, {}),
        "classify": (ClassifyTask, "ragged", {"mixup": 0.5}, {}),
        "classify several": (ClassifyTask, "plain", {"multi_label": True}, {"order": "class_balanced"}),
        "classify sound": (ClassifyTask, "ragged", {"inputs": "audio"}, {}),
        "classify video": (ClassifyTask, "plain", {"inputs": "video"}, {}),
    }
    if accumulated == 1:
        cases |= others

    class Losses(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.loss = trainer.callback_metrics.get("train/loss")  # of a whole step

    results = {}
    for name, (kind, folder, settings, reading) in cases.items():
        seed_everything(0)
        place = f"{shards}/{folder}"
        data = ShardDataModule(train=place, val=place, batch_size=batch_size, num_workers=0, **reading)
        backbone = Backbone(data.spec, dim=32, num_heads=2, num_modality_layers=2, num_joint_layers=1, dropout=0.0)
        if kind is ClassifyTask:
            settings = settings | {"labels": data.labels}
        # Plain descent by 1 times the gradient: the weights' change is the gradient.
        task = kind(backbone, optimizer=lambda p: SGD(p, lr=1.0), warmup_steps=1, schedule_steps=100, **settings)
        before = {name: value.clone() for name, value in task.state_dict().items()}
        seen = Losses()
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            max_steps=1,
            log_every_n_steps=1,
            accumulate_grad_batches=accumulated,
            logger=False,
            callbacks=[seen],
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        trainer.fit(task, data)
        step = {key: before[key] - value for key, value in task.state_dict().items() if "codebooks" not in key}
        results[name] = {"loss": seen.loss, **step}
    if trainer.is_global_zero:
        torch.save(results, f"{out}/results.pt")


@pytest.mark.ddp
@pytest.mark.timeout(300)
def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path):
    write_shards(tmp_path / "plain", short_spec(), 24, per_source=3)
    write_shards(tmp_path / "ragged", short_spec(), 24, ragged=True, per_source=3)
    results = []
    for devices, accumulated in ((1, 1), (2, 1), (2, 3)):
        folder = tmp_path / f"devices{devices}x{accumulated}"
        folder.mkdir()
        size = 12 // devices // accumulated
        in_ranks(devices, step_of_each_task, tmp_path, folder, devices, size, accumulated)
        results.append(torch.load(folder / "results.pt", weights_only=True))
    one, two, parts = results
    assert (len(one), len(two), list(parts)) == (9, 9, ["pretrain", "pretrain ragged"])
    for case, values in one.items():
        largest = max(float(value.abs().max()) for name, value in values.items() if name != "loss")
        assert largest > 0.1, case
        for name, value in values.items():
            scale = max(1.0, float(value) if name == "loss" else largest)
            for other in (two, parts) if case in parts else (two,):
                assert float((other[case][name] - value).abs().max()) < 1e-6 * scale, f"{case}: {name}"
    for name, value in one["align"].items():
        torch.testing.assert_close(one["align in parts"][name], value, rtol=1e-5, atol=1e-5)
