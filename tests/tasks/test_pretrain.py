import csv
import dataclasses
import inspect
import json
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import functional as F
from torch.optim import AdamW

from tasks_help import small_backbone
from tone_shards import short_spec, write_shards
from vab.backbone import Backbone
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.metrics.codes import guessing_table
from vab.spec import UserError
from vab.tasks import AlignTask, BaseTask, ClassifyTask, PretrainTask, load_task
from vab.tasks.base import fold
from vab.tasks.building import build
from vab.tasks.checkpoints import find_checkpoint
from vab.tasks.optim import decay_groups, linear_warmup_decay
from vab.tokens.expectation import expected_codes
from vab.tokens.masking import Masking
from vab.tokens.noise import fold_in, record_keys
from vab.tokens.sampler import Sampler


def small_task(spec=None, **settings):
    torch.manual_seed(0)
    backbone = Backbone(spec or short_spec(), dim=32, num_heads=2, num_modality_layers=1, num_joint_layers=1, dropout=0)
    return PretrainTask(backbone, **({"warmup_steps": 1, "schedule_steps": 100} | settings))


@pytest.fixture
def dataset(shards):
    return ShardDataset(shards / "val")


@pytest.fixture
def task(dataset):
    task = small_task(sampler=Sampler(decode_steps=3, guidance_scale=2.0)).eval()
    task.backbone.set_codebooks(dataset.codebooks)
    return task


def data_module(shards, **settings):
    return ShardDataModule(
        train=str(shards / "train"),
        val=str(shards / "val"),
        **({"batch_size": 8, "num_workers": 0} | settings),
    )


def quiet_trainer(**settings):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **settings,
    )


def test_learning_rate_rises_from_above_zero_and_falls_to_the_end():
    factor = linear_warmup_decay(warmup=4, end=10, final=0.1)
    assert [round(factor(step), 4) for step in (0, 1, 3, 4, 7, 10, 50)] == [0.25, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1]


def test_matrices_decay_and_vectors_do_not(task):
    decayed, kept = decay_groups(task)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    stacked = {names[id(parameter)] for parameter in kept["params"] if parameter.ndim > 1}
    assert stacked == {"backbone.modality", "backbone.mask_code"}
    assert "weight_decay" not in decayed
    assert kept["weight_decay"] == 0.0
    counted = sum(p.numel() for group in (decayed, kept) for p in group["params"])
    assert counted == sum(p.numel() for p in task.parameters() if p.requires_grad)


def test_the_codebooks_are_not_trained(task):
    assert "backbone.codebooks" not in dict(task.named_parameters())


def test_fold_tells_places_apart():
    folded = {fold(seed, epoch, step, 0) for seed in range(4) for epoch in range(4) for step in range(64)}
    assert len(folded) == 4 * 4 * 64
    assert all(0 <= value < 2**31 for value in folded)


@pytest.mark.parametrize("kind", [PretrainTask, AlignTask, ClassifyTask])
def test_hyper_parameters_are_all_the_arguments(kind):
    given = {"labels": ("low", "high")} if kind is ClassifyTask else {}
    task = kind(small_backbone(), seed=3, compile="eager", **given)
    assert {*inspect.signature(kind).parameters} | {"_class_path"} == {*task.hparams}
    assert (task.hparams["seed"], task.hparams["compile"]) == (3, "eager")
    assert task.hparams["backbone"]["init_args"]["num_joint_layers"] == 1  # as it was given


class WithMargin(PretrainTask):
    """A task of a user, which names the argument that it adds."""

    def __init__(self, *args, margin=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.remember(margin=margin)


def test_a_subclass_adds_its_own_hyper_parameters_by_name():
    task = WithMargin(small_backbone(), seed=3, margin=0.25)
    assert {*inspect.signature(PretrainTask).parameters} | {"_class_path", "margin"} == {*task.hparams}
    assert (task.hparams["seed"], task.hparams["margin"]) == (3, 0.25)
    assert task.hparams["_class_path"].endswith(".WithMargin")


def test_hyper_parameters_are_json_and_rebuild_the_task(task):
    settings = json.loads(json.dumps(dict(task.hparams)))
    again = PretrainTask(**{name: value for name, value in settings.items() if not name.startswith("_")})
    assert again.spec == task.spec
    assert again.sampler == task.sampler
    assert again.masking == task.masking
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in task.state_dict().items()}
    assert type(again.make_optimizer(decay_groups(again))) is torch.optim.AdamW


