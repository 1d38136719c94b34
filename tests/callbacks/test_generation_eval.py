import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from vab.backbone import Backbone
from vab.callbacks import EMA, Checkpoints, GenerationEval
from vab.callbacks.generation_eval import GENERATED
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.dataset import ShardDataset
from vab.frozen.batches import judge_sounds
from vab.frozen.codec import load_codec
from vab.frozen.judges import load_judge
from vab.metrics.divergence import paired_kl
from vab.metrics.frechet import frechet_distance, moments
from vab.metrics.recall import match_ranks
from vab.metrics.synchrony import Synchrony, find_onsets
from vab.spec import UserError
from vab.tasks import PretrainTask, load_task
from vab.tokens.noise import record_keys
from vab.tokens.sampler import Sampler

FAD = "val/fad_tiny_to_codec"


class Seen(Callback):
    """Steps at whose validation a figure was there, and the figures as callbacks see them."""

    def __init__(self):
        self.steps, self.metrics, self.after_training = [], [], []

    def on_validation_end(self, trainer, module):
        if FAD in trainer.callback_metrics:
            self.steps.append(trainer.global_step)
            self.metrics.append(dict(trainer.callback_metrics))

    def on_train_batch_end(self, trainer, module, *_):
        self.after_training += [name for name in trainer.callback_metrics if GENERATED.match(name)]


def by_hand(task, dataset, numbers, seed):
    """The same figures, straight from the pure functions."""
    codec, judge = load_codec("tiny"), load_judge("tiny")
    batch = dataset.read(numbers)
    with torch.no_grad():
        given = batch.codes if task.conditioning_levels else None
        codes = task.generate(batch.features, record_keys(seed, batch.index), codes=given)
        made, real = (codec.decode(x)[:, 0] for x in (codes, batch.codes))
        ours, theirs = (judge_sounds(judge, list(sounds), 16_000) for sounds in (made, real))
    synchrony = Synchrony(0.1)
    synchrony.update([(find_onsets(a, 16_000), find_onsets(b, 16_000)) for a, b in zip(real, made, strict=True)])
    timing = synchrony.compute()
    ranks = match_ranks(ours.embedding, theirs.embedding)
    return {
        FAD: frechet_distance(*moments(theirs.embedding), *moments(ours.embedding)),
        "val/kld_tiny_to_codec": paired_kl(theirs.logits, ours.logits).mean(),
        "val/recall_at_1_g2r": (ranks < 1).double().mean(),
        "val/recall_at_5_g2r": (ranks < 5).double().mean(),
    } | {
        f"val/{name}_to_codec": timing[kind]
        for kind, name in (
            ("onset_recall", "onset_recall"),
            ("onset_precision", "onset_precision"),
            ("offset_seconds", "onset_offset"),
        )
        if kind in timing
    }


@pytest.mark.parametrize("first", [True, False])
def test_figures_are_those_of_the_averaged_weights_on_a_fixed_subset(run, shards, first):
    evaluation, average = GenerationEval(num_records=6, seed=3), EMA(decay=0.5)
    callbacks = [evaluation, average] if first else [average, evaluation]  # their order does not matter
    trainer, _, checkpoint = run(*callbacks)
    dataset = ShardDataset(shards / "val")
    expected = by_hand(load_task(checkpoint), dataset, [0, 3, 6, 10, 13, 16], seed=3)
    assert evaluation.last_metrics == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4)
    assert set(evaluation.last_metrics) <= set(evaluation.names)
    assert all(GENERATED.match(name) for name in evaluation.names)
    for name, value in evaluation.last_metrics.items():
        assert float(trainer.callback_metrics[name]) == pytest.approx(value, rel=1e-6)


def test_the_parts_of_a_batch_make_no_difference(run):
    whole, parts = (GenerationEval(num_records=7, batch_size=size) for size in (7, 3))
    for evaluation in (whole, parts):
        run(evaluation, steps=2)
    assert whole.last_metrics == pytest.approx(parts.last_metrics, rel=1e-6)


def test_it_takes_place_when_due_and_at_the_last_validation(run):
    for every, expected in ((1, [2, 4, 6]), (4, [4, 6]), (100, [6])):
        seen = Seen()
        run(GenerationEval(num_records=2, every_n_steps=every), seen, steps=7)
        assert seen.steps == expected
        assert not seen.after_training  # no figure of weights that are gone
    seen = Seen()  # of steps that have two batches each there is a validation after every one
    run(GenerationEval(num_records=2, every_n_steps=100), seen, steps=3, accumulate_grad_batches=2)
    assert seen.steps == [3]


def test_a_resumed_run_keeps_the_rhythm(run):
    whole, resumed = Seen(), Seen()
    settings = {"num_records": 2, "every_n_steps": 6}
    run(GenerationEval(**settings), whole, steps=16, name="whole")
    _, _, half = run(GenerationEval(**settings), steps=8, name="half")
    assert whole.steps == [6, 12, 16]
    run(GenerationEval(**settings), resumed, steps=16, resume=half, name="resumed")
    assert resumed.steps == [12, 16]


