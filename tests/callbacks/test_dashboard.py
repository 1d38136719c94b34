import re

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata

from tasks_help import quiet_trainer, small_backbone
from tone_shards import LABELS
from vab.callbacks import EMA, Dashboard, GenerationEval, MediaLog, Meters
from vab.callbacks.dashboard import _flatten, layout, main_metrics
from vab.data.reading.datamodule import ShardDataModule
from vab.metrics.recall import CUTS
from vab.tasks import AlignTask, ClassifyTask, PretrainTask

ALL = {
    "Losses",
    "Quality of generated sound",
    "Synchrony of generated sound",
    "Health of generated sound",
    "Throughput and memory",
    "Optimisation",
}


def page(found):
    (event,) = found.Tensors("custom_scalars__config__")
    return Layout.FromString(event.tensor_proto.string_val[0])


def row(found):
    """What the HPARAMS page reads."""
    content = found.summary_metadata
    opening, start = (content[f"_hparams_/{name}"].plugin_data.content for name in ("experiment", "session_start_info"))
    return metadata.parse_experiment_plugin_data(opening), metadata.parse_session_start_info_plugin_data(start)


def test_every_chart_of_the_page_has_something_to_draw(run, events, tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    run(EMA(), MediaLog(num_records=1), GenerationEval(num_records=12), Meters(), Dashboard(), logger=logger,
        log_every_n_steps=1)  # fmt: skip
    found = events(logger)
    tags = found.Tags()["scalars"]
    layout = page(found)
    assert {category.title for category in layout.category} == ALL
    drawn = set()
    for category in layout.category:
        for chart in category.chart:
            for pattern in chart.multiline.tag:
                matching = {tag for tag in tags if re.match(pattern, tag)}  # as TensorBoard does
                # The shards of this test have labels that the judge does not know.
                assert matching or pattern == "val/agreement$", (chart.title, pattern)
                drawn |= matching
    left = {tag for tag in tags if tag not in drawn and not re.search("_(level|hidden)_", tag)}
    assert left <= {"epoch", "val/accuracy", "train/codes/loss", "train/codes/accuracy", "val/codes/loss"}


def test_charts_follow_the_callbacks(run, events, tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    run(Dashboard(), GenerationEval(judges=[], num_records=2), logger=logger, steps=2)
    assert {category.title for category in page(events(logger)).category} == ALL - {
        "Quality of generated sound",
        "Health of generated sound",
    }


@pytest.mark.parametrize(
    ("task", "titles", "metrics"),
    [
        (PretrainTask, {"Losses"}, ["val/accuracy"]),
        (AlignTask, {"Losses", "Retrieval"}, [f"val/recall_at_{k}_{way}" for way in ("a2v", "v2a") for k in CUTS]),
        (lambda net, **more: ClassifyTask(net, LABELS, **more), {"Losses", "Classification"}, ["val/top_1", "val/map"]),
        (lambda net, **more: ClassifyTask(net, LABELS, multi_label=True, **more), {"Losses", "Classification"},
         ["val/map"]),
    ],
)  # fmt: skip
def test_each_task_shows_what_it_logs(shards, task, titles, metrics):
    task = task(small_backbone(), warmup_steps=1)
    trainer = quiet_trainer(max_steps=2, log_every_n_steps=1, callbacks=[GenerationEval(judges=[])])
    data = ShardDataModule(train=str(shards / "train"), val=str(shards / "val"), batch_size=24, num_workers=0)
    trainer.validate(task, data, verbose=False)
    trainer.callbacks = [GenerationEval(judges=["tiny"]), MediaLog()]
    found = layout(trainer, task)
    generated = {title for title in found if title.endswith("of generated sound")}
    assert bool(generated) == isinstance(task, PretrainTask)
    assert set(found) - generated == titles | {"Throughput and memory", "Optimisation"}
    assert main_metrics(trainer, task)[: 1 + len(metrics)] == ["val/loss", *metrics]
    assert set(metrics) <= set(trainer.callback_metrics)
    patterns = [tag for title in titles for tags in found[title].values() for tag in tags if tag.startswith("val/")]
    for pattern in patterns:
        few = r"val/top_\d+$"  # with two classes there is no top 5
        assert any(re.match(pattern, tag) for tag in trainer.callback_metrics) or pattern == few, pattern


def test_a_run_is_a_row_of_hyper_parameters_and_figures(run, events, tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    run(EMA(decay=0.5), GenerationEval(num_records=12), Dashboard(), Meters(), logger=logger, log_every_n_steps=1)
    found = events(logger)
    opening, start = row(found)
    columns = [info.name.tag for info in opening.metric_infos]
    assert (
        {"val/loss", "val/fad_tiny_to_codec", "val/kld_tiny_to_codec"} <= set(columns) <= set(found.Tags()["scalars"])
    )
    values = {name: value.number_value or value.string_value for name, value in start.hparams.items()}
    assert {info.name for info in opening.hparam_infos} == set(values)
    first = {info.name for info in opening.hparam_infos if info.differs}
    assert first == {"backbone.dim", "data.batch_size", "optimizer.lr", "seed", "trainer.precision"}
    assert values["task"] == "PretrainTask"
    assert values["backbone.dim"] == 32
    assert values["optimizer"] == "AdamW"
    assert values["optimizer.lr"] == pytest.approx(2e-4)
    assert values["ema.decay"] == 0.5
    assert values["data.batch_size"] == 8
    assert values["data.records"] == 48
    assert values["trainer.precision"] == "32-true"
    assert values["masking.law"] == "truncated_normal"
    assert values["parameters"] > 10_000
    assert not any("spec" in name or "class_path" in name for name in values)
    assert "_hparams_/session_end_info" in found.summary_metadata


def test_nested_settings_become_one_level():
    nested = {
        "net": {"class_path": "a.b.Net", "init_args": {"dim": 8, "deep": {"x": None, "y": [1, 2]}}},
        "on": True,
        "name": "n",
    }
    assert _flatten(nested) == {
        "net": "Net",
        "net.dim": 8,
        "net.deep.x": "none",
        "net.deep.y": "[1, 2]",
        "on": True,
        "name": "n",
    }


def test_a_tensorboard_that_is_not_the_first_logger_gets_all_the_same(run, events, tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    callbacks = MediaLog(num_records=1, num_checked=1), GenerationEval(num_records=4), Dashboard()
    run(*callbacks, steps=2, logger=[CSVLogger(tmp_path), logger], log_every_n_steps=1)
    found = events(logger)
    assert "record_0/3_generated" in found.Tags()["audio"]
    assert {"record_0/spectrograms", "generation/retrieval_0"} <= set(found.Tags()["images"])
    assert "health/peak" in found.Tags()["scalars"]
    assert page(found).category
    assert "_hparams_/session_end_info" in found.summary_metadata
