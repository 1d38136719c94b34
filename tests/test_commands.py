"""``vab generate`` and the shard commands on real files, with the tiny networks and an untrained model."""

import hashlib
import itertools
import json

import av
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from tone_shards import short_spec, write_shards
from vab.backbone import Backbone
from vab.cli import main
from vab.commands import Generator, generate, window_starts
from vab.data.media import probe, write_video
from vab.data.records import ShardDataset
from vab.spec import UserError
from vab.tasks import PretrainTask
from vab.tokens.decoding import Sampler

FAST = {"decode_steps": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, shards):
    """An untrained model, saved as Lightning saves it."""
    from lightning.pytorch import Trainer

    from vab.data.datamodule import ShardDataModule

    torch.manual_seed(0)
    data = ShardDataModule(train=str(shards / "train"), val=str(shards / "val"), batch_size=8, num_workers=0)
    backbone = Backbone(data.spec, dim=32, num_heads=2, num_modality_layers=1, num_joint_layers=1)
    task = PretrainTask(backbone, warmup_steps=1, schedule_steps=10, sampler=Sampler(decode_steps=2))
    quiet = dict.fromkeys(
        ["logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary", "use_distributed_sampler"],
        False,
    )
    trainer = Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, **quiet)
    trainer.fit(task, data)
    path = tmp_path_factory.mktemp("model") / "last.ckpt"
    trainer.save_checkpoint(path)
    return str(path)


def video(path, seconds, sound=True, fps=16):
    frames = np.random.default_rng(0).integers(0, 255, (round(seconds * fps), 48, 64, 3), dtype=np.uint8)
    waveform = 0.1 * np.sin(np.arange(round(seconds * 16_000)) / 5).astype(np.float32)
    write_video(path, frames, fps, waveform if sound else None, 16_000)
    return str(path)


def picture_hash(path):
    """Of the video packets as they lie in the file."""
    digest = hashlib.sha256()
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.video[0]):
            digest.update(bytes(packet))
    return digest.hexdigest()


@given(total=st.integers(1, 900), window=st.integers(2, 200), data=st.data())
def test_windows_cover_everything_and_overlap(total, window, data):
    overlap = data.draw(st.integers(0, window - 1))
    starts = window_starts(total, window, overlap)
    assert starts[0] == 0
    assert max(starts) == max(0, total - window)
    for before, after in itertools.pairwise(starts):
        assert before < after
        assert before + window - after >= overlap
    assert starts[-1] + window >= total


def test_an_overlap_of_a_whole_window_is_refused():
    with pytest.raises(UserError, match="overlap"):
        window_starts(100, 20, 20)


@pytest.mark.parametrize("seconds", [0.3, 0.64, 2.5])
def test_a_wav_is_as_long_as_the_picture(checkpoint, tmp_path, seconds):
    source = video(tmp_path / "in.mp4", seconds)
    generate(checkpoint, source, str(tmp_path / "out.wav"), **FAST)
    waveform, rate = soundfile.read(tmp_path / "out.wav")
    assert rate == 16_000
    assert len(waveform) == round(probe(source).video_seconds * rate)
    assert np.abs(waveform).max() > 0


def test_an_mp4_keeps_the_picture_packet_for_packet(checkpoint, tmp_path):
    source = video(tmp_path / "in.mp4", 2.0, sound=False)
    generate(checkpoint, source, str(tmp_path / "out.mp4"), **FAST)
    assert picture_hash(tmp_path / "out.mp4") == picture_hash(source)
    made = probe(tmp_path / "out.mp4")
    assert made.has_audio
    assert made.audio_seconds == pytest.approx(made.video_seconds, abs=0.08)
    note = json.loads((tmp_path / "out.mp4.json").read_text())
    assert (note["decode_steps"], note["guidance_scale"], note["seed"]) == (2, 2.0, 0)


