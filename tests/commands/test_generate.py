"""``vab generate`` and the shard commands on real files, with the tiny networks and an untrained model."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from small_media import picture_hash, tone, video
from tone_shards import short_spec, write_shards
from vab.cli import main
from vab.commands.generate import generate
from vab.data.media.segments import scan_packets
from vab.data.media.write import write_wav
from vab.data.reading.dataset import ShardDataset
from vab.generation.generator import Generator
from vab.generation.request import Request
from vab.spec import UserError

FAST = {"sampler": {"decode_steps": 2, "guidance_scale": 2.0}}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return video(tmp_path_factory.mktemp("clip") / "clip.mp4", 0.9)


@pytest.fixture
def vab(checkpoint, capsys):
    """``vab generate`` as typed: its exit status and what it said."""

    def run(*arguments, model=checkpoint):
        status = 0
        try:
            main(["generate", f"--checkpoint={model}", *map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("seconds", [0.3, 0.64, 2.5])
def test_a_wav_is_as_long_as_the_picture(checkpoint, tmp_path, seconds):
    source = video(tmp_path / "in.mp4", seconds)
    generate(checkpoint, source, str(tmp_path / "out.wav"), **FAST)
    waveform, rate = soundfile.read(tmp_path / "out.wav")
    assert rate == 16_000
    assert len(waveform) == round(scan_packets(source).video_end * rate)
    assert np.abs(waveform).max() > 0


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("with_sound", [False, True])
def test_a_video_keeps_its_picture_packet_for_packet(checkpoint, tmp_path, suffix, with_sound):
    source = video(tmp_path / "in.mp4", 0.9, sound=with_sound)
    target = tmp_path / f"out.{suffix}"
    generate(checkpoint, source, str(target), **FAST)
    assert picture_hash(target) == picture_hash(source)
    made = scan_packets(target)
    assert made.audio_end == pytest.approx(made.video_end, abs=0.08)


def test_wavs_are_16_bit_or_float(checkpoint, clip, tmp_path, generator):
    expected = generator.sound_for(clip).waveform.numpy()
    for wav_format, subtype, error in (("pcm16", "PCM_16", 1 / 32768), ("float", "FLOAT", 0.0)):
        target = tmp_path / f"{wav_format}.wav"
        reach = expected if wav_format == "float" else expected.clip(-1, 1)  # integers clip
        generate(checkpoint, clip, str(target), wav_format=wav_format)
        assert soundfile.info(target).subtype == subtype
        assert np.abs(soundfile.read(target)[0] - reach).max() <= error


def test_a_note_beside_the_sound_says_how_it_was_made(vab, clip, tmp_path):
    out = tmp_path / "out.mp4"
    status, said, _ = vab("--video", clip, "--out", out, "--seed=3", "--sampler.decode_steps=[1,2,1,1]", "--keep=0-0.2")
    assert status == 0
    assert said.startswith(f"{out}  0.94 s") or said.startswith(f"{out}  0.88 s")
    note = json.loads((tmp_path / "out.mp4.json").read_text())
    assert note["sampler"]["decode_steps"] == [1, 2, 1, 1]
    assert note["sampler"]["guidance_scale"] == 2.0  # the checkpoint's own
    assert (note["seed"], note["variation"], note["keep"], note["video"]) == (3, 0, "0-0.2", clip)
    assert note["health"]["seconds"] == pytest.approx(0.9, abs=0.05)
    assert len(note["health"]["entropy"]) == 4
    assert isinstance(note["warnings"], list)


def test_a_sampler_is_a_file_or_flags_or_both(vab, clip, tmp_path):
    (tmp_path / "best.yaml").write_text("decode_steps: 3\ntemperature: 0.5\n")
    flags = ["--sampler", tmp_path / "best.yaml"], ["--sampler.decode_steps=1"], []
    expected = [(3, 0.5), (1, 1.0), (2, 1.0)]
    both = [f"--sampler={tmp_path / 'best.yaml'}", "--sampler.decode_steps=1"]
    for given, wanted in [*zip(flags, expected, strict=True), (both, (1, 0.5)), (both[::-1], (1, 0.5))]:
        assert vab("--video", clip, "--out", tmp_path / "x.wav", *given)[0] == 0
        made = json.loads((tmp_path / "x.wav.json").read_text())["sampler"]
        assert (made["decode_steps"], made["temperature"]) == wanted


def test_variations_are_numbered_and_the_first_is_the_plain_one(vab, clip, tmp_path):
    assert vab("--video", clip, "--out", tmp_path / "plain.wav")[0] == 0
    assert vab("--video", clip, "--out", tmp_path / "x.wav", "--num_variations=3", "--batch_size=2")[0] == 0
    made = sorted(path.name for path in tmp_path.glob("x*.wav"))
    assert made == ["x_1.wav", "x_2.wav", "x_3.wav"]
    assert file_hash(tmp_path / "x_1.wav") == file_hash(tmp_path / "plain.wav")
    assert len({file_hash(tmp_path / name) for name in made}) == 3
    assert [json.loads((tmp_path / f"{name}.json").read_text())["variation"] for name in made] == [0, 1, 2]


def test_the_same_seed_gives_the_same_file(vab, clip, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert vab("--video", clip, "--out", tmp_path / f"{name}.wav", f"--seed={seed}")[0] == 0
    assert file_hash(tmp_path / "a.wav") == file_hash(tmp_path / "b.wav") != file_hash(tmp_path / "c.wav")


def test_what_is_kept_is_in_the_file(vab, clip, tmp_path, generator):
    write_wav(tmp_path / "known.wav", tone(0.5), 16_000, "FLOAT")
    arguments = ["--video", clip, "--out", tmp_path / "x.wav", "--wav_format=float", "--audio", tmp_path / "known.wav"]
    assert vab(*arguments, "--keep=0.1-0.3,-0.05")[0] == 0
    codes = generator.codec.encode(torch.from_numpy(tone(0.5))[None, None])
    expected = generator.codec.decode(codes, 8000)[0, 0].numpy()
    waveform = soundfile.read(tmp_path / "x.wav", dtype="float32")[0]
    for span in (slice(0, 800), slice(1600, 4800)):
        assert np.array_equal(waveform[span], expected[span])
    assert not np.array_equal(waveform[800:1600], expected[800:1600])


def test_two_stages_make_one_sound(vab, two_stages, two_stage_generator, clip, tmp_path):
    coarse, fine = two_stages
    arguments = ["--video", clip, "--out", tmp_path / "x.wav", "--wav_format=float", "--fine_checkpoint", fine]
    assert vab(*arguments, "--fine_sampler.decode_steps=[2,1]", model=coarse)[0] == 0
    prepared = two_stage_generator.prepare(Request(Path(clip), "clip.mp4"))
    note = json.loads((tmp_path / "x.wav.json").read_text())
    assert note["fine_sampler"]["decode_steps"] == [2, 1]
    assert note["fine_checkpoint"] == fine
    assert len(soundfile.read(tmp_path / "x.wav")[0]) == prepared.samples
    status, _, said = vab("--video", clip, "--out", tmp_path / "y.wav", "--fine_sampler.decode_steps=2", model=coarse)
    assert (status, said) == (2, "error: --fine_sampler is for the fine stage: give one with --fine_checkpoint\n")


def test_a_picture_with_transparent_parts_sounds_too_and_says_so(vab, tmp_path):
    Image.fromarray(np.full((40, 56, 4), 100, np.uint8)).save(tmp_path / "x.png")
    status, said, note = vab("--video", tmp_path / "x.png", "--out", tmp_path / "x.wav")
    assert status == 0
    assert note.startswith("note: x.png: its transparent parts are shown on white\n")
    assert f"{tmp_path / 'x.wav'}  0.64 s" in said
    assert vab("--video", tmp_path / "x.png", "--out", tmp_path / "y.wav", "--seconds=1.25")[0] == 0
    assert soundfile.info(tmp_path / "y.wav").frames == 20_000
    status, _, said = vab("--video", tmp_path / "x.png", "--out", tmp_path / "x.mp4")
    assert status == 2
    assert (
        said
        == f"error: {tmp_path / 'x.png'} is a still picture: its sound is written as .wav, got {tmp_path / 'x.mp4'}\n"
    )


def test_a_folder_goes_into_a_folder(vab, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    video(tmp_path / "in" / "a.mp4", 0.3)
    video(tmp_path / "in" / "sub" / "b.mp4", 0.3)
    assert vab("--video", tmp_path / "in", "--out", tmp_path / "out", "--format=wav", "--num_variations=2")[0] == 0
    made = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.wav"))
    assert made == ["a_1.wav", "a_2.wav", "sub/b_1.wav", "sub/b_2.wav"]
    assert (tmp_path / "out" / "generations.csv").is_file()


def test_outputs_are_not_put_among_the_inputs(vab, tmp_path):
    video(tmp_path / "in" / "a.mp4", 0.3)
    status, _, said = vab("--video", tmp_path / "in", "--out", tmp_path / "in" / "out", "--format=wav")
    assert status == 2
    assert "would be the next run's inputs" in said
    assert not (tmp_path / "in" / "out").exists()


def test_files_of_one_name_in_two_folders_sound_different(vab, tmp_path):
    for folder in ("one", "other"):
        video(tmp_path / "in" / folder / "video.mp4", 0.3)
    assert vab("--video", tmp_path / "in", "--out", tmp_path / "out", "--format=wav")[0] == 0
    assert file_hash(tmp_path / "out" / "one" / "video.wav") != file_hash(tmp_path / "out" / "other" / "video.wav")


def test_no_input_is_ever_written_over(checkpoint, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    source = video(folder / "a.mp4", 0.3)
    write_wav(tmp_path / "known.wav", tone(0.2), 16_000)
    (tmp_path / "known_1.wav").symlink_to(tmp_path / "known.wav")
    before = file_hash(source), file_hash(tmp_path / "known.wav")
    known = str(tmp_path / "known.wav")
    for arguments in (
        (str(folder), str(folder)),
        (source, source),
        (source, str(folder / ".." / "in" / "a.mp4")),
    ):
        with pytest.raises(UserError, match="would be lost"):
            generate(checkpoint, *arguments, **FAST)
    for target, count in ((known, 1), (known, 2)):
        with pytest.raises(UserError, match="would be lost"):
            generate(checkpoint, source, target, audio=known, num_variations=count, **FAST)
    table = tmp_path / "list.csv"
    table.write_text(f"file\n{source}\n")
    generate(checkpoint, str(table), str(tmp_path / "out"), format="wav", **FAST)
    assert (file_hash(source), file_hash(known)) == before
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out=x.txt"], "--out must end in .wav, .mp4 or .mkv, got x.txt"),
        (["--out=x"], "--out must end in .wav, .mp4 or .mkv, got x"),
        (["--out=folder/x.wav"], "--out folder/x.wav cannot be written: folder/x.wav is in the way"),
        (["--out=words.mp4/y.wav"], "words.mp4 is in the way"),
        (["--out=x.wav", "--video=missing.mp4"], "no video at missing.mp4"),
        (["--out=x.wav", "--video=words.mp4"], "words.mp4: is text, not media: '"),
        (["--out=x.wav", "--video=words.png"], "words.png: is text, not media: '"),
        (["--out=x.wav", "--video=sound.wav"], "sound.wav: has no picture to make sound for"),
        (
            ["--out=x.mp4", "--seconds=0.5"],
            "--seconds shortens the sound, not the picture: write it as .wav, got x.mp4",
        ),
        (["--out=x.wav", "--seconds=0"], "--seconds must be at least 0.02, got 0.0"),
        (["--out=x.wav", "--keep=0-9"], "--keep: the span 0-9 lies beyond the sound, which ends at 0."),
        (
            ["--out=x.wav", "--keep=5"],
            "--keep takes spans of seconds, such as 0-2,5- (from 5 s to the end); '5' is none",
        ),
        (["--out=x.wav", "--keep=0-1", "--audio=none.wav"], "none.wav: there is no such file"),
        (["--out=x.wav", "--audio=words.mp4"], "words.mp4: is text, not media"),
        (
            ["--out=x.wav", "--keep_levels=4"],
            "--keep_levels must leave a level to make of the model's 4: 0 to 3, got 4",
        ),
        (["--out=x.wav", "--num_variations=0"], "--num_variations must be at least 1, got 0"),
        (["--out=x.wav", "--batch_size=0"], "--batch_size must be 1 or more, got 0"),
        (["--out=x.wav", "--overwrite=true"], "--overwrite is for a folder or CSV"),
        (["--out=x.wav", "--devices=2"], "--devices and --num_nodes are for many videos, but --video clip.mp4 is one"),
        (["--out=x.wav", "--overlap_seconds=1"], "--overlap_seconds must be at least 0 and below a segment's 0.64 s"),
        (["--out=x.wav", "--device=abacus"], "device must be auto, cpu, cuda or cuda:N, got 'abacus'"),
        (["--out=x.wav", "--device=cuda:77"], "there is no cuda:77"),
        (["--out=x.wav", "--sampler=bad.yaml"], "bad.yaml: unknown key 'decode_step'; did you mean 'decode_steps'?"),
        (["--out=x.wav", "--sampler.order=up"], "--sampler: order must be one of"),
        (["--out=x.wav", "--sampler.decode_steps=[1,1,1,1,1]"], "decode_steps lists 5 levels, but the codes have 4"),
        (["--out=x.wav", "--sampler.guidance_scal=1"], "unknown key 'guidance_scal'; did you mean 'guidance_scale'?"),
        (["--out=x.wav", "--precision=8"], "'32-true', 'bf16-mixed'"),
        (["--out=x.wav", "--seeed=8"], "did you mean 'seed'?"),
        (["--out=x.wav", "--decode_steps=8"], "type --sampler.decode_steps"),
        (["--out=x.wav", "--keep", "-x"], "as in --keep=-2"),
        (["--out=x.wav", "--fine_checkpoint=none.ckpt"], "no checkpoint at none.ckpt"),
        (["--out=x.wav", "--video=folder"], "give a folder for --out, got x.wav"),
        (["--out=x", "--video=folder", "--audio=sound.wav"], "--audio is the sound of one video"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_no_file(vab, clip, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "x.wav").mkdir(parents=True)
    (tmp_path / "clip.mp4").symlink_to(clip)
    for name in ("words.mp4", "words.png"):
        (tmp_path / name).write_text("no video at all")
    (tmp_path / "bad.yaml").write_text("decode_step: 3\n")
    write_wav(tmp_path / "sound.wav", np.zeros(16_000), 16_000)
    before = sorted(tmp_path.rglob("*"))
    status, out, said = vab("--video=clip.mp4", *arguments)
    assert status == 2
    assert said.startswith("error: ")
    assert words in said
    assert said.count("\n") == 1
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before


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
    with pytest.raises(SystemExit):
        main(["shards", "verify", str(tmp_path / "nowhere")])
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nowhere'}: 1 problem\n")


def test_another_file_under_an_old_name_is_made_anew(vab, tmp_path):
    for folder, seed in (("one", 1), ("other", 2)):
        video(tmp_path / folder / "x.mp4", 0.3, seed=seed)
    assert vab("--video", tmp_path / "one", "--out", tmp_path / "out", "--format=wav")[0] == 0
    before = file_hash(tmp_path / "out" / "x.wav")
    said = vab("--video", tmp_path / "one", "--out", tmp_path / "out", "--format=wav")[1]
    assert "0 made, 1 there before" in said
    said = vab("--video", tmp_path / "other", "--out", tmp_path / "out", "--format=wav")[1]
    assert "1 made, 0 there before" in said
    assert file_hash(tmp_path / "out" / "x.wav") != before


def test_a_file_that_was_written_again_is_made_anew_whatever_its_size(vab, tmp_path):
    source = Path(video(tmp_path / "in" / "x.mp4", 0.3))
    arguments = ["--video", tmp_path / "in", "--out", tmp_path / "out", "--format=wav"]
    assert "1 made" in vab(*arguments)[1]
    assert "0 made, 1 there before" in vab(*arguments)[1]
    status = source.stat()
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert "1 made, 0 there before" in vab(*arguments)[1]


def test_sounds_beside_the_videos_of_a_folder_are_no_videos(vab, tmp_path):
    video(tmp_path / "in" / "a.mp4", 0.3)
    write_wav(tmp_path / "in" / "a.wav", tone(0.3), 16_000)
    assert vab("--video", tmp_path / "in", "--out", tmp_path / "out", "--format=wav")[0] == 0
    assert [path.name for path in (tmp_path / "out").glob("*.wav")] == ["a.wav"]


def test_weights_of_a_diverged_run_are_refused(vab, checkpoint, clip, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    next(weight for name, weight in content["state_dict"].items() if name.endswith("heads")).fill_(float("nan"))
    torch.save(content, tmp_path / "nan.ckpt")
    status, _, said = vab("--video", clip, "--out", tmp_path / "x.wav", model=tmp_path / "nan.ckpt")
    assert status == 2
    assert "not finite" in said
