from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tasks_help import quiet_trainer, saved, small_backbone
from tone_shards import LABELS, short_spec, write_shards
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.data.shards.format import make_key
from vab.data.shards.writer import ShardWriter
from vab.spec import UserError
from vab.tasks import ClassifyTask, load_task
from vab.tasks.optim import decay_groups


def classifying(dataset=None, **settings):
    positions = settings.pop("positions", "rotary")
    task = ClassifyTask(small_backbone(positions=positions), LABELS, **settings).eval()
    if dataset is not None:
        task.backbone.set_codebooks(dataset.codebooks)
    with torch.no_grad():
        task.classifier.weight.normal_(std=0.1)
    return task


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    return ShardDataset(write_shards(tmp_path_factory.mktemp("ragged") / "r", short_spec(), 9, ragged=True))


def given(task, batch):
    steps, frames = batch.lengths
    codes = None if task.inputs == "video" else batch.codes
    return codes, None if task.inputs == "audio" else batch.features, steps, frames


@pytest.mark.parametrize("inputs", ["audio_video", "audio", "video"])
@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_probabilities_do_not_depend_on_the_batch_or_on_padding(ragged, inputs, positions):
    task, batch = classifying(ragged, inputs=inputs, positions=positions), ragged.read(range(9))
    whole = task.probabilities(*given(task, batch))
    torch.testing.assert_close(whole.sum(1), torch.ones(9))
    for number in range(9):
        alone = task.probabilities(*given(task, ragged.read([number])))
        torch.testing.assert_close(alone[0], whole[number], atol=1e-5, rtol=0)
        batch.codes[number, :, batch.steps[number] :] = 7
        batch.features[number, batch.frames[number] :] = 99.0
    torch.testing.assert_close(task.probabilities(*given(task, batch)), whole, atol=1e-5, rtol=0)
    assert float((whole[0] - whole[1]).abs().max()) > 1e-4


def test_a_modality_that_is_not_looked_at_does_not_count(ragged):
    batch = ragged.read([0, 1])
    for inputs, other in (("audio", "features"), ("video", "codes")):
        task = classifying(ragged, inputs=inputs)
        before = task._logits(batch)
        setattr(batch, other, torch.zeros_like(getattr(batch, other)))
        assert torch.equal(task._logits(batch), before)


def test_sound_alone_can_be_classified_with_a_model_of_both(tmp_path):
    dataset = ShardDataset(write_shards(tmp_path / "s", short_spec(), 4, sound_only=True))
    batch = dataset.read(range(4))
    logits = classifying(dataset)._logits(batch)
    assert torch.isfinite(logits).all()
    data = ShardDataModule(str(tmp_path / "s"), str(tmp_path / "s"), batch_size=4, num_workers=0)
    with pytest.raises(UserError, match=r"4 of 4 records of .* have no video"):
        quiet_trainer(max_steps=1).fit(classifying(inputs="video", warmup_steps=1, schedule_steps=9), data)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_last_layer_is_in_float32(ragged, precision):
    """In bfloat16 classes often score the same, and a tie counts as wrong."""
    task, batch = classifying(ragged), ragged.read(range(9))
    with torch.no_grad():
        task.classifier.bias.add_(40.0)  # between 32 and 64 bfloat16 has steps of 0.25
        task.classifier.weight.mul_(0.1)
        if precision == "bf16-true":
            batch.features = batch.features.bfloat16()
            logits = task.bfloat16()._logits(batch)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                logits = task._logits(batch)
    assert logits.dtype == torch.float32
    assert float((logits != logits.bfloat16().float()).float().mean()) > 0.9
    assert len(logits.unique()) == logits.numel()


