"""The command line as a user meets it: recipes, overrides, and mistakes."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tone_shards import short_spec, write_shards
from vab.cli import COMMANDS, RENAMED, main
from vab.flags import parse
from vab.spec import UserError
from vab.tasks import PretrainTask, load_task

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPE = str(CONFIGS / "demo" / "pretrain.yaml")


@pytest.fixture
def fit(shards, tmp_path, monkeypatch):
    """Run ``vab fit`` on the short shards in a folder of its own; gives the run's folder."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, command="fit", recipe=RECIPE):
        main([command, "--config", recipe, *small(shards), *flags])
        versions = sorted((tmp_path / "runs" / "demo_pretrain").glob("version_*"))
        return versions[-1]

    return run


def small(shards):
    """Flags that make a recipe a matter of a second."""
    return [
        f"--data.train={shards / 'train'}",
        f"--data.val={shards / 'val'}",
        "--data.batch_size=8",
        "--data.num_workers=0",
        "--model.backbone.dim=32",
        "--model.backbone.num_heads=2",
        "--model.backbone.num_modality_layers=1",
        "--model.backbone.num_joint_layers=1",
        "--model.warmup_steps=2",
        "--model.sampler.decode_steps=2",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=2",
        "--trainer.accelerator=cpu",
    ]


