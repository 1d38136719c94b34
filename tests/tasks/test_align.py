import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tasks_help import quiet_trainer, saved, small_backbone
from tone_shards import short_spec, write_shards
from vab.backbone import Backbone
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.losses import info_nce
from vab.metrics.recall import match_ranks, matching_loss, retrieval_table
from vab.spec import UserError
from vab.tasks import AlignTask, ClassifyTask, PretrainTask, load_task
from vab.tasks.layers import sum_over


def aligned(dataset, **settings):
    task = AlignTask(small_backbone(positions=settings.pop("positions", "rotary")), embedding_dim=16, **settings).eval()
    task.backbone.set_codebooks(dataset.codebooks)
    return task


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    return ShardDataset(
        write_shards(tmp_path_factory.mktemp("ragged") / "r", short_spec(), 9, ragged=True, per_source=3)
    )


def unit(count, width, seed):
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_equal_embeddings_cost_what_guessing_costs():
    same = unit(1, 8, 0).expand(6, 8)
    assert float(info_nce(same, same, torch.tensor(20.0))) == pytest.approx(math.log(6), rel=1e-6)


def test_a_pair_apart_from_all_others_costs_nothing():
    sides = torch.eye(5)
    assert float(info_nce(sides, sides, torch.tensor(100.0))) < 1e-6


def test_the_loss_is_that_of_plain_loops():
    audio, video, same = unit(5, 8, 1), unit(5, 8, 2), torch.zeros(5, 5, dtype=torch.bool)
    same[0, 1] = same[1, 0] = same[2, 2] = True
    total = 0.0
    for queries, choices in ((audio, video), (video, audio)):
        for i in range(5):
            scores = [7.0 * float(queries[i] @ choices[j]) for j in range(5) if j == i or not same[i, j]]
            total -= 7.0 * float(queries[i] @ choices[i]) - math.log(sum(map(math.exp, scores)))
    assert float(info_nce(audio, video, torch.tensor(7.0), same_source=same)) == pytest.approx(total / 10, rel=1e-5)


def test_parts_of_a_gallery_are_the_whole():
    audio, video = unit(6, 8, 1), unit(6, 8, 2)
    whole = info_nce(audio, video, torch.tensor(7.0))
    parts = [info_nce(audio[i : i + 2], video[i : i + 2], torch.tensor(7.0), (audio, video), i) for i in (0, 2, 4)]
    assert float(torch.stack(parts).mean()) == pytest.approx(float(whole), rel=1e-6)
    assert float(matching_loss(audio, video, 7.0, chunk=4)) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_an_embedding_does_not_depend_on_its_batch_or_on_padding(ragged, positions):
    task = aligned(ragged, positions=positions)
    batch = ragged.read(range(9))
    with torch.no_grad():
        audio, video = task(batch)
        assert torch.allclose(audio.norm(dim=1), torch.ones(9))
        for number in range(9):
            alone = task(ragged.read([number]))
            torch.testing.assert_close(alone[0][0], audio[number], atol=1e-5, rtol=0)
            torch.testing.assert_close(alone[1][0], video[number], atol=1e-5, rtol=0)
        for number in range(9):  # whatever padding holds
            batch.codes[number, :, batch.steps[number] :] = 7
            batch.features[number, batch.frames[number] :] = 99.0
        again = task(batch)
    torch.testing.assert_close(again[0], audio, atol=1e-5, rtol=0)
    torch.testing.assert_close(again[1], video, atol=1e-5, rtol=0)
    assert float((audio[0] - audio[1]).abs().max()) > 1e-3


def test_the_projection_is_computed_in_float32_under_autocast(ragged):
    task, seen = aligned(ragged), {}
    for name in ("audio", "video"):
        projection = getattr(task, f"{name}_projection")
        projection.register_forward_hook(lambda _, given, made, name=name: seen.update({name: (given[0], made)}))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sides = dict(zip(("audio", "video"), task(ragged.read([1, 2])), strict=True))
    for name, side in sides.items():
        given, made = seen[name]
        projected = getattr(task, f"{name}_projection")(given)
        assert made.dtype == side.dtype == torch.float32
        torch.testing.assert_close(side, F.normalize(projected, dim=1), rtol=0, atol=1e-6)


