"""Figures of generated sound on two processes (gloo) are those on one; a failure on one rank stops both."""

import json

import pytest
from lightning.pytorch import Trainer, seed_everything

from ranks import in_ranks
from vab.backbone import Backbone
from vab.callbacks import GenerationEval
from vab.data.reading.datamodule import ShardDataModule
from vab.tasks import PretrainTask
from vab.tokens.sampler import Sampler


def judge(shards, out, devices, count, batch_size, fails):
    """On one of ``devices`` ranks: figures of the sound that a network makes, and what was logged."""
    seed_everything(0)
    data = ShardDataModule(train=f"{shards}/train", val=f"{shards}/val", batch_size=8, num_workers=0)
    backbone = Backbone(data.spec, dim=32, num_heads=2, num_modality_layers=1, num_joint_layers=1)
    task = PretrainTask(backbone, sampler=Sampler(decode_steps=2))
    evaluation = GenerationEval(num_records=count, batch_size=batch_size)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        callbacks=[evaluation],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    if fails:
        read = data.val_dataset.read

        def broken(numbers, valid=None):
            if valid is not None and trainer.global_rank == 1 and evaluation.names:
                raise OSError("this rank cannot read")
            return read(numbers, valid)

        data.val_dataset.read = broken
    trainer.validate(task, data, verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    with open(f"{out}/rank{trainer.global_rank}.json", "w") as file:
        json.dump({"figures": evaluation.last_metrics, "logged": logged}, file)


def results(shards, folder, devices, count, batch_size, fails=False):
    folder.mkdir()
    in_ranks(devices, judge, shards, folder, devices, count, batch_size, fails, said=folder / "said.txt")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(devices)]


@pytest.mark.ddp
def test_two_processes_find_what_one_finds(shards, tmp_path):
    # 7 records: one rank has 4, the other 3 and one that only fills its place.
    (one,) = results(shards, tmp_path / "one", 1, 7, 4)
    two = results(shards, tmp_path / "two", 2, 7, 4)
    assert two[0] == two[1]
    assert {"val/fad_tiny_to_codec", "val/kld_tiny_to_codec", "val/recall_at_5_g2r"} <= one["figures"].keys()
    assert two[0]["figures"] == pytest.approx(one["figures"], rel=1e-10, abs=1e-12)
    assert one["figures"].keys() <= one["logged"].keys()


@pytest.mark.ddp
def test_a_rank_may_have_hardly_anything(shards, tmp_path):
    # In batches of 2 the last step has one record left: none for the second rank.
    (one,) = results(shards, tmp_path / "one", 1, 5, 2)
    two = results(shards, tmp_path / "two", 2, 5, 2)
    assert two[0]["figures"] == two[1]["figures"]
    assert two[0]["figures"] == pytest.approx(one["figures"], rel=1e-10, abs=1e-12)


@pytest.mark.ddp
def test_a_failure_on_one_rank_stops_both(shards, tmp_path):
    with pytest.raises(AssertionError, match="this rank cannot read"):
        results(shards, tmp_path / "broken", 2, 6, 2, fails=True)
    assert not list((tmp_path / "broken").glob("rank*.json"))