def complaint(capsys, *argv):
    """What the command line says when it refuses ``argv``, which it must do with status 2."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.strip()


def test_fit_writes_a_checkpoint_that_reloads_as_its_own_class(fit, shards):
    run = fit()
    task = load_task(run)
    assert isinstance(task, PretrainTask)
    assert task.spec.num_codebooks == 4
    assert task.spec.num_steps == 32
    assert (run / "config.yaml").is_file()
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 4


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_on_ckpt_path_promises_only_what_is_taken(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.partition("--ckpt_path CKPT_PATH\n")[2].partition(" --")[0].split())
    assert text.startswith("A checkpoint, or a run's folder, which stands for its last.ckpt. fit resumes that run")
    assert not any(word in text for word in ("registry", "best", '"last"', "hpc"))


def test_flags_reach_the_part_they_name(fit):
    run = fit("--model.optimizer.lr=3e-4", "--model.feature_dropout=0.25", "--trainer.gradient_clip_val=0.5")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["class_path"] == "vab.tasks.PretrainTask"
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 3e-4
    assert config["model"]["init_args"]["feature_dropout"] == 0.25
    assert config["trainer"]["gradient_clip_val"] == 0.5
    assert config["trainer"]["log_every_n_steps"] == 2
    assert config["trainer"]["use_distributed_sampler"] is False


def test_validation_comes_after_so_many_steps_however_many_batches_a_step_has(fit, capsys):
    fit("--trainer.accumulate_grad_batches=2")
    said = capsys.readouterr()
    assert re.findall(r"step (\d+):", said.out + said.err) == ["2", "4"]


def test_a_part_is_swapped_whole(fit):
    run = fit(f"--model.backbone={CONFIGS / 'backbone' / 'paper.yaml'}", "--model.backbone.dim=16",
              "--model.backbone.num_heads=2", "--model.backbone.num_modality_layers=1",
              "--model.backbone.num_joint_layers=1")  # fmt: skip
    backbone = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["backbone"]["init_args"]
    assert (backbone["positions"], backbone["dim"], backbone["dropout"]) == ("alibi", 16, 0.1)


def test_a_second_config_merges_and_may_append_callbacks(fit, tmp_path):
    tweak = tmp_path / "tweak.yaml"
    tweak.write_text(
        "trainer:\n"
        "  max_steps: 3\n"
        "  callbacks+:\n"
        "    - class_path: lightning.pytorch.callbacks.LearningRateMonitor\n"
        f"model:\n  init_args:\n    backbone: {CONFIGS / 'backbone' / 'small.yaml'}\n"
    )
    run = fit("--config", str(tweak), "--model.backbone.dim=24", "--model.backbone.num_joint_layers=1",
              "--model.backbone.num_modality_layers=1")  # fmt: skip
    config = yaml.safe_load((run / "config.yaml").read_text())
    names = [callback["class_path"].rsplit(".", 1)[-1] for callback in config["trainer"]["callbacks"]]
    assert names[-1] == "LearningRateMonitor"
    assert names[:2] == ["EMA", "MediaLog"]
    assert config["trainer"]["max_steps"] == 3
    assert config["model"]["class_path"] == "vab.tasks.PretrainTask"
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 2.0e-3  # not torch's default


def test_the_saved_config_replays_and_validates(fit, capsys):
    run = fit()
    config, checkpoint = str(run / "config.yaml"), str(run)
    main(["validate", "--config", config, "--ckpt_path", checkpoint])
    first = capsys.readouterr().out
    assert "val/loss" in first
    main(["test", "--config", config, "--ckpt_path", checkpoint, "--data.test", str(_val(config))])
    assert "test/loss" in capsys.readouterr().out
    main(["predict", "--config", config, "--ckpt_path", checkpoint, "--data.test", str(_val(config)), "--out", "made"])
    codes = np.load("made/codes_rank_0.npz")
    assert codes["index"].tolist() == list(range(20))
    assert codes["codes"].shape == (20, 4, 32)


def _val(config):
    return yaml.safe_load(Path(config).read_text())["data"]["val"]


def test_resume_goes_on_where_the_run_stopped(fit):
    first = fit()
    shorter = torch.load(first / "checkpoints" / "last.ckpt", weights_only=True)["live_state_dict"]
    second = fit("--trainer.max_steps=6", "--model.schedule_steps=6", f"--ckpt_path={first}")
    content = torch.load(second / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 6
    schedule = content["lr_schedulers"][0]
    assert schedule["last_epoch"] == 6
    events = EventAccumulator(str(second))
    events.Reload()
    rates = [event.value for event in events.Scalars("meters/learning_rate")]
    assert rates[-1] == pytest.approx(0.0)  # the fall ends where the longer run ends,
    name = "backbone.audio_input.weight"
    assert not torch.equal(shorter[name], content["live_state_dict"][name])  # not where the shorter one would have


def test_a_longer_run_does_not_raise_a_learning_rate_that_has_fallen_unless_it_is_told_to(fit, shards, capsys):
    first = fit()
    longer = ["fit", "--config", RECIPE, *small(shards), "--trainer.max_steps=6", f"--ckpt_path={first}"]
    text = complaint(capsys, *longer).splitlines()[-1]
    assert (
        "has fallen to its end, 0 of its top; a longer run would raise it to 0.5: type --model.schedule_steps 6" in text
    )
    second = fit("--trainer.max_steps=6", "--model.schedule_steps=6", f"--ckpt_path={first}")
    content = torch.load(second / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["lr_schedulers"][0]["_last_lr"] == [0.0, 0.0]


def test_a_schedule_that_changes_on_the_way_is_told(fit, caplog):
    first = fit("--model.schedule_steps=6")
    second = fit("--trainer.max_steps=5", "--model.schedule_steps=6", f"--ckpt_path={first}")
    assert "learning rate continues" not in caplog.text
    fit("--trainer.max_steps=6", "--model.schedule_steps=7", f"--ckpt_path={second}")
    words = (
        "the learning rate continues at 0.4 of its top, not at the checkpoint's 0.25: the schedule now ends at step 7"
    )
    assert words in caplog.text


@pytest.mark.parametrize("recipe", ["pretrain", "align", "classify"])
def test_a_recipe_passes_fast_dev_run_with_its_own_warm_up(recipe, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [flag for flag in small(shards) if "warmup" not in flag and (recipe == "pretrain" or "sampler" not in flag)]
    kept = [flag for flag in flags if recipe == "pretrain" or "joint" not in flag]
    more = [] if recipe == "pretrain" else ["--model.init_from=null"]
    main(["fit", "--config", str(CONFIGS / "demo" / f"{recipe}.yaml"), *kept, *more, "--trainer.fast_dev_run=true"])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_last_step_is_saved_also_where_no_validation_falls_on_it(fit):
    run = fit("--trainer.max_steps=5")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5


def test_mixed_precision_trains_with_the_recipes_optimizer(fit):
    run = fit("--trainer.precision=bf16-mixed")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_checkpoint_of_other_features_is_refused(fit, shards, tmp_path, capsys):
    run = fit()
    spec = dataclasses.replace(short_spec(), vision_hash="0" * 64)
    other = write_shards(tmp_path / "other", spec, 12)
    capsys.readouterr()
    text = complaint(capsys, "validate", "--config", str(run / "config.yaml"), f"--ckpt_path={run}",
                     f"--data.train={other}", f"--data.val={other}")  # fmt: skip
    assert text.startswith("error: checkpoint and shards do not fit (checkpoint != shards): vision_hash: ")
    assert text.count("vision_hash") == 1


def test_scoring_needs_a_checkpoint(shards, capsys):
    text = complaint(capsys, "validate", "--config", RECIPE, *small(shards))
    assert text == "error: validate needs a trained model: --ckpt_path FILE, or a run's folder"


def test_what_lightning_refuses_is_one_line(shards, capsys):
    text = complaint(capsys, "fit", "--config", RECIPE, *small(shards), "--trainer.accelerator=abacus")
    assert "abacus" in text
    assert len(text.splitlines()) == 1


def test_the_progress_line_can_be_switched_off(fit, capsys):
    run = fit("--trainer.enable_progress_bar=false")
    assert "step 2:" not in capsys.readouterr().err
    assert (run / "checkpoints" / "last.ckpt").is_file()


def test_a_wrong_key_in_a_yaml_names_the_nearest(fit, shards, tmp_path, capsys):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("trainer:\n  max_stepz: 3\n")
    text = complaint(capsys, "fit", "--config", RECIPE, "--config", str(wrong), *small(shards))
    assert "max_stepz" in text
    assert "max_steps" in text
    assert len(text.splitlines()) <= 2


def test_a_wrong_flag_names_the_nearest(shards, capsys):
    text = complaint(capsys, "fit", "--config", RECIPE, *small(shards), "--trainer.max_stepz=3")
    assert "max_stepz" in text
    assert "max_steps" in text
    assert len(text.splitlines()) <= 2


def test_a_wrong_key_of_the_model_is_refused(shards, tmp_path, capsys):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model:\n  init_args:\n    feature_dropuot: 0.2\n")
    text = complaint(capsys, "fit", "--config", RECIPE, "--config", str(wrong), *small(shards))
    assert "feature_dropuot" in text
    assert len(text.splitlines()) <= 2


def test_missing_files_are_named(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "nowhere.yaml" in complaint(capsys, "fit", "--config", "nowhere.yaml")
    text = complaint(capsys, "fit", "--config", RECIPE, *small(shards), "--ckpt_path=nowhere.ckpt")
    assert text == "error: no checkpoint at nowhere.ckpt: give a .ckpt file or a run's folder, such as runs/pretrain"
    text = complaint(capsys, "fit", "--config", RECIPE, *small(shards), "--data.train=nowhere")
    assert "nowhere" in text
    assert "vab extract" in text


def test_a_text_file_is_no_checkpoint(tmp_path, capsys):
    fake = tmp_path / "fake.ckpt"
    fake.write_text("not a checkpoint")
    text = complaint(capsys, "generate", "--checkpoint", str(fake), "--video", str(fake), "--out", "x.wav")
    assert text.startswith(f"error: {fake} is not a checkpoint of this version of vab")
    assert len(text.splitlines()) == 1


def test_an_unknown_command_names_the_nearest(capsys):
    text = complaint(capsys, "generated")
    assert text == "error: no command 'generated'; did you mean 'generate'?; vab --help lists them"


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_what_was_renamed_names_its_new_name(old, new, capsys):
    if old.startswith("-"):
        for typed in (["retrieve", f"{old}=x"], ["listen", old, "x"]):
            assert complaint(capsys, *typed) == f"error: {old} is now {new}"
    else:
        assert complaint(capsys, *old.split(), "--help") == f"error: vab {old} is now {new}"
        assert new.startswith("python -m") or new.split()[1] in COMMANDS


def test_a_value_may_be_called_as_a_former_command(capsys):
    assert complaint(capsys, "compare", "recall", "lists").startswith("error: recall cannot be read")
    assert complaint(capsys, "doctor", "--out", "lists") == "error: --out must end in .json, got lists"


def _grammar(first: str, names: list[str] | None = None, either: str | list[str] = "x", switch: bool = False) -> None:
    """Flags of every kind.

    Args:
        first: A value.
        names: A list.
        either: A value or a list.
        switch: A switch.
    """


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("a", {"first": "a"}),
        ("--first a --switch", {"first": "a", "switch": True}),
        ("a --switch true --either b", {"first": "a", "switch": True, "either": ["b"]}),
        ("a --switch=false", {"first": "a"}),
        ("a --names b c --either b,c", {"first": "a", "names": ["b", "c"], "either": ["b,c"]}),
        ("a --switch --names=[b,c]", {"first": "a", "names": ["b", "c"], "switch": True}),
        ("--either d e --first a --names [b]", {"first": "a", "names": ["b"], "either": ["d", "e"]}),
        ("a --names+ b --names+ c", {"first": "a", "names": ["b", "c"]}),
    ],
)
def test_all_commands_have_one_grammar(typed, expected):
    assert parse(_grammar, "vab x", typed.split()) == {"names": None, "either": "x", "switch": False} | expected


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("a b", "unrecognized arguments: b"),
        ("a --names", "expected one argument"),
        ("a --names=", "--names is empty"),
        ("a --switch perhaps", "switch"),
        ("--switch", "required: --first"),
    ],
)
def test_what_the_grammar_refuses(typed, words):
    with pytest.raises(UserError, match=words):
        parse(_grammar, "vab x", typed.split())


def test_what_is_missing_is_named_as_it_is_typed(capsys):
    for command, names in (
        (["extract", "--media", "x"], "--out"),
        (["generate", "--video", "x"], "--checkpoint, --out"),
        (["compare"], "--reports"),
        (["shards", "verify"], "--folder"),
        (["fit"], "--data.train, --data.val, --model"),
    ):
        assert complaint(capsys, *command) == f"error: the following arguments are required: {names}"


@pytest.mark.parametrize(
    "command",
    [
        "extract --media x --out",
        "extract --out x --media",
        "shards import --codes x --codec tiny --vision tiny --video_fps 4 --out",
        "export --checkpoint x --out",
        "generate --checkpoint x --video y --out",
        "classify --checkpoint x --media y --out",
        "datasets vggsound --list x --media y --out",
        "weights fetch --names=[dac_16khz] --out",
        "demo world --out",
    ],
)
def test_a_path_that_is_empty_is_not_the_folder_one_is_in(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    *given, flag = command.split()
    words = f"error: {flag} is empty: give it a value (is it a variable of the shell that is not set?)"
    assert complaint(capsys, *given, flag, "") == words
    assert complaint(capsys, *given, f"{flag}=") == words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["-inf", "nan"])
def test_a_number_that_is_none_is_told(value, capsys):
    text = complaint(capsys, "extract", "--media=x", "--out=y", f"--silence_db={value}")
    assert text == f"error: --silence_db must be a finite number, got {value}"


def test_help_is_quick_and_lists_every_command():
    code = "import sys, vab.cli; vab.cli.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("fit", "extract", "shards", "generate"):
        assert command in done.stdout


HEAVY = ("torch", "lightning", "numpy", "scipy", "av", "matplotlib", "transformers", "omegaconf", "fsspec")


def heavy_imports(script):
    """The packages of `HEAVY` that a script of another process has imported, as it notes them in ``found``."""
    begin = f"import json, sys\nfrom vab.cli import COMMANDS, main\nHEAVY = {HEAVY}\nfound = {{}}\n"
    code = f"{begin}{script}\nprint(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_help_of_no_command_imports_anything_heavy():
    groups = [(name, place if isinstance(place, dict) else [""]) for name, (_, place) in COMMANDS.items()]
    typed = ["", "folds", "plan", *(f"{name} {part}".strip() for name, parts in groups for part in parts)]
    script = f"""
