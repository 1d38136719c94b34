"""Unmodified commands run end to end on pretended CUDA, with the CPU's results, and rarely wait for the device."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from pretend_runs import start

from small_media import video
from tone_shards import SHORT_FPS, SHORT_SECONDS
from vab.data.reading.dataset import ShardDataset
from vab.tasks.checkpoints import find_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DEMO = Path(__file__).parents[2] / "configs" / "demo"


def fit(task, shards, accelerator, *flags, steps, every, name):
    """A recipe of the demo world with all its callbacks, as a matter of seconds."""
    sizes = [f"--model.backbone.{key}" for key in ("dim=32", "num_heads=2", "num_modality_layers=1")]
    return [
        *("fit", f"--config={DEMO / f'{task}.yaml'}"),
        *(f"--data.train={shards / 'train'}", f"--data.val={shards / 'val'}"),
        *("--data.batch_size=16", *sizes, "--model.backbone.num_joint_layers=1", "--model.warmup_steps=2"),
        # AdamW's eps: a gradient that is nothing but rounding must not become a step of full size
        *("--model.schedule_steps=100", "--model.optimizer.init_args.eps=0.001"),
        *(f"--trainer.accelerator={accelerator}", f"--trainer.max_steps={steps}"),
        *(f"--trainer.val_check_interval={every}", f"--trainer.logger.init_args.name={name}", *flags),
    ]  # fmt: skip


def commands(shards, media, device):
    """The main commands, each on what those before it made."""
    accelerator = "gpu" if device == "cuda" else "cpu"
    sampler = "--model.sampler.decode_steps=2"
    pretrain = fit(
        "pretrain", shards, accelerator, sampler, "--trainer.log_every_n_steps=2", steps=4, every=2, name="p"
    )
    short = [f"--segment_seconds={SHORT_SECONDS}", f"--video_fps={SHORT_FPS}", "--min_seconds=0.1", "--num_workers=0"]
    on = f"--device={device}"
    return {
        "fit": pretrain,
        "resume": [*pretrain, "--trainer.max_steps=6", "--ckpt_path=runs/p/version_0"],
        "validate": ["validate", "--config=runs/p/version_0/config.yaml", "--ckpt_path=runs/p/version_0"],
        "extract": ["extract", f"--media={media}", "--out=extracted", *short, "--silence_db=-100", on],
        "generate": [
            *("generate", "--checkpoint=runs/p/version_0", f"--video={media}", "--out=sounds", "--format=wav"),
            *("--precision=32-true", on),
        ],
        "evaluate": ["evaluate", f"--real={media}", "--generated=sounds", "--out=report.json", "--judges=tiny", on],
        "align": fit("align", shards, accelerator, "--model.init_from=runs/p", steps=2, every=2, name="a"),
        "retrieve": ["retrieve", "--checkpoint=runs/a", f"--data={shards / 'val'}", "--out=recall.json", on],
        "classify": fit(
            "classify", shards, accelerator, "--model.init_from=runs/a", "--model.mixup=0.5", steps=2, every=2, name="c"
        ),
        "classes": ["classify", "--checkpoint=runs/c", f"--media={media}", "--out=classes.csv", on],
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Folder and what became of each command, on the CPU and on pretended CUDA."""
    media = tmp_path_factory.mktemp("media")
    for number in range(3):
        video(media / f"{number}.mp4", SHORT_SECONDS, seed=number)
    ended = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path_factory.mktemp(device)
        named = commands(shards, media, device)
        ended[device] = folder, dict(zip(named, start(folder, device, named.values()), strict=True))
    return ended


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_commands_end_without_an_error(runs, device):
    _, ended = runs[device]
    assert {name: one["error"] for name, one in ended.items() if one["error"]} == {}


def test_the_device_was_used(runs):
    for device, (_, ended) in runs.items():
        assert [bool(one["waits"]) for one in ended.values()] == [device == "cuda"] * len(ended)