def test_an_optimizer_given_in_python_comes_back_with_its_values(dataset):
    task = small_task(optimizer=partial(torch.optim.SGD, lr=0.3, momentum=0.9))
    settings = {name: value for name, value in task.hparams.items() if not name.startswith("_")}
    optimizer = PretrainTask(**settings).make_optimizer(decay_groups(task))
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.3
    assert optimizer.defaults["momentum"] == 0.9


def test_a_checkpoint_reloads_by_either_way(shards, tmp_path):
    task = small_task()
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(task, data_module(shards))
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    for again in (load_task(path), load_task(tmp_path), PretrainTask.load_from_checkpoint(path, weights_only=True)):
        assert isinstance(again, BaseTask)
        assert all(
            torch.equal(a, b) for a, b in zip(task.state_dict().values(), again.state_dict().values(), strict=True)
        )
        assert again.backbone.has_codebooks


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no \.ckpt file under"):
        find_checkpoint(tmp_path)


def test_the_loss_is_of_hidden_codes_only(task, dataset):
    task.label_smoothing, task.feature_dropout = 0.0, 0.0
    batch = dataset.__getitems__(list(range(6)))
    mask = task.evaluation_mask(batch)
    logits = task.logits(batch, mask)
    task.quality.update(*task.guessing_sums(logits, batch, mask))
    by_hand = torch.stack([
        F.cross_entropy(logits[b, k, t], batch.codes[b, k, t])
        for b, k, t in mask.nonzero().tolist()
    ])  # fmt: skip
    assert float(task.quality.compute()["loss"]) == pytest.approx(float(by_hand.mean()), rel=1e-5)


def test_masks_and_scores_do_not_depend_on_the_batch(task, dataset):
    together = dataset.__getitems__(list(range(8)))
    alone = [dataset.__getitems__([number]) for number in range(8)]
    mask = task.evaluation_mask(together)
    assert torch.equal(mask, torch.cat([task.evaluation_mask(one) for one in alone]))
    logits = torch.cat([task.logits(one, task.evaluation_mask(one)) for one in alone])
    torch.testing.assert_close(task.logits(together, mask), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [3, 8, 20])
def test_validation_is_the_same_for_any_batch_size(shards, batch_size):
    task = small_task()
    trainer = quiet_trainer()
    (metrics,) = trainer.validate(task, data_module(shards, val_batch_size=batch_size), verbose=False)
    reference = quiet_trainer().validate(small_task(), data_module(shards), verbose=False)[0]
    assert metrics.keys() == reference.keys()
    for name, value in metrics.items():
        assert value == pytest.approx(reference[name], rel=1e-5), name


def test_a_record_is_scored_under_one_mask_in_every_epoch_and_for_every_seed_under_another(shards, dataset):
    masks, batch = {}, dataset.read(range(8))

    class Keep(Callback):
        def on_validation_epoch_start(self, trainer, task):
            masks[trainer.current_epoch] = task.evaluation_mask(batch)

    settings = {"max_epochs": 2, "limit_train_batches": 1, "limit_val_batches": 1}
    quiet_trainer(callbacks=[Keep()], **settings).fit(small_task(), data_module(shards))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], small_task(seed=1).evaluation_mask(batch))