def test_the_best_checkpoint_can_be_chosen_by_it(run, tmp_path):
    best = Checkpoints(tmp_path / "best", monitor=FAD, mode="min", filename="best-{step}", every_n_epochs=1)
    seen = Seen()
    run(GenerationEval(num_records=4, every_n_steps=4), seen, best, steps=10)
    assert seen.steps == [4, 8, 10]  # no figure at 2 and 6
    figures = [float(metrics[FAD]) for metrics in seen.metrics]
    step = seen.steps[figures.index(min(figures))]
    assert [path.name for path in (tmp_path / "best").iterdir()] == [f"best-step={step}.ckpt"]
    assert float(best.best_model_score) == min(figures)


def test_a_figure_that_is_nowhere_is_no_monitor(run, tmp_path):
    with pytest.raises(UserError, match=r"val/fad_tyni_to_codec.*val/fad_tiny_to_codec"):
        run(GenerationEval(num_records=2), Checkpoints(tmp_path, monitor="val/fad_tyni_to_codec"))
    with pytest.raises(UserError, match="GenerationEval"):
        run(Checkpoints(tmp_path, monitor=FAD))
    with pytest.raises(UserError, match=r"cannot monitor val/los: the run has .*val/loss"):
        run(GenerationEval(num_records=2), Checkpoints(tmp_path, monitor="val/los"))


def test_nothing_of_codec_and_judge_is_in_a_checkpoint(run):
    _, _, plain = run(name="plain")
    _, _, checkpoint = run(GenerationEval(num_records=2))
    contents = [torch.load(path, weights_only=True) for path in (plain, checkpoint)]
    assert contents[0]["state_dict"].keys() == contents[1]["state_dict"].keys()
    (state,) = (state for name, state in contents[1]["callbacks"].items() if name.startswith("GenerationEval"))
    assert state == {"last_step": 2}  # saved at step 4, before that step's validation


class Draws(Callback):
    """Where the global random generators stand after each step."""

    def __init__(self):
        self.states = []

    def on_train_start(self, trainer, module):
        self.on_train_batch_end(trainer, module)

    def on_validation_end(self, trainer, module):
        self.on_train_batch_end(trainer, module)

    def on_train_batch_end(self, trainer, module, *_):
        numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
        self.states.append((torch.get_rng_state().tolist(), numpy_state, random.getstate()))


def test_training_is_the_same_with_and_without(run):
    with_draws, without_draws = Draws(), Draws()
    for callbacks in ((GenerationEval(num_records=2), with_draws), (without_draws,)):
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        _, task, _ = run(*callbacks)
        weights = task.state_dict()
        if callbacks[-1] is with_draws:
            first = weights
    assert with_draws.states == without_draws.states
    assert all(torch.equal(first[name], weights[name]) for name in weights)


def test_without_judges_there_is_synchrony(run):
    evaluation = GenerationEval(judges=[], num_records=4)
    trainer, _, _ = run(evaluation, steps=2)
    assert set(evaluation.names) == {f"val/onset_{kind}_to_codec" for kind in ("recall", "precision", "offset")}
    assert set(evaluation.last_metrics) <= set(evaluation.names)
    assert not any(name.startswith(("val/fad", "val/kld")) for name in trainer.callback_metrics)


def test_what_is_missing_is_missed_before_training(run):
    class Steps(Callback):
        count = 0

        def on_train_batch_end(self, *_):
            Steps.count += 1

    with pytest.raises(UserError, match="unknown judge 'tyni'"):
        run(GenerationEval(judges=["tyni"], every_n_steps=1000), Steps())
    assert Steps.count == 0
    for wrong in ({"num_records": 1}, {"every_n_steps": 0}, {"batch_size": 0}, {"tolerance_seconds": 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            GenerationEval(**wrong)
    with pytest.raises(UserError, match="twice"):
        GenerationEval(judges=["tiny", "tiny"])


def test_a_fine_stage_is_given_the_coarse_levels(shards):
    data = ShardDataModule(train=str(shards / "train"), val=str(shards / "val"), batch_size=8, num_workers=0)
    backbone = Backbone(data.spec, dim=16, num_heads=1, num_modality_layers=1, num_joint_layers=1)
    task = PretrainTask(backbone, sampler=Sampler(decode_steps=1), conditioning_levels=2)
    evaluation = GenerationEval(num_records=6)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[evaluation], use_distributed_sampler=False,
                      enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    trainer.validate(task, data, verbose=False)  # a validation alone is always due
    expected = by_hand(task.eval(), data.val_dataset, [0, 3, 6, 10, 13, 16], seed=0)
    assert evaluation.last_metrics == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4)


def test_pictures_show_what_was_found_and_the_same_records_each_time(run, events, tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    run(GenerationEval(num_records=6), logger=logger, log_every_n_steps=2)
    found = events(logger)
    assert sorted(found.Tags()["images"]) == [f"generation/retrieval_{number}" for number in range(3)]
    assert [event.step for event in found.Images("generation/retrieval_0")] == [2, 4]