def test_a_gpu_may_use_tf32_outside_of_codecs_and_judges_and_a_cpu_may_not(runs):
    for device, (_, ended) in runs.items():
        assert {one["float32_products"] for one in ended.values()} == {"high" if device == "cuda" else "highest"}


@pytest.mark.parametrize("name", ["p", "a", "c"])
def test_weights_are_those_of_the_cpu(runs, name):
    here, there = (
        torch.load(find_checkpoint(folder / "runs" / name), weights_only=True) for folder, _ in runs.values()
    )
    assert here["global_step"] == there["global_step"] == {"p": 6, "a": 2, "c": 2}[name]
    for weights in ("state_dict", "live_state_dict"):  # the learning rates are about 1e-3
        torch.testing.assert_close(there[weights], here[weights], atol=2e-5, rtol=0)


def test_extracted_codes_are_those_of_the_cpu(runs):
    here, there = (ShardDataset(folder / "extracted").read(range(3)) for folder, _ in runs.values())
    assert torch.equal(here.codes, there.codes)
    torch.testing.assert_close(there.features, here.features, atol=2e-3, rtol=2e-3)  # stored in 16 bits


def test_generated_sounds_are_those_of_the_cpu(runs):
    for number in range(3):
        here, there = (soundfile.read(folder / "sounds" / f"{number}.wav")[0] for folder, _ in runs.values())
        assert np.abs(here).max() > 0.001
        np.testing.assert_allclose(there, here, atol=2e-3)


def test_metrics_are_those_of_the_cpu(runs):
    for report in ("report.json", "recall.json"):
        here, there = (numbers(json.loads((folder / report).read_text())) for folder, _ in runs.values())
        assert len(here) > 3
        assert there == pytest.approx(here, rel=1e-3, abs=1e-3), report


def test_probabilities_are_those_of_the_cpu(runs):
    here, there = ([*csv.DictReader((folder / "classes.csv").open())] for folder, _ in runs.values())
    assert len(here) == 3
    for row, other in zip(here, there, strict=True):
        assert float(other["probability_1"]) == pytest.approx(float(row["probability_1"]), abs=1e-3)


def numbers(report, name=""):
    """The numbers in a JSON document, by their path."""
    if isinstance(report, (dict, list)):
        parts = report.items() if isinstance(report, dict) else enumerate(report)
        return {key: value for part, one in parts for key, value in numbers(one, f"{name}/{part}").items()}
    return {name: report} if isinstance(report, (int, float)) and "seconds" not in name else {}


@pytest.fixture(scope="module")
def steps(shards, tmp_path_factory):
    """Waits of eight training steps of each task, of which the third and the sixth log; none validates."""
    folder = tmp_path_factory.mktemp("steps")
    flags = [
        "--trainer.precision=bf16-mixed",
        "--trainer.log_every_n_steps=3",
        "--trainer.callbacks+=pretend_runs.StepWaits",
    ]
    flags += ["--data.batch_size=4", "--data.num_workers=1"]
    tasks = {
        "pretrain": [],
        "align": ["--model.init_from=null"],
        "classify": ["--model.init_from=null", "--model.mixup=0.5"],
    }
    ended = start(
        folder, "cuda",
        [fit(task, shards, "gpu", *flags, *more, steps=8, every=100, name=task) for task, more in tasks.items()],
    )  # fmt: skip
    assert not any(one["error"] for one in ended), ended
    return {task: one["by_step"] for task, one in zip(tasks, ended, strict=True)}


@pytest.mark.parametrize("task", ["pretrain", "align", "classify"])
def test_a_step_that_does_not_log_never_waits(steps, task):
    assert steps[task][0]  # they are counted
    assert [steps[task][number] for number in (1, 3, 4, 6)] == [{}] * 4  # the first step makes what all later ones use


@pytest.mark.parametrize("task", ["pretrain", "align", "classify"])
def test_a_step_that_logs_waits_twice_at_most(steps, task):
    assert sum(steps[task][5].values()) <= 2, steps[task][5]  # the first that logs makes Lightning's metrics