def test_embeddings_of_bfloat16_weights_are_in_float32(ragged):
    task, batch = aligned(ragged).bfloat16(), ragged.read([1, 2])
    batch.features = batch.features.bfloat16()
    steps, frames = batch.lengths
    with torch.no_grad():
        sides = task(batch)
        positions = (
            task.backbone.encode(codes=batch.codes, steps=steps)[1],
            task.backbone.encode(features=batch.features, frames=frames)[0],
        )
    layers, lengths = (task.audio_projection, task.video_projection), (steps, frames)
    for side, layer, given, counted in zip(sides, layers, positions, lengths, strict=True):
        total, count = sum_over(given, counted)
        made = F.linear(total / count, layer.weight.float(), layer.bias.float())
        torch.testing.assert_close(side, F.normalize(made, dim=1), rtol=0, atol=1e-6)


def test_validation_counts_by_recording(ragged):
    task, batch = aligned(ragged), ragged.read(range(9))
    batch.source = batch.index // 3
    with torch.no_grad():
        task.validation_step(batch, 0)
        audio, video = task(batch)
    task.retrieval.scale = 7.0
    found = task.retrieval.compute()
    ranks = [match_ranks(*sides, groups=batch.source) for sides in ((audio, video), (video, audio))]
    table = retrieval_table(*ranks)
    assert {name: float(found[name]) for name in table} == {name: float(value) for name, value in table.items()}
    assert float(found["loss"]) == pytest.approx(float(matching_loss(audio, video, 7.0, groups=batch.source)), rel=1e-6)
    assert float(found["loss"]) < float(matching_loss(audio, video, 7.0))


