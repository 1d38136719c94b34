"""A run with compiled blocks: few graphs, no graph breaks, and the metrics of a run without them."""

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from tasks_help import quiet_trainer, small_backbone
from tone_shards import LABELS, short_spec, write_shards
from vab.data.reading.datamodule import ShardDataModule
from vab.tasks import AlignTask, ClassifyTask, PretrainTask
from vab.tokens.sampler import Sampler

TASKS = {
    # Two kinds of blocks, in training and in evaluation.
    "pretrain": (PretrainTask, {"sampler": Sampler(decode_steps=2)}, {}, 4),
    "pretrain with alibi": (PretrainTask, {"sampler": Sampler(decode_steps=2)}, {"positions": "alibi"}, 4),
    "pretrain with checkpointing": (
        PretrainTask, {"sampler": Sampler(decode_steps=2)}, {"activation_checkpointing": True}, 4
    ),
    # One kind for sound alone and for video alone, in training and in evaluation.
    "align": (AlignTask, {"embedding_dim": 16}, {}, 4),
    "align in micro-batches": (AlignTask, {"embedding_dim": 16, "micro_batch_size": 1}, {}, 4),
    "classify": (ClassifyTask, {"labels": LABELS}, {}, 2),
}  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["some short", "all whole"])
def data(request, tmp_path_factory):
    """Batches of 2, in one data set whole ones and others; the last evaluation batch has one record."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 12), ("val", 5)):
        write_shards(folder / name, short_spec(), count, seed=count, ragged=request.param)
    return lambda: ShardDataModule(f"{folder}/train", f"{folder}/val", batch_size=2, num_workers=0)


class Watch(Callback):
    """Whether batches were whole, before the task sees them; and sound is generated, for three records at once."""

    def __init__(self):
        self.ragged = set()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.ragged.add(bool((batch.steps < module.spec.num_steps).any()))

    def on_validation_end(self, trainer, module):
        if isinstance(module, PretrainTask):
            module.generate_for(trainer.datamodule.val_dataset.__getitems__([1, 2, 4]), 0)


def fit(data, name, **task_settings):
    make, settings, backbone, _ = TASKS[name]
    module, watch = data(), Watch()
    task = make(small_backbone(module.spec, **backbone), warmup_steps=2, schedule_steps=50, **settings, **task_settings)
    trainer = quiet_trainer(max_epochs=1, callbacks=[watch], precision="bf16-mixed")
    trainer.fit(task, module)
    return watch, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TASKS)
def test_a_run_compiles_few_graphs_and_breaks_none(name, data):
    watch, plain = fit(data, name)
    torch._dynamo.reset()
    counters.clear()
    _, compiled = fit(data, name, compile="eager")
    assert counters["stats"]["unique_graphs"] == TASKS[name][-1]
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]
    assert watch.ragged == ({True, False} if data().train_dataset.has_short_records() else {False})
    assert compiled == pytest.approx(plain, rel=0.02, abs=0.01)
    assert "val/loss" in compiled


def test_after_a_fit_shorter_records_of_other_data_are_padded_and_not_attended_to(tmp_path):
    whole, short = tmp_path / "whole", tmp_path / "short"
    for folder in (whole, short):
        write_shards(folder, short_spec(), 6, seed=6, ragged=folder == short)
    metrics = []
    for settings in ({}, {"compile": "eager"}):
        data = ShardDataModule(
            f"{tmp_path}/whole", f"{tmp_path}/whole", f"{tmp_path}/short", batch_size=2, num_workers=0
        )
        task = PretrainTask(small_backbone(data.spec), warmup_steps=2, schedule_steps=50, **settings)
        trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
        trainer.fit(task, data)
        metrics += trainer.test(task, data, verbose=False)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)


class OwnData(LightningDataModule):
    """A datamodule that is not ours: it has the batches and what a task asks for, but no data sets."""

    def __init__(self, data):
        super().__init__()
        self.spec, self.codebooks, self._batches = data.spec, data.codebooks, data.train_dataset

    def train_dataloader(self):
        return DataLoader([self._batches.__getitems__(two) for two in ([0, 1], [2, 3])], batch_size=None)

    def val_dataloader(self):
        return DataLoader([self._batches.__getitems__([4])], batch_size=None)


@pytest.mark.parametrize("name", ["pretrain", "align"])
def test_a_run_with_a_datamodule_of_ones_own_compiles(name, data):
    make, settings, _, _ = TASKS[name]
    module = OwnData(data())
    task = make(small_backbone(module.spec), warmup_steps=2, schedule_steps=50, compile="eager", **settings)
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(task, module)
    assert "val/loss" in trainer.callback_metrics