def test_records_that_only_fill_a_rank_up_are_not_scored(task, dataset):
    whole, filled = dataset.read(range(4)), dataset.read(range(6), np.arange(6) < 4)
    sums = []
    for batch in (whole, filled):
        mask = task.evaluation_mask(batch)
        sums.append(task.guessing_sums(task.logits(batch, mask), batch, mask))
    for one, other in zip(*sums, strict=True):
        torch.testing.assert_close(other, one, atol=1e-3, rtol=1e-5)
    assert sums[0][0][:, 2].sum() > 0


def test_short_records_are_scored_on_what_they_have(tmp_path):
    spec = short_spec()
    folder = write_shards(tmp_path / "ragged", spec, 6, ragged=True)
    dataset = ShardDataset(folder)
    task = small_task().eval()
    task.backbone.set_codebooks(dataset.codebooks)
    batch = dataset.__getitems__(list(range(6)))
    assert batch.ragged
    mask = task.evaluation_mask(batch)
    padding = torch.arange(spec.num_steps) >= batch.steps[:, None]
    assert not (mask & padding[:, None]).any()
    changed = dataclasses.replace(
        batch,
        codes=torch.where(padding[:, None], (batch.codes + 1) % spec.codebook_size, batch.codes),
        features=torch.where((torch.arange(spec.num_frames) >= batch.frames[:, None])[..., None], 9.0, batch.features),
    )
    torch.testing.assert_close(task.logits(batch, mask)[mask], task.logits(changed, mask)[mask])


def test_generation_keeps_what_is_known_and_depends_on_the_key_alone(task, dataset):
    batch = dataset.__getitems__(list(range(7)))
    keys = record_keys(3, batch.index)
    mask = torch.zeros_like(batch.codes, dtype=torch.bool)
    mask[..., 10:] = True
    made = task.generate(batch.features, keys, codes=batch.codes, mask=mask)
    assert torch.equal(made[~mask], batch.codes[~mask])
    alone = task.generate(batch.features[4:5], keys[4:5], codes=batch.codes[4:5], mask=mask[4:5])
    assert torch.equal(made[4:5], alone)
    other = task.generate(batch.features, record_keys(4, batch.index), codes=batch.codes, mask=mask)
    assert not torch.equal(made, other)


def test_without_the_video_the_video_does_not_matter(task, dataset):
    batch = dataset.__getitems__(list(range(4)))
    keys = record_keys(0, batch.index)
    without = task.generate(batch.features, keys, drop_features=True)
    assert torch.equal(without, task.generate(-batch.features, keys, drop_features=True))
    assert not torch.equal(without, task.generate(batch.features, keys))


def test_shards_of_another_codec_are_refused_with_both_values(shards):
    spec = dataclasses.replace(short_spec(), codec_hash="0" * 64)
    with pytest.raises(UserError, match=r"model and shards do not fit .*codec_hash: 0{64} != "):
        quiet_trainer(max_steps=1).fit(small_task(spec), data_module(shards))


def test_a_training_step_hides_withholds_and_scores_as_stated(task, dataset, monkeypatch):
    batch = dataset.__getitems__(list(range(20)))
    given = {}

    def spy(batch, mask, drop_features):
        given.update(mask=mask, dropped=drop_features)
        return PretrainTask.trunk(task, batch, mask, drop_features)

    monkeypatch.setattr(task, "trunk", spy)
    task.feature_dropout = 0.5
    task.trainer = quiet_trainer(max_steps=1)
    task.trainer.log_every_n_steps = 0
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    loss = task.training_step(batch, 0)
    again = task.training_step(batch, 0)
    assert torch.equal(loss, again)
    assert 0 < int(given["dropped"].sum()) < 20
    logits = task.logits(batch, given["mask"], given["dropped"])
    mean = F.cross_entropy(logits[given["mask"]], batch.codes[given["mask"]], label_smoothing=task.label_smoothing)
    torch.testing.assert_close(task.step_loss, mean)
    expected = mean * given["mask"].sum() / (batch.codes.numel() * task.masking.mean_ratio)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("conditioning_levels", [0, 2])