def test_the_same_seed_gives_the_same_sound(checkpoint, tmp_path):
    source = video(tmp_path / "in.mp4", 0.64)
    generator = Generator.load(checkpoint)
    sampler = Sampler(decode_steps=2)
    first, again, other = (generator.sound_for(source, sampler, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_folder_goes_into_a_folder(checkpoint, tmp_path, capsys):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    video(tmp_path / "in" / "a.mp4", 0.3)
    video(tmp_path / "in" / "sub" / "b.mp4", 0.3)
    main(["generate", f"--checkpoint={checkpoint}", f"--video={tmp_path / 'in'}", f"--out={tmp_path / 'out'}",
          "--format=wav", "--decode_steps=1"])  # fmt: skip
    made = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.wav"))
    assert made == ["a.wav", "sub/b.wav"]
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_no_video_is_ever_written_over(checkpoint, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    source = video(folder / "a.mp4", 0.3)
    before = picture_hash(source), probe(source).audio_seconds
    with pytest.raises(UserError, match="would be lost"):
        generate(checkpoint, str(folder), str(folder), **FAST)
    with pytest.raises(UserError, match="would be lost"):
        generate(checkpoint, source, source, **FAST)
    table = tmp_path / "list.csv"
    table.write_text(f"file\n{source}\n")
    generate(checkpoint, str(table), str(tmp_path / "out"), format="wav", **FAST)
    assert (picture_hash(source), probe(source).audio_seconds) == before
    (made,) = (tmp_path / "out").rglob("*.wav")
    assert made.is_relative_to(tmp_path / "out")


def test_one_bad_file_of_many_is_named_and_the_rest_is_made(checkpoint, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    video(folder / "good.mp4", 0.3)
    (folder / "bad.mp4").write_text("not a video")
    with pytest.raises(UserError, match=r"1 of 2 videos gave no sound:\n.*bad\.mp4"):
        generate(checkpoint, str(folder), str(tmp_path / "out"), format="wav", **FAST)
    assert (tmp_path / "out" / "good.wav").is_file()


def test_a_device_that_is_not_there_is_named(checkpoint, tmp_path):
    source = video(tmp_path / "in.mp4", 0.3)
    for device in ("abacus", "cuda:7"):
        with pytest.raises(UserError, match=device):
            generate(checkpoint, source, str(tmp_path / "out.wav"), device=device)


@pytest.mark.parametrize(
    ("target", "words"),
    [("out.txt", "must end in .wav, .mp4 or .mkv"), ("out", "must end in .wav, .mp4 or .mkv")],
)
def test_an_output_of_another_kind_is_refused_before_anything_is_loaded(checkpoint, tmp_path, target, words):
    source = video(tmp_path / "in.mp4", 0.3)
    with pytest.raises(UserError, match=words):
        generate(checkpoint, source, str(tmp_path / target))
    assert not (tmp_path / target).exists()


def test_what_is_no_video_is_named(checkpoint, tmp_path):
    text = tmp_path / "words.mp4"
    text.write_text("no video at all")
    with pytest.raises(UserError, match=r"words\.mp4"):
        generate(checkpoint, str(text), str(tmp_path / "out.wav"))
    with pytest.raises(UserError, match=r"no video at .*missing\.mp4"):
        generate(checkpoint, str(tmp_path / "missing.mp4"), str(tmp_path / "out.wav"))
    soundfile.write(tmp_path / "sound.wav", np.zeros(16_000), 16_000)
    with pytest.raises(UserError, match=r"sound\.wav"):
        generate(checkpoint, str(tmp_path / "sound.wav"), str(tmp_path / "out.wav"))
    assert not (tmp_path / "out.wav").exists()


def test_another_codec_than_the_checkpoints_is_refused(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["backbone"]["init_args"]["spec"]["codec_hash"] = "0" * 64
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="codec tiny of weights 000000000000"):
        Generator.load(tmp_path / "other.ckpt")


def test_shards_are_verified_shown_and_their_damage_is_named(tmp_path, capsys):
    folder = write_shards(tmp_path / "set", short_spec(), 6)
    main(["shards", "verify", str(folder)])
    assert "6 records" in capsys.readouterr().out
    main(["shards", "info", str(folder)])
    assert json.loads(capsys.readouterr().out)
    tar = next(folder.glob("*.tar"))
    content = bytearray(tar.read_bytes())
    row = ShardDataset(folder).index_row(3)
    content[row["codes_offset"] + 5] ^= 1
    tar.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["shards", "verify", str(folder)])
    assert stop.value.code == 2
    assert tar.name in capsys.readouterr().err
