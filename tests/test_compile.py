"""A run with compiled blocks: few graphs, no graph breaks, and the metrics of a run without them."""

import pytest
import torch
from lightning.pytorch import Callback
from torch._dynamo.utils import counters

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