def test_a_logged_step_writes_the_quality_of_its_own_logits(conditioning_levels, dataset, tmp_path, monkeypatch):
    task = small_task(dataset.spec, conditioning_levels=conditioning_levels, feature_dropout=0.0).train()
    task.backbone.set_codebooks(dataset.codebooks)
    task.trainer = quiet_trainer(max_steps=1)
    task.trainer.log_every_n_steps = 1
    task.trainer.loggers = [CSVLogger(tmp_path)]
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    batch = dataset.__getitems__(list(range(20)))
    mask = task.mask_for(task.training_keys(batch), batch.steps)
    expected = guessing_table(*task.guessing_sums(task.logits(batch, mask), batch, mask))
    monkeypatch.setattr(task.backbone, "score", None)  # all logits at once would need more memory than the step
    written = {}
    monkeypatch.setattr(task.trainer.loggers[0], "log_metrics", lambda metrics, step: written.update(metrics))
    task.training_step(batch, 0)
    task.on_train_batch_end()
    codes = {name: value for name, value in written.items() if name.startswith("train/codes/")}
    assert codes == {f"train/codes/{name}": pytest.approx(float(value)) for name, value in expected.items()}
    assert f"train/codes/accuracy_level_{conditioning_levels}" in written


def test_a_share_of_hidden_codes_that_a_batch_does_not_have_is_not_logged_again(shards, tmp_path):
    class Switch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.masking = Masking(law="fixed", ratio=(0.55, 0.85, 0.55)[batch_idx])

    data = ShardDataModule(f"{shards}/train", f"{shards}/val", batch_size=8, num_workers=0)
    task = PretrainTask(small_backbone(data.spec), warmup_steps=1, schedule_steps=10)
    trainer = quiet_trainer(max_steps=3, limit_val_batches=0, log_every_n_steps=1, callbacks=[Switch()])
    trainer.loggers = [CSVLogger(tmp_path)]
    trainer.fit(task, data)
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    for name, steps in {"50_60": ["0", "2"], "80_90": ["1"]}.items():
        assert [row["step"] for row in rows if row.get(f"train/codes/loss_hidden_{name}")] == steps, name


def test_a_run_goes_on_with_the_optimizer_settings_of_its_config(shards, tmp_path, caplog):
    def fit(steps, resume=None, **settings):
        data = ShardDataModule(f"{shards}/train", f"{shards}/val", batch_size=8, num_workers=0)
        task = PretrainTask(
            small_backbone(data.spec), optimizer=lambda p: AdamW(p, **settings), warmup_steps=2, schedule_steps=10
        )
        trainer = quiet_trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0)
        trainer.fit(task, data, ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(path := tmp_path / "last.ckpt")
        return path, trainer.optimizers[0], [value.clone() for value in task.state_dict().values()]

    old = {"lr": 1e-3, "weight_decay": 0.1}
    begun, _, _ = fit(3, **old)
    begun = begun.rename(tmp_path / "begun.ckpt")
    with caplog.at_level("INFO"):
        _, optimizer, _ = fit(5, begun, lr=2e-3, weight_decay=0.0, betas=(0.8, 0.9), fused=True)
    told = [record.getMessage() for record in caplog.records if "goes on with the config's" in record.getMessage()]
    assert len(told) == 1
    for words in ("lr: 0.001 -> 0.002", "weight_decay: 0.1 -> 0.0", "betas: (0.9, 0.999) -> (0.8, 0.9)"):
        assert words in told[0].replace("[", "(").replace("]", ")")  # torch 2.8 has them as lists
    for group in optimizer.param_groups:
        assert (group["weight_decay"], [*group["betas"]], group["fused"]) == (0.0, [0.8, 0.9], True)
        assert group["lr"] == pytest.approx(2e-3 * (10 - 5) / (10 - 2))
        assert group["initial_lr"] == 2e-3
    caplog.clear()
    _, _, plain = fit(5, begun, **old)
    _, optimizer, again = fit(5, begun, **old, foreach=False)
    assert not caplog.records or all("goes on with the config's" not in r.getMessage() for r in caplog.records)
    assert all(map(torch.equal, plain, again))
    assert optimizer.param_groups[0]["foreach"] is False


def test_a_run_without_its_average_goes_on_from_the_live_weights(task):
    live = {name: value + 1 for name, value in task.state_dict().items()}
    checkpoint = {
        "hyper_parameters": dict(task.hparams),
        "state_dict": dict(task.state_dict()),
        "live_state_dict": live,
    }
    task.trainer = quiet_trainer(max_steps=1)
    task.trainer.state.fn = TrainerFn.VALIDATING
    task.on_load_checkpoint(checkpoint)
    assert checkpoint["state_dict"] is not live
    task.trainer.state.fn = TrainerFn.FITTING
    task.on_load_checkpoint(checkpoint)
    assert checkpoint["state_dict"] is live


def test_a_checkpoint_cannot_name_just_any_class():
    with pytest.raises(TypeError, match=r"subprocess\.Popen is no Backbone"):
        build({"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}})


def test_a_schedule_shorter_than_its_warm_up_is_refused(shards):
    task = small_task(warmup_steps=10, schedule_steps=5)
    with pytest.raises(UserError, match="warmup_steps 10 must be below"):
        quiet_trainer(max_steps=1).fit(task, data_module(shards))


@pytest.mark.parametrize("schedule_steps", [20, None])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (3, 3), (1, 1), (0.25, 5), (0.0, 0), (1.0, 1)])
def test_a_warm_up_is_a_number_of_steps_or_a_share_of_the_schedule(shards, warmup, steps, schedule_steps):
    rates = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, *unused):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"] / 2e-4)

    task = small_task(warmup_steps=warmup, schedule_steps=schedule_steps)
    quiet_trainer(max_steps=20, limit_val_batches=0, callbacks=[Rates()]).fit(task, data_module(shards))
    assert rates == pytest.approx([*map(linear_warmup_decay(steps, 20, 0.0), range(20))])


