"""``vab shards import`` as a user starts it, and training on what it makes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vab.cli import main
from vab.data.reading.dataset import ShardDataset
from vab.tasks import load_task

RECIPE = str(Path(__file__).parents[2] / "configs" / "demo" / "pretrain.yaml")
FLAGS = ["--codec=tiny", "--vision=tiny", "--video_fps=12.5", "--segment_seconds=0.64", "--min_seconds=0.2"]


@pytest.fixture(scope="module")
def published(shards, tmp_path_factory):
    """The records of a data set as others would publish them: NAME.npy, a list of labels."""
    root = tmp_path_factory.mktemp("published")
    for part in ("train", "val"):
        data, rows = ShardDataset(shards / part), []
        for number in range(len(data)):
            batch, record = data.read([number]), data.record(number)
            for kind, array in (("codes", batch.codes[0].numpy().T), ("eva", batch.features.numpy())):
                (root / part / kind).mkdir(parents=True, exist_ok=True)
                np.save(root / part / kind / f"{record['id']}.npy", array)
            rows.append(f"{record['id']},{record['labels'][0]}\n")
        (root / f"{part}.csv").write_text("id,labels\n" + "".join(rows))
    return root


def start(*arguments):
    """Exit status of ``vab shards import``."""
    try:
        main(["shards", "import", *map(str, arguments), *FLAGS])
    except SystemExit as stop:
        return stop.code
    return 0


def flags(folder, out, *more):
    return f"--codes={folder / 'codes'}", f"--features={folder / 'eva'}", f"--out={out}", *more


def test_a_model_trains_on_imported_shards(published, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        folder = published / part
        assert start(*flags(folder, tmp_path / part, f"--labels={published / part}.csv")) == 0
        main(["shards", "verify", str(tmp_path / part)])
    main([
        "fit", "--config", RECIPE, f"--data.train={tmp_path / 'train'}", f"--data.val={tmp_path / 'val'}",
        "--data.batch_size=8", "--data.num_workers=0", "--model.backbone.dim=32", "--model.backbone.num_heads=2",
        "--model.backbone.num_modality_layers=1", "--model.backbone.num_joint_layers=1", "--model.warmup_steps=1",
        "--model.sampler.decode_steps=2", "--trainer.max_steps=2", "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu",
    ])  # fmt: skip
    (run,) = (tmp_path / "runs" / "demo_pretrain").glob("version_*")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert load_task(run).spec == ShardDataset(shards / "train").spec
    assert ShardDataset(tmp_path / "train").labels == ("high", "low")


def test_the_exit_status_says_whether_anything_was_left_out(published, tmp_path, capsys):
    folder = tmp_path / "arrays"
    for kind in ("codes", "eva"):
        (folder / kind).mkdir(parents=True)
        for name in ("tone1", "tone2"):
            (folder / kind / f"{name}.npy").symlink_to(published / "val" / kind / f"{name}.npy")
    assert start(*flags(folder, tmp_path / "all")) == 0
    (folder / "eva" / "tone2.npy").unlink()
    assert start(*flags(folder, tmp_path / "some"), "--strict=true") == 3
    printed = capsys.readouterr()
    assert "1 of 2 inputs left out:\n  1 no_features: tone2\n" in printed.out
    assert printed.err == ""
    assert start(*flags(folder, tmp_path / "none", "--target_video_fps=20")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --target_video_fps 20 is more than the 12.5 frames per second that there are")
    assert said.count("\n") == 1
    assert json.loads((tmp_path / "some" / "report.json").read_text())["reasons"] == {"no_features": 1}


def test_what_is_missing_is_said_by_name(tmp_path, capsys):
    assert start(f"--out={tmp_path / 'out'}") == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert start(f"--codes={tmp_path}", "--features=x", f"--out={tmp_path / 'out'}", "--codex=tiny") == 2
    assert "codex" in capsys.readouterr().err