def test_losses_are_those_of_torch():
    logits, targets = torch.randn(5, 2), F.one_hot(torch.tensor([0, 1, 1, 0, 1]), 2).float()
    task = classifying()
    expected = F.cross_entropy(logits, targets.argmax(1), label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(task._losses(logits, targets, 0.1), expected)
    several = classifying(multi_label=True)
    expected = F.binary_cross_entropy(logits.sigmoid(), targets, reduction="none").mean(1)
    torch.testing.assert_close(several._losses(logits, targets, 0.1), expected)


def test_records_that_only_fill_a_rank_up_are_not_scored(ragged):
    found = []
    for numbers, valid in ((range(4), None), (range(6), np.arange(6) < 4)):
        task = classifying(ragged)
        task.validation_step(ragged.read(numbers, valid), 0)
        figures = task.classification.compute()
        found.append([float(task.mean_loss.compute()), float(figures["top_1"]), int(figures["records"])])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[0][2] == 4


def test_a_mixture_is_as_long_as_the_longer_of_the_two(ragged):
    task, batch = classifying(ragged, mixup=0.5), ragged.read([0, 1])  # short and whole
    mix = torch.tensor([0.5, 1.0])
    before = task(*given(task, batch), mix)
    batch.codes[1, :, batch.steps[0] :] = (batch.codes[1, :, batch.steps[0] :] + 1) % 256
    after = task(*given(task, batch), mix)
    assert float((after[0] - before[0]).abs().max()) > 1e-4


def test_mixing_is_the_records_own_affair(ragged):
    task = classifying(ragged, mixup=0.5)
    batch = ragged.read(range(8))
    shares = task.shares(batch)
    assert 0 < int((shares < 1).sum()) < 8
    part = ragged.read(range(4, 8))
    assert torch.equal(task.shares(part), shares[4:])  # the same in a smaller batch
    nothing = torch.ones(8)
    torch.testing.assert_close(task._logits(batch, nothing), task._logits(batch))
    half = task._logits(batch, torch.full((8,), 0.5))
    torch.testing.assert_close(half[0::2], half[1::2], atol=1e-5, rtol=0)  # both halves of a pair are the same mixture


def test_shares_are_beta_distributed(ragged):
    task, batch = classifying(ragged, mixup=1.0, mixup_order=10), ragged.read([0] * 4000)
    batch.index = torch.arange(4000)
    shares = task.shares(batch).double()
    assert abs(float(shares.mean()) - 0.5) < 0.01
    assert float(shares.var()) == pytest.approx(1 / (4 * 21), rel=0.1)  # Beta(10, 10)


def test_learning_rates_by_layer():
    task = classifying(head_lr_factor=7.0, layer_lr_decay=0.5)
    groups = decay_groups(task, task.lr_factor)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == sum(1 for p in task.parameters() if p.requires_grad)
    assert {group["lr_factor"] for group in groups} == {7.0, 1.0, 0.5, 0.25}
    assert task.lr_factor("backbone.modality_blocks.1.x") == task.lr_factor("backbone.modality_norm.weight") == 1.0
    assert task.lr_factor("backbone.modality_blocks.0.x") == 0.5
    assert task.lr_factor("backbone.audio_input.weight") == 0.25


@pytest.mark.parametrize("freeze", [False, True])
def test_training_tells_the_classes_apart(shards, tmp_path, freeze):
    data = ShardDataModule(str(shards / "train"), str(shards / "val"), batch_size=16, num_workers=0)
    task = ClassifyTask(
        small_backbone(dropout=0.1), data.labels, warmup_steps=1, schedule_steps=90, freeze_backbone=freeze
    )
    before = {name: value.clone() for name, value in task.backbone.state_dict().items() if "codebooks" not in name}
    trainer = quiet_trainer(max_steps=60, val_check_interval=60, check_val_every_n_epoch=None, max_epochs=-1)
    trainer.fit(task, data)
    assert float(trainer.callback_metrics["val/top_1"]) > 0.8
    assert float(trainer.callback_metrics["val/map"]) > 0.8
    same = all(torch.equal(task.backbone.state_dict()[name], value) for name, value in before.items())
    assert same == freeze
    assert task.last_metrics["confusion_matrix"].sum() == 20
    again = load_task(saved(task, tmp_path / "c.ckpt"))
    assert again.labels == LABELS
    batch = data.val_dataset.read(range(4))
    torch.testing.assert_close(
        again.probabilities(*given(again, batch)), task.eval().probabilities(*given(task, batch))
    )


@pytest.mark.parametrize("name", ["label_smoothing", "head_dropout"])
def test_a_share_that_leaves_nothing_is_refused(name):
    with pytest.raises(UserError, match=f"{name} must be 0 or more and below 1, got 1"):
        classifying(**{name: 1})


def test_labels_that_are_none_are_refused(shards, tmp_path):
    with pytest.raises(UserError, match="two different labels"):
        ClassifyTask(small_backbone(), [])
    with pytest.raises(UserError, match="two different labels"):
        ClassifyTask(small_backbone(), ["a", "a"])
    path = saved(ClassifyTask(small_backbone(), LABELS), tmp_path / "c.ckpt")
    data = ShardDataModule(str(shards / "train"), str(shards / "val"), batch_size=8, num_workers=0)
    other = ClassifyTask(small_backbone(), ["high", "deep"])
    with pytest.raises(UserError, match="class 1 is 'low' there and 'deep' here"):
        quiet_trainer().validate(other, data, ckpt_path=path)


def test_an_empty_class_is_named(shards, tmp_path, capsys):
    (tmp_path / "names.csv").write_text('index,mid,display_name\n0,/m/1,low\n1,/m/2,"rare, odd"\n2,/m/3,high\n')
    train, val = str(shards / "train"), str(shards / "val")
    data = ShardDataModule(train, val, batch_size=8, num_workers=0, vocabulary=str(tmp_path / "names.csv"))
    assert data.labels == ("low", "rare, odd", "high")
    task = ClassifyTask(small_backbone(), data.labels, warmup_steps=1, schedule_steps=9)
    trainer = quiet_trainer(max_steps=1, val_check_interval=1, check_val_every_n_epoch=None, max_epochs=-1)
    trainer.fit(task, data)
    assert float(trainer.callback_metrics["val/classes_counted"]) == 2
    assert int(data.train_dataset.label_counts()[1]) == 0
    assert data.train_dataset.label_names(0) == ["high"]
    assert data.train_dataset.read([0]).labels.tolist() == [[0.0, 0.0, 1.0]]


def test_several_labels_need_the_loss_for_several(tmp_path):
    spec = short_spec()
    with ShardWriter(tmp_path / "s", spec, LABELS) as writer:
        meta = {"id": "x", "source": "x", "start_seconds": 0.0, "steps": spec.num_steps, "frames": spec.num_frames}
        codes, features = (
            torch.zeros(spec.num_codebooks, spec.num_steps).long(),
            torch.zeros(spec.num_frames, spec.feature_dim),
        )
        record = make_key("x", 0.0), codes.numpy(), features.numpy(), meta | {"labels": list(LABELS)}
        writer.add("x", [record])
        writer.finish(torch.ones(spec.num_codebooks, spec.codebook_size, spec.code_dim))
    data = ShardDataModule(str(tmp_path / "s"), str(tmp_path / "s"), batch_size=1, num_workers=0)
    with pytest.raises(UserError, match=r"has 2 labels, a softmax needs one: give --model\.multi_label true"):
        quiet_trainer(max_steps=1).fit(ClassifyTask(small_backbone(), LABELS, warmup_steps=1, schedule_steps=9), data)


def test_spliced_records_need_the_loss_for_several(tmp_path):
    spec = replace(short_spec(), segment_seconds=2.0, num_steps=100, video_fps=12.0, num_frames=24)
    folder = str(write_shards(tmp_path / "s", spec, 8))
    data = ShardDataModule(folder, folder, batch_size=4, num_workers=0, splice=1.0)
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    with pytest.raises(UserError, match=r"a spliced record has the labels of two.*--data.splice 0, or --model.multi"):
        trainer.fit(ClassifyTask(small_backbone(spec), LABELS, warmup_steps=0), data)
    trainer.fit(ClassifyTask(small_backbone(spec), LABELS, multi_label=True, warmup_steps=0), data)
    assert trainer.global_step == 1