@pytest.mark.parametrize("warmup", [-1, -0.1, 2.5, float("nan"), float("inf")])
def test_a_warm_up_that_is_neither_steps_nor_a_share_is_refused(warmup):
    with pytest.raises(UserError, match="warmup_steps must be a number of steps or a share of the schedule below 1"):
        small_task(warmup_steps=warmup)


def test_masking_settings_reach_the_mask(dataset):
    task = small_task(masking=Masking(law="fixed", ratio=1.0))
    assert task.evaluation_mask(dataset.__getitems__([0, 1])).all()


def fine_task(dataset, **settings):
    """A model that fills levels 2 and 3 for levels 0 and 1."""
    task = small_task(dataset.spec, conditioning_levels=2, **settings).eval()
    task.backbone.set_codebooks(dataset.codebooks)
    return task


def test_conditioning_levels_are_never_hidden_nor_scored(dataset):
    task = fine_task(dataset, masking=Masking(law="fixed", ratio=1.0))
    batch = dataset.__getitems__([0, 1, 2])
    mask = task.mask_for(record_keys(0, batch.index), batch.steps)
    sound = torch.arange(batch.codes.shape[-1]) < batch.steps[:, None]
    assert not mask[:, :2].any()
    assert torch.equal(mask[:, 2:], sound[:, None].expand(-1, 2, -1))
    per_level, per_bucket = task.guessing_sums(task.logits(batch, mask), batch, mask)
    assert per_level[:2].eq(0).all()
    assert per_level[2:, 2].tolist() == [int(batch.steps.sum())] * 2
    assert per_bucket[-1, 2] == 2 * batch.steps.sum()  # all that can be hidden is: the last bucket


