"""What ``vab fit`` and ``vab validate`` are given and cannot use: one line that says so, and exit status 2."""

import json

import pytest
import torch

from fit_runs import RECIPE, flags
from vab.cli import main
from vab.errors import cause_of
from vab.spec import UserError

KEEP = [{"class_path": "vab.callbacks.Checkpoints", "init_args": {"save_last": True, "save_top_k": 0}}]
ALIGN = f"--config={RECIPE.with_name('align.yaml')}"


def quick(shards, command="fit"):
    """Flags of a run of two steps that does nothing but train."""
    given = flags(shards, "run", steps=2, every=2)
    return [command, *given[1:], "--trainer.limit_val_batches=1", f"--trainer.callbacks={json.dumps(KEEP)}"]


def aligning(arguments):
    """The same for the other task."""
    kept = [word for word in arguments if "sampler" not in word and not word.startswith("--config")]
    return [kept[0], ALIGN, *kept[1:], "--model.init_from=null"]


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """The last checkpoint of a run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    main([*quick(shards), f"--trainer.logger.init_args.save_dir={folder}"])
    (path,) = folder.rglob("last.ckpt")
    return path


@pytest.fixture
def refusal(shards, tmp_path, monkeypatch, capsys):
    """What is said of flags that must be refused: one line."""
    monkeypatch.chdir(tmp_path)

    def said(*given, command="fit", change=lambda arguments: arguments):
        with pytest.raises(SystemExit) as stop:
            main([*change(quick(shards, command)), *map(str, given)])
        assert stop.value.code == 2
        text = capsys.readouterr().err
        assert "Traceback" not in text
        lines = [line for line in text.splitlines() if "error" in line.lower()]
        assert len(lines) == 1, text
        assert text.strip().splitlines()[-1] == lines[0]
        return lines[0].removeprefix("error: ")

    return said


def callback(name, **arguments):
    return f"--trainer.callbacks={json.dumps([{'class_path': f'vab.callbacks.{name}', 'init_args': arguments}])}"


REFUSED = {
    "network": (["--model.backbone.dim=33"], "backbone: dim must be a multiple of 2 x num_heads, got dim 33"),
    "task": (["--model.conditioning_levels=9"], "conditioning_levels must be at least 0"),
    "masking": (["--model.masking.ratio=0"], "masking: ratio must be above 0 and at most 1, got 0.0"),
    "average": ([callback("EMA", decay=1.5)], "EMA decay must be in [0, 1), got 1.5"),
    "one": (["--trainer.callbacks", json.dumps({"class_path": "vab.callbacks.EMA", "init_args": {"decay": 1.5}})],
            "EMA decay must be in [0, 1), got 1.5"),
    "checkpoints": ([callback("Checkpoints", keep_last=0)], "keep_last must be 1 or more"),
    "lightning's": ([callback("Checkpoints", monitor="val/loss", mode="up")], "`mode` can be min, max but got up"),
    "rate": (["--model.optimizer.lr=-1"], "--model.optimizer cannot be made: Invalid learning rate: -1"),
    "betas": (["--model.optimizer.betas=[0.9,1.5]"], "Invalid beta parameter at index 1: 1.5"),
    "foreach": (["--model.optimizer.foreach=true"], "`fused` and `foreach` cannot be `True` together"),
    "smoothing": (["--model.label_smoothing=1"], "label_smoothing in [0, 1), got 0.1 and 1.0"),
    "dropout": (["--model.feature_dropout=1.5"], "feature_dropout must be in [0, 1]"),
    "warmup": (["--model.warmup_steps=-1"], "warmup_steps must be a number of steps or a share"),
    "final": (["--model.final_lr_ratio=1.5"], "final_lr_ratio in [0, 1], got 2 and 1.5"),
    "clipping": (["--trainer.gradient_clip_val=-1"], "gradient_clip_val must be 0 (no clipping) or more, got -1"),
    "accumulating": (["--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches must be 1 or more, got 0"),
    "validating": (["--trainer.val_check_interval=100", "--trainer.check_val_every_n_epoch=1"],
                   "`val_check_interval` (100) must be less than or equal to the number of the training batches (12)"),
    "never validating": (["--trainer.val_check_interval=0"], "val_check_interval must be above 0, got 0"),
    "monitor": ([callback("Checkpoints", monitor="val/los", save_top_k=1, save_last=True)],
                "Checkpoints cannot monitor val/los: the run has train/loss, val/accuracy, val/loss"),
    "number": (["--model.optimizer.lr=abc"], "model.optimizer.lr: Expected a float, got abc"),
    "word": (["--trainer.precision=fp8"], "trainer.precision: Expected a int; or Expected one of "),
    "class": (["--trainer.callbacks+=vab.callbacks.EMMA"], "trainer.callbacks: Problem with given class_path "
              "'vab.callbacks.EMMA': module 'vab.callbacks' has no attribute 'EMMA'"),
    "file": (["--model.backbone=nosuch.yaml"], "model.backbone: Problem with given class_path 'nosuch.yaml': No"),
    "short flag": (["--trainer.max_step=3"], "--trainer.max_step=3; did you mean 'trainer.max_steps'?"),
    "compiling": (["--model.compile=foo"], "torch has no backend 'foo'; true, or one of cudagraphs, inductor"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_value_that_nothing_can_take_is_named(what, refusal):
    given, words = REFUSED[what]
    assert words in refusal(*given)


def test_a_figure_that_there_is_not_is_refused_before_training(refusal, capsys):
    keep = callback("Checkpoints", monitor="val/los", save_top_k=1, save_last=True)
    said = refusal(keep, "--trainer.num_sanity_val_steps=1")
    assert said.startswith("Checkpoints cannot monitor val/los: the run has val/accuracy, val/loss")


def test_a_figure_that_the_sanity_check_cannot_have_is_no_mistake(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keep = callback("Checkpoints", monitor="val/codes/loss_hidden_20_30", save_top_k=0, save_last=True)
    # Validation by the clock, too: a text where others give a number.
    clock = "--trainer.val_check_interval=00:01:00:00"
    main([*quick(shards), keep, "--trainer.num_sanity_val_steps=1", clock])
    assert list(tmp_path.rglob("last.ckpt"))


def test_what_a_run_has_learned_is_saved_before_a_missing_figure_ends_it(refusal, tmp_path):
    keep = {
        "class_path": "vab.callbacks.Checkpoints",
        "init_args": {"monitor": "val/los", "save_top_k": 1, "save_last": True},
    }
    refusal(f"--trainer.callbacks={json.dumps([keep])}", "--trainer.num_sanity_val_steps=0")
    (path,) = tmp_path.rglob("last.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 2


def test_a_folder_for_runs_that_is_a_file_is_refused(refusal, tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    said = refusal(f"--trainer.logger.init_args.save_dir={place}")
    assert said.startswith(f"cannot write or read {place}/")


def test_a_config_that_is_no_text_is_refused(refusal, trained):
    assert "is something else ('utf-8' codec" in refusal(f"--config={trained}")


def test_ranks_that_would_each_train_alone_are_refused(refusal, monkeypatch):
    place = {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "GROUP_RANK": 0,
        "LOCAL_WORLD_SIZE": 2,
        "WORLD_SIZE": 2,
        "TORCHELASTIC_RUN_ID": 1,
    }
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    assert refusal("--trainer.devices=1", "--trainer.strategy=auto").startswith(
        "torchrun has started 2 processes, but the trainer is set to 1: "
    )


@pytest.mark.parametrize("word", ["best", "last", "hpc", "registry"])
def test_words_of_lightning_for_a_run_of_the_same_process_are_no_checkpoint(word, refusal):
    said = refusal(f"--ckpt_path={word}")
    assert said == f"no checkpoint at {word}: give a .ckpt file or a run's folder, such as runs/pretrain"


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("foreign", "it has no 'pytorch-lightning_version'"),
        ("other program's", "it has no '_class_path'"),
        ("list", "list indices must be integers"),
        ("half", "PytorchStreamReader failed"),
        ("empty", "EOFError"),
        ("text", "KeyError"),
    ],
)
def test_a_file_that_is_no_checkpoint_of_ours_is_refused(what, words, command, trained, refusal, tmp_path):
    file = tmp_path / "file.ckpt"
    if what == "foreign":
        torch.save({"model": {"weight": torch.ones(2)}}, file)
    elif what == "other program's":
        torch.save(torch.load(trained, weights_only=True) | {"hyper_parameters": {"width": 2}}, file)
    elif what == "list":
        torch.save([1, 2], file)
    else:
        whole = trained.read_bytes()
        file.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"hello, there\n"}[what])
    said = refusal(f"--ckpt_path={file}", command=command)
    assert said.startswith(f"{file} is not a checkpoint of this version of vab: {words}")
    assert said.endswith("; give another .ckpt file, or a run's folder")


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_of_another_network_or_task_is_refused(command, trained, refusal):
    resume = f"--ckpt_path={trained}"
    same = "give the same --model.backbone"
    for size, values in {"dim": "32 != 64", "num_modality_layers": "1 != 2", "num_joint_layers": "1 != 2"}.items():
        said = refusal(resume, f"--model.backbone.{size}={values[-2:].strip()}", command=command)
        assert said == (
            f"checkpoint {trained} has another backbone (its value != this one's: {size}: {values}): {same}"
        )
    said = refusal(resume, command=command, change=aligning)
    remedy = f"another, or begin with its weights: --model.init_from {trained}"
    assert said == (
        f"checkpoint {trained} is of the task PretrainTask, this one is AlignTask: give "
        + (remedy if command == "fit" else "its own --config")
    )


def test_weights_of_another_shape_are_named(shards, refusal, tmp_path):
    main([*aligning(quick(shards)), "--model.embedding_dim=8", f"--trainer.logger.init_args.save_dir={tmp_path}"])
    (path,) = tmp_path.rglob("last.ckpt")
    said = refusal(f"--ckpt_path={path}", "--model.embedding_dim=9", change=aligning)
    assert said.startswith(
        f"the weights of checkpoint {path} do not fit this model (audio_projection.bias: (8,) != (9,); "
        "audio_projection.weight: (8, 32) != (9, 32); video_projection.bias: (8,) != (9,); and 1 more): "
    )


def test_a_run_does_not_go_on_with_another_optimizers_state_or_none(shards, trained, refusal, tmp_path, capsys):
    other = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"]
    said = refusal(f"--ckpt_path={trained}", *other)
    assert "the optimizer torch.optim.adamw.AdamW, this run's is torch.optim.sgd.SGD: give the same" in said
    content = torch.load(trained, weights_only=True)
    del content["optimizer_states"]
    torch.save(content, tmp_path / "weights.ckpt")
    assert "holds weights alone" in refusal("--ckpt_path=weights.ckpt")
    # To be scored it needs neither.
    main([*quick(shards, "validate"), "--ckpt_path=weights.ckpt", *other])
    assert "val/loss" in capsys.readouterr().out


def test_a_run_that_saves_nothing(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([*quick(shards), "--trainer.callbacks=[]", "--trainer.enable_checkpointing=false"])
    assert not list(tmp_path.rglob("*.ckpt"))
    assert list(tmp_path.rglob("config.yaml"))


def test_the_cause_is_found_however_deep_it_lies():
    told = UserError("this")
    middle, outer = ValueError(), ValueError()
    middle.__cause__, outer.__context__ = told, middle
    assert cause_of(outer, UserError) is told
    assert cause_of(outer, KeyError) is None