for command in {typed}:
    try:
        main([*command.split(), "--help"])
    except SystemExit:
        pass
    found[command] = [name for name in HEAVY if name in sys.modules]
"""
    assert {command: names for command, names in heavy_imports(script).items() if names} == {}


@pytest.mark.parametrize(
    ("command", "expected"),
    [("weights list", []), ("doctor", []), ("datasets msrvtt --list list.csv --media media --out out.csv", ["numpy"])],
)
def test_commands_that_need_no_torch_import_none(command, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "video0.mp4").touch()
    (tmp_path / "list.csv").write_text("video_id\nvideo0\n")
    script = f"""
from vab.commands import doctor
doctor.TRIED = {{"soxr": doctor.TRIED["soxr"]}}  # the others are imported by another process, too, and take longer
main({command.split()})
found = [name for name in HEAVY if name in sys.modules]
"""
    assert heavy_imports(script) == expected


@pytest.mark.parametrize("way", ["line", "file"])
def test_a_mixture_is_folders_and_weights(way, fit, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VAB_HERE", str(shards))
    if way == "line":
        mixture = [f"--data.train={{{shards / 'train'}: 3, {shards / 'val'}: 1}}"]
    else:
        # As names, not as values, which YAML readers take from the environment.
        text = "data:\n  train:\n    ${oc.env:VAB_HERE}/train: 3\n    ${oc.env:VAB_HERE}/val: 1\n"
        (tmp_path / "mixture.yaml").write_text(text)
        mixture = ["--config=mixture.yaml"]
    run = fit(*mixture, "--data.records_per_epoch=40")
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["ShardDataModule"]
    assert (state["records_per_epoch"], state["records_consumed"]) == ([30, 10], 32)
    # The run's own config gives the same mixture again, its data sets in the same order.
    main(["fit", "--config", str(run / "config.yaml"), f"--ckpt_path={run}", "--trainer.max_steps=5",
          "--model.schedule_steps=5"])  # fmt: skip
    capsys.readouterr()
    wrong = [f"--data.train={{{shards / 'train'}: 3, nowhere: 1}}"]
    assert complaint(capsys, "fit", "--config", RECIPE, *small(shards), *wrong).startswith("error: no folder nowhere")