def test_one_side_never_sees_the_other(ragged):
    task, batch = aligned(ragged), ragged.read([1, 2])
    before = task(batch)
    batch.features += 1.0
    after = task(batch)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_in_parts_the_gradient_is_that_of_the_whole_batch(ragged, size):
    gradients = []
    for micro_batch_size in (None, size):
        # In double precision only what is another sum would differ; in single, rounding does, and by CPU.
        task, batch = aligned(ragged, micro_batch_size=micro_batch_size).double(), ragged.read(range(5))
        batch.features = batch.features.double()
        loss = info_nce(*task._embed_in_parts(batch), task.scale)
        loss.backward()
        gradients.append({name: value.grad for name, value in task.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-12, rtol=1e-12)


def test_training_brings_sound_and_video_together(shards, tmp_path):
    data = ShardDataModule(str(shards / "train"), str(shards / "val"), batch_size=16, num_workers=0)
    task = AlignTask(small_backbone(), warmup_steps=1, schedule_steps=40, embedding_dim=16)
    trainer = quiet_trainer(max_steps=30, val_check_interval=30, check_val_every_n_epoch=None, max_epochs=-1)
    trainer.fit(task, data)
    figures = trainer.callback_metrics
    assert float(figures["val/loss"]) < math.log(20)  # guessing evenly
    assert {"val/recall_at_1_a2v", "val/median_rank_v2a", "val/mrr_a2v"} <= figures.keys()
    path = saved(task, tmp_path / "a.ckpt")
    again = load_task(path)
    assert isinstance(again, AlignTask)
    batch = data.val_dataset.read(range(4))
    torch.testing.assert_close(again(batch)[0], task.eval()(batch)[0])


def test_the_temperature_stays_above_its_bound(ragged):
    task = aligned(ragged, temperature=0.001)
    task.on_train_batch_end()
    assert task.scale.item() == pytest.approx(100.0)
    with pytest.raises(UserError, match="temperature above 0"):
        AlignTask(small_backbone(), temperature=0.0)


def test_records_without_video_are_refused(tmp_path):
    folder = str(write_shards(tmp_path / "s", short_spec(), 8, sound_only=True))
    data = ShardDataModule(folder, folder, batch_size=4, num_workers=0)
    with pytest.raises(UserError, match=r"8 of 8 records of .* have no video"):
        quiet_trainer(max_steps=1).fit(AlignTask(small_backbone(), warmup_steps=1, schedule_steps=9), data)


def begun(shards, task):
    data = ShardDataModule(str(shards / "train"), str(shards / "val"), batch_size=8, num_workers=0)
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(task, data)


@pytest.fixture(scope="module")
def pretrained(shards, tmp_path_factory):
    task = PretrainTask(small_backbone())
    task.backbone.set_codebooks(ShardDataset(shards / "train").codebooks)
    return saved(task, tmp_path_factory.mktemp("pretrained") / "p.ckpt"), task


def test_a_run_begins_with_the_weights_of_another_task(pretrained, tmp_path):
    path, theirs = pretrained
    torch.manual_seed(9)
    task = AlignTask(Backbone(short_spec(), **{k: v for k, v in theirs.backbone.init_args.items() if k != "spec"}))
    told = task.begin_with(path)
    assert "(PretrainTask): took audio_input, codebooks, modality, modality_blocks" in told
    assert "new: audio_projection, log_scale, video_projection" in told
    assert "not taken: heads, joint_blocks, joint_norm, mask_code" in told
    for name, value in task.backbone.state_dict().items():
        assert torch.equal(value, theirs.backbone.state_dict()[name]), name
    classes = ClassifyTask(small_backbone(), ["a", "b"])
    told = classes.begin_with(saved(task, tmp_path / "a.ckpt"))
    assert "(AlignTask)" in told
    assert "new: classifier" in told
    told = ClassifyTask(small_backbone(), ["a", "b", "c"]).begin_with(saved(classes, tmp_path / "c.ckpt"))
    assert "new: classifier" in told  # other classes: another last layer


@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_a_run_may_begin_with_other_lengths_but_not_with_other_sizes(tmp_path, positions):
    theirs = PretrainTask(small_backbone(positions=positions))
    theirs.backbone.set_codebooks(torch.ones_like(theirs.backbone.codebooks))
    path = saved(theirs, tmp_path / "p.ckpt")
    spec = replace(short_spec(), segment_seconds=0.32, num_steps=16, num_frames=4)
    task = AlignTask(small_backbone(spec, positions=positions))
    assert "took" in task.begin_with(path)
    batch = (torch.zeros(2, spec.num_codebooks, 16, dtype=torch.int64), torch.zeros(2, 4, spec.feature_dim))
    assert task.embed_audio(batch[0]).shape == task.embed_video(batch[1]).shape
    with pytest.raises(UserError, match=r"another backbone .*dim: 32 != 64"):
        AlignTask(small_backbone(dim=64)).begin_with(path)
    with pytest.raises(UserError, match="codec_hash"):
        AlignTask(small_backbone(replace(short_spec(), codec_hash="other"))).begin_with(path)


def test_a_resumed_run_does_not_look_for_what_it_began_with(shards, pretrained, tmp_path):
    start = shutil.copy(pretrained[0], tmp_path / "start.ckpt")
    data = ShardDataModule(str(shards / "train"), str(shards / "val"), batch_size=8, num_workers=0)
    task = AlignTask(small_backbone(), warmup_steps=1, schedule_steps=9, init_from=str(start))
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    (tmp_path / "start.ckpt").unlink()
    again = AlignTask(small_backbone(), warmup_steps=1, schedule_steps=9, init_from=str(start))
    with pytest.raises(UserError, match="no checkpoint at"):
        begun(shards, again)
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(again, data, ckpt_path=tmp_path / "one.ckpt")
    assert trainer.global_step == 2


def test_records_that_only_fill_a_rank_up_are_not_in_the_gallery(ragged):
    found = []
    for numbers, valid in ((range(4), None), (range(6), np.arange(6) < 4)):
        task = aligned(ragged)
        with torch.no_grad():
            task.validation_step(ragged.read(numbers, valid), 0)
        figures = task.retrieval.compute()
        found.append([float(figures[name]) for name in ("mrr_a2v", "mrr_v2a", "recall_at_1_a2v", "recall_at_1_v2a")])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