def test_a_fine_model_keeps_its_conditions_and_makes_the_rest(dataset):
    task = fine_task(dataset, sampler=Sampler([3, 1], guidance_scale=2.0))
    batch = dataset.__getitems__([0, 1, 2])
    steps, frames = batch.lengths
    made = task.predict_step(batch, 0)["codes"]
    sound = (torch.arange(batch.codes.shape[-1]) < batch.steps[:, None])[:, None]
    assert torch.equal(made[:, :2] * sound, batch.codes[:, :2] * sound)
    assert not torch.equal(made[:, 2:] * sound, batch.codes[:, 2:] * sound)
    changed = batch.codes.clone()
    changed[:, 2:] = 0  # what it is to make must not be read
    keys = record_keys(task.seed, batch.index)
    again = task.generate(batch.features, keys, codes=changed, steps=steps, frames=frames)
    assert torch.equal(made * sound, again * sound)
    with pytest.raises(ValueError, match="first 2 levels of the codes must be given"):
        task.generate(batch.features, keys)


def test_a_fine_model_learns_from_its_conditions(dataset):
    task = fine_task(dataset)
    batch = dataset.__getitems__([0, 1, 2])
    mask = task.mask_for(record_keys(0, batch.index), batch.steps)
    other = dataclasses.replace(batch, codes=batch.codes.clone())
    other.codes[:, 0] = (other.codes[:, 0] + 1) % dataset.spec.codebook_size
    assert not torch.equal(task.logits(batch, mask)[:, 2:], task.logits(other, mask)[:, 2:])


@pytest.mark.parametrize("levels", [-1, 4])
def test_conditioning_levels_must_leave_something_to_make(levels):
    with pytest.raises(UserError, match="conditioning_levels must be at least 0 and leave a level"):
        small_task(conditioning_levels=levels)


def test_a_sampler_of_more_levels_than_the_model_makes_is_refused_at_once():
    with pytest.raises(UserError, match="lists 3 levels, but the codes have 2"):
        small_task(conditioning_levels=2, sampler=Sampler([4, 1, 1]))


def test_what_the_training_audio_is_like_travels_with_the_checkpoint(shards, tmp_path):
    data = data_module(shards)
    task = small_task(data.spec, conditioning_levels=1)
    task.audio_statistics = {"rms_db_mean": -20.5}
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    read = load_task(tmp_path)
    assert read.audio_statistics == {"rms_db_mean": -20.5}
    assert read.conditioning_levels == 1
    resumed = small_task(data.spec, conditioning_levels=1)
    quiet_trainer(max_steps=2, limit_val_batches=0).fit(resumed, data_module(shards), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.audio_statistics == {"rms_db_mean": -20.5}


def test_a_fine_model_can_take_what_it_expects_in_one_pass(dataset):
    task = fine_task(dataset)
    batch = dataset.__getitems__([0, 1, 2])
    steps, frames = batch.lengths
    keys = record_keys(0, batch.index)
    sound = (torch.arange(batch.codes.shape[-1]) < batch.steps[:, None])[:, None]
    sampler = Sampler(expected=True, guidance_scale=1.0)
    made, other = (
        task.generate(batch.features, key, sampler, codes=batch.codes, steps=steps, frames=frames)
        for key in (keys, keys + 1)
    )
    assert torch.equal(made, other)  # nothing is left to chance
    assert torch.equal(made[:, :2] * sound, batch.codes[:, :2] * sound)
    mask = F.pad(sound.expand(-1, 2, -1), (0, 0, 2, 0))
    probabilities = task.logits(batch, mask).softmax(-1)
    assert torch.equal(made * sound, expected_codes(probabilities, dataset.codebooks, batch.codes, mask) * sound)
    assert sampler.total_steps == 1


def test_a_record_that_is_drawn_again_in_an_epoch_has_another_mask(shards):
    task = small_task()
    batch = ShardDataset(shards / "train").read([3, 5, 3, 3])
    batch.draw = torch.tensor([0, 0, 1, 2])
    keys = task.training_keys(batch)
    assert torch.equal(keys[:2], fold_in(record_keys(task.seed, batch.index[:2]), 0))
    assert len(set(keys.tolist())) == 4
    masks = task.mask_for(keys, batch.steps)
    assert not any(torch.equal(masks[0], masks[row]) for row in (1, 2, 3))
