"""What a model's sounds depend on, and what is kept of known ones; with the tiny networks and untrained models."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from small_media import save_model, tone, video
from tone_shards import short_spec, write_shards
from vab.audio import rms_db
from vab.data.media.segments import MediaError, read_audio, read_frames, scan_packets
from vab.data.media.write import write_video, write_wav
from vab.data.reading.dataset import ShardDataset
from vab.frozen.codec import load_codec
from vab.frozen.codec.tiny import TinyCodec
from vab.generation.generator import Generator
from vab.generation.request import Prepared, Request
from vab.generation.sound import FADE_SECONDS
from vab.generation.windows import precision_on, window_starts
from vab.spec import UserError
from vab.tokens.sampler import Sampler

RATE, PER_STEP = 16_000, 320
FAST = Sampler(decode_steps=2, guidance_scale=2.0)
QUICK = Sampler(decode_steps=1, guidance_scale=1.0)


def request(path, **options):
    return Request(Path(path), Path(path).name, **options)


def round_trip(generator, waveform):
    codes = generator.codec.encode(torch.from_numpy(waveform)[None, None])
    return codes[0], generator.codec.decode(codes, len(waveform))[0, 0]


def sound(generator, path, sampler=FAST, seed=0, **options):
    return generator.make([generator.prepare(request(path, **options))], seed, sampler)[0]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """1.5 s: three windows."""
    return video(tmp_path_factory.mktemp("clip") / "clip.mp4", 1.5)


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    return video(tmp_path_factory.mktemp("silent") / "silent.mp4", 1.5, sound=False)


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


def test_features_of_a_window_are_those_of_its_own_frames(generator, clip):
    """In one pass over the file, shared frames once; against reading and encoding each window by itself."""
    spec, prepared = generator.task.spec, generator.prepare(request(clip))
    assert len(prepared.starts) == 3
    for start, features, frames in zip(prepared.starts, prepared.features, prepared.frames, strict=True):
        span = read_frames(clip, spec.video_fps, start / spec.code_rate, spec.num_frames)
        alone = generator.vision.encode(generator.vision.preprocess(span.frames))
        assert torch.allclose(features, alone, atol=1e-5)
        assert frames == span.valid_frames


def test_reading_a_video_can_be_stopped_between_its_frames(generator, tmp_path):
    write_video(tmp_path / "x.mp4", np.zeros((2, 32, 32, 3), np.uint8), "1/30", None, RATE)  # 60 s
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        generator.prepare(request(tmp_path / "x.mp4"), check)
    assert len(calls) == 2


def test_a_long_video_is_as_long_as_its_picture_and_has_no_seams(checkpoint, tmp_path):
    """60 s of segments of 0.64 s. Between 20-ms frames the level jumps at the seams as it does everywhere."""
    generator = Generator.load(checkpoint, device="cpu")
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    write_video(tmp_path / "x.mp4", frames, "1/30", None, RATE)  # two pictures, 30 s each
    prepared = generator.prepare(request(tmp_path / "x.mp4"))
    made = generator.make([prepared], sampler=QUICK)[0]
    assert len(made.waveform) == 60 * RATE
    assert made.codes.shape == (4, 3000)
    assert len(prepared.starts) == 125
    level = rms_db(made.waveform.view(-1, PER_STEP) + 1e-6)
    jumps = level.diff().abs()
    seams = torch.tensor([before + generator.task.spec.num_steps for before in prepared.starts[:-1]]) - 1
    elsewhere = torch.ones(len(jumps), dtype=torch.bool)
    elsewhere[seams] = False
    error = jumps[elsewhere].std() / len(seams) ** 0.5
    assert jumps[seams].mean() < jumps[elsewhere].mean() + 4 * error


def test_a_sound_depends_on_its_own_request_and_not_on_its_batch(generator, tmp_path, clip):
    paths = [clip, *(video(tmp_path / f"{number}.mp4", 0.3 + 0.2 * number, seed=number) for number in range(4))]
    prepared = [generator.prepare(request(path)) for path in paths]
    together = generator.make(prepared, 5, FAST)
    for item, among in zip(prepared, together, strict=True):
        alone = generator.make([item], 5, FAST)[0]
        assert torch.equal(alone.codes, among.codes)
        assert torch.allclose(alone.waveform, among.waveform, atol=1e-5)
        assert len(alone.waveform) == item.samples
    assert generator.make([]) == []


def test_seed_name_and_variation_each_give_another_sound(generator, clip):
    item = generator.prepare(request(clip))
    others = [item.request, replace(item.request, name="other.mp4")]
    others += [replace(item.request, variation=number) for number in (1, 2)]
    codes = [made.codes for made in generator.make([replace(item, request=other) for other in others], 0, FAST)]
    codes.append(generator.make([item], 1, FAST)[0].codes)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(codes, 2))
    assert torch.equal(codes[0], sound(generator, clip).codes)
    assert torch.equal(codes[0], generator.sound_for(clip, FAST).codes)


def test_kept_seconds_are_the_codecs_round_trip_sample_for_sample(generator, clip):
    known = read_audio(clip, RATE, 0.0, 1.5).waveform
    codes, expected = round_trip(generator, known)
    made = sound(generator, clip, keep="0-0.5,1.21-1.4")
    plain = sound(generator, clip)
    for first, last in ((0, 8000), (19_360, 22_400)):
        assert torch.equal(made.waveform[first:last], expected[first:last])
    assert torch.equal(made.codes[:, :25], codes[:, :25])
    assert torch.equal(made.codes[:, 61:70], codes[:, 61:70])  # 1.21 s lies within step 60
    for first, last in ((25, 61), (70, 75)):
        assert (made.codes[:, first:last] != codes[:, first:last]).float().mean() > 0.5
    fade = round(FADE_SECONDS * RATE)
    middle = slice(8000 + fade, 19_360 - fade)
    assert not torch.allclose(made.waveform[middle], expected[middle], atol=1e-3)
    assert not torch.equal(made.codes[:, 25:61], plain.codes[:, 25:61])  # what is kept is context


def test_with_everything_kept_the_sound_is_the_round_trip(generator, clip):
    codes, expected = round_trip(generator, read_audio(clip, RATE, 0.0, 1.5).waveform)
    prepared = generator.prepare(request(clip, keep="0-"))
    assert "nothing is generated" in prepared.notes[0]
    made = generator.make([prepared])[0]
    assert torch.equal(made.waveform, expected)
    assert torch.equal(made.codes, codes)


def test_a_known_sound_is_continued_to_the_end_of_the_picture(generator, silent, tmp_path):
    known = tone(0.71)
    write_wav(tmp_path / "known.wav", known, RATE, "FLOAT")
    made = sound(generator, silent, audio=tmp_path / "known.wav")
    codes, expected = round_trip(generator, known)
    assert len(made.waveform) == 24_000
    assert torch.equal(made.waveform[: len(known)], expected)
    assert torch.equal(made.codes[:, :35], codes[:, :35])  # the step at 0.70 s is known in part only
    assert made.waveform[len(known) :].abs().max() > 0
    step = (made.waveform[len(known)] - made.waveform[len(known) - 1]).abs()
    assert step <= 2 * made.waveform.diff().abs().max()


def test_a_longer_sound_is_cut_and_the_user_told(generator, silent, tmp_path):
    write_wav(tmp_path / "known.wav", tone(4.0), RATE, "FLOAT")
    prepared = generator.prepare(request(silent, audio=tmp_path / "known.wav"))
    assert prepared.samples == 24_000
    note = prepared.notes[0]
    assert "known.wav is longer than the 1.50 s" in note
    expected = round_trip(generator, tone(4.0)[:24_000])[1]
    assert torch.equal(generator.make([prepared])[0].waveform, expected)


def test_kept_levels_stay_everywhere_and_the_others_are_made(generator, clip):
    codes, expected = round_trip(generator, read_audio(clip, RATE, 0.0, 1.5).waveform)
    made = sound(generator, clip, keep_levels=2)
    assert torch.equal(made.codes[:2], codes[:2])
    assert (made.codes[2:] != codes[2:]).float().mean() > 0.5
    both = sound(generator, clip, keep_levels=2, keep="1-")
    assert torch.equal(both.codes[:2], codes[:2])
    assert torch.equal(both.codes[:, 50:], codes[:, 50:])
    assert torch.equal(both.waveform[16_000:], expected[16_000:])


@pytest.mark.parametrize("levels", [-1, 4])
def test_kept_levels_leave_one_to_make(generator, clip, levels):
    with pytest.raises(UserError, match=f"0 to 3, got {levels}"):
        generator.prepare(request(clip, keep_levels=levels))


def test_nothing_can_be_kept_of_a_video_without_sound(generator, silent):
    for options in ({"keep": "0-1"}, {"keep_levels": 1}):
        with pytest.raises(MediaError, match=r"silent\.mp4: has no sound to keep: give it with --audio"):
            generator.prepare(request(silent, **options))


def test_nothing_can_be_kept_beyond_the_end(generator, clip, silent, tmp_path):
    with pytest.raises(UserError, match=r"span 1-9 lies beyond the sound, which ends at 1\.50 s"):
        generator.prepare(request(clip, keep="1-9"))
    for seconds, end in ((3.0, 1.5), (0.7, 0.7)):  # cut with the picture, and by itself
        write_wav(tmp_path / "known.wav", tone(seconds), RATE)
        with pytest.raises(UserError, match=f"ends at {end:.2f} s"):
            generator.prepare(request(silent, keep="2-3", audio=tmp_path / "known.wav"))


def test_a_coarse_model_makes_its_levels_and_the_fine_one_goes_on(two_stages, two_stage_generator, clip):
    coarse = Generator.load(two_stages[0], device="cpu")
    first, both = sound(coarse, clip), sound(two_stage_generator, clip)
    assert first.codes.shape == (2, 75)
    assert both.codes.shape == (4, 75)
    assert torch.equal(both.codes[:2], first.codes)
    for made in (first, both):
        decoded = coarse.codec.decode(made.codes[None], 24_000)[0, 0]
        torch.testing.assert_close(made.waveform, decoded * 10 ** (made.gain_db / 20))
    finer = two_stage_generator.make([two_stage_generator.prepare(request(clip))], 0, FAST, QUICK)[0]
    assert torch.equal(finer.codes[:2], first.codes)
    assert not torch.equal(finer.codes, both.codes)


def test_records_of_a_data_set_get_the_codes_that_videos_get(two_stages, two_stage_generator, tmp_path, monkeypatch):
    """Also where one has fewer steps and frames; a record's number stands for the CRC-32 of a video's name."""
    batch = ShardDataset(write_shards(tmp_path / "ragged", short_spec(), 4, ragged=True)).read(range(4))
    assert len(set(batch.steps.tolist())) > 1
    monkeypatch.setattr("zlib.crc32", int)
    for made_by in (two_stage_generator, Generator.load(two_stages[0], device="cpu")):
        codes = made_by.codes_of_records(batch, 3, FAST, QUICK)
        for number in range(4):
            steps, frames = int(batch.steps[number]), int(batch.frames[number])
            asked = Request(Path("x.mp4"), str(number))
            item = Prepared(steps, [0], batch.features[number : number + 1], [frames], asked, steps * PER_STEP)
            assert torch.equal(made_by.make([item], 3, FAST, QUICK)[0].codes, codes[number, :, :steps])
    fine = Generator.load(two_stages[1], device="cpu")
    assert torch.equal(fine.codes_of_records(batch, 3)[:, :2], batch.codes[:, :2])
    with_kept = two_stage_generator.codes_of_records(batch, 3, keep_levels=2)
    assert torch.equal(with_kept[:, :2], batch.codes[:, :2])
    assert not torch.equal(with_kept[:, 2:], batch.codes[:, 2:])


def test_a_coarse_model_too_keeps_sound_as_all_levels_have_it(two_stages, clip):
    coarse = Generator.load(two_stages[0], device="cpu")
    expected = round_trip(coarse, read_audio(clip, RATE, 0.0, 1.5).waveform)[1]
    made = sound(coarse, clip, keep="0-1")
    assert torch.equal(made.waveform[:16_000], expected[:16_000])


def test_fine_levels_are_made_again_for_the_coarse_ones_of_a_sound(two_stages, two_stage_generator, clip):
    codes = round_trip(two_stage_generator, read_audio(clip, RATE, 0.0, 1.5).waveform)[0]
    by_both = sound(two_stage_generator, clip, keep_levels=2)
    assert torch.equal(by_both.codes[:2], codes[:2])
    assert (by_both.codes[2:] != codes[2:]).float().mean() > 0.5
    fine_alone = Generator.load(two_stages[1], device="cpu")
    assert torch.equal(sound(fine_alone, clip, keep_levels=2).codes[:2], codes[:2])
    three = sound(fine_alone, clip, keep_levels=3)
    assert torch.equal(three.codes[:3], codes[:3])
    for options in ({}, {"keep_levels": 1}, {"keep": "0-1"}):
        with pytest.raises(UserError, match=r"the checkpoint is a fine stage.*--fine_checkpoint"):
            fine_alone.prepare(request(clip, **options))


def test_stages_that_do_not_belong_together_are_refused(checkpoint, two_stages, tmp_path):
    coarse, fine = two_stages
    with pytest.raises(UserError, match="is no fine stage: it makes all its 4 levels"):
        Generator.load(coarse, device="cpu", fine_checkpoint=checkpoint)
    with pytest.raises(UserError, match="is itself a fine stage"):
        Generator.load(fine, device="cpu", fine_checkpoint=fine)
    with pytest.raises(UserError, match="goes on from 2 levels, but the coarse one makes 4"):
        Generator.load(checkpoint, device="cpu", fine_checkpoint=fine)
    other = save_model(
        tmp_path / "other.ckpt",
        replace(short_spec(), video_fps=25.0, num_frames=16),
        load_codec("tiny").codebooks(),
        conditioning_levels=2,
    )
    with pytest.raises(UserError, match=r"do not fit.*video_fps: 12\.5 != 25"):
        Generator.load(coarse, device="cpu", fine_checkpoint=other)


def test_a_still_picture_is_shown_all_the_time(generator, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 4), dtype=np.uint8)).save(tmp_path / "x.png")
    prepared = generator.prepare(request(tmp_path / "x.png"))
    spec = generator.task.spec
    assert prepared.samples == round(spec.segment_seconds * RATE)
    assert prepared.features.shape == (1, spec.num_frames, spec.feature_dim)
    assert prepared.features.std(1).max() == 0
    assert prepared.frames == [spec.num_frames]
    assert prepared.notes == ["its transparent parts are shown on white"]
    longer = generator.prepare(request(tmp_path / "x.png", seconds=1.5))
    assert longer.features.shape[0] == 3
    assert len(generator.make([longer], sampler=FAST)[0].waveform) == 24_000
    assert generator.prepare(request(tmp_path / "x.png", seconds=0.3)).frames == [4]  # of 8 in 0.64 s
    with pytest.raises(UserError, match="picture without sound"):
        generator.prepare(request(tmp_path / "x.png", keep="0-1"))


def test_a_videos_sound_can_be_shorter_than_its_picture(generator, clip):
    assert len(sound(generator, clip, seconds=0.5).waveform) == 8000
    assert len(sound(generator, clip, seconds=99.0).waveform) == round(scan_packets(clip).video_end * RATE)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--seconds must be at least"):
            generator.prepare(request(clip, seconds=seconds))


def test_the_overlap_is_less_than_a_segment(checkpoint, clip):
    for seconds in (-0.1, 0.64, 5.0):
        with pytest.raises(UserError, match=r"--overlap_seconds must be at least 0 and below a segment's 0\.64 s"):
            Generator.load(checkpoint, device="cpu", overlap_seconds=seconds)
    counts = [
        len(Generator.load(checkpoint, device="cpu", overlap_seconds=seconds).prepare(request(clip)).starts)
        for seconds in (0.0, 0.5)
    ]
    assert counts == [3, 8]


def test_a_sound_comes_with_its_health_and_warnings_against_the_training_audio(checkpoint, clip):
    generator = Generator.load(checkpoint, device="cpu")
    generator.task.audio_statistics = {"rms_db_mean": 40.0, "rms_db_std": 1.0, "seconds_mean": 0.64}
    made = sound(generator, clip)
    assert made.health.seconds == 1.5
    assert made.health.rms_db == pytest.approx(float(rms_db(made.waveform)) - made.gain_db, abs=1e-3)
    assert any("quieter than training audio" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    ("device", "capability", "chosen", "precision"),
    [
        ("cuda", (9, 0), "auto", "bf16-mixed"),
        ("cuda:1", (8, 0), "auto", "bf16-mixed"),
        ("cuda", (7, 5), "auto", "32-true"),
        ("cuda", (9, 0), "32-true", "32-true"),
        ("cpu", None, "auto", "32-true"),
        ("cpu", None, "bf16-mixed", "bf16-mixed"),
    ],
)
def test_a_gpu_samples_in_bfloat16_unless_the_user_says_otherwise(device, capability, chosen, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision_on(torch.device(device), chosen) == precision


def test_half_precision_is_for_the_network_alone(checkpoint, clip):
    generator = Generator.load(checkpoint, device="cpu", precision="bf16-mixed")
    made = sound(generator, clip, keep="0-0.5")
    assert made.waveform.dtype == torch.float32
    assert torch.equal(
        made.waveform, generator.make([generator.prepare(request(clip, keep="0-0.5"))], 0, FAST)[0].waveform
    )
    expected = round_trip(generator, read_audio(clip, RATE, 0.0, 1.5).waveform)[1]
    assert torch.equal(made.waveform[:8000], expected[:8000])


@pytest.mark.slow
def test_a_compiled_model_makes_the_same_codes_and_compiles_once(checkpoint, clip, generator):
    import torch._dynamo

    torch._dynamo.reset()
    compiled = Generator.load(checkpoint, device="cpu", compile=True)
    items = [compiled.prepare(replace(request(clip), variation=number)) for number in range(3)]
    graphs = torch._dynamo.utils.counters["stats"]
    first = compiled.make(items, 0, FAST, batch_size=4)
    counted = graphs["unique_graphs"]
    fewer = compiled.make(items[:1], 0, FAST, batch_size=4)
    assert graphs["unique_graphs"] == counted
    compiled.make(items[:1], 0, FAST)  # of another shape
    assert graphs["unique_graphs"] > counted
    plain = generator.make(items, 0, FAST)
    for a, b in zip(first, plain, strict=True):
        assert (a.codes == b.codes).float().mean() > 0.98
    assert torch.equal(fewer[0].codes, first[0].codes)


def test_progress_is_told_once_a_window_and_stage(generator, two_stage_generator, clip):
    for made_by, stages in ((generator, 1), (two_stage_generator, 2)):
        item, calls = made_by.prepare(request(clip)), []
        made_by.make([item], 0, QUICK, on_window=lambda calls=calls: calls.append(1))
        assert len(calls) == made_by.num_windows([item]) == 3 * stages


class LevelCodec(TinyCodec):
    """A codec whose decoder's largest sample is always the same."""

    peak = 3.0

    def _decode(self, codes):
        waveform = super()._decode(codes)
        return self.peak * waveform / waveform.abs().amax(dim=-1, keepdim=True)


class QuietCodec(LevelCodec):
    peak = 0.9


def test_what_would_clip_is_turned_down_as_a_whole_and_says_by_how_much(generator, clip):
    loud = replace(generator, codec=LevelCodec().freeze())
    made = sound(loud, clip)
    assert made.health.peak == pytest.approx(3, rel=1e-5)
    assert made.waveform.abs().max() == pytest.approx(1, rel=1e-5)
    assert made.gain_db == pytest.approx(20 * np.log10(1 / 3), rel=1e-4)
    raw = loud.codec.decode(made.codes[None], len(made.waveform))[0, 0]
    torch.testing.assert_close(made.waveform * 3, raw, rtol=1e-4, atol=1e-5)
    kept = sound(loud, clip, keep="0-0.5")  # what is kept stays as it is, sample for sample; what is made does not clip
    known = round_trip(loud, read_audio(clip, RATE, 0.0, 1.5).waveform)[1]
    assert torch.equal(kept.waveform[:8000], known[:8000])
    assert kept.waveform[8000:].abs().max() <= 1
    assert kept.gain_db < -6
    assert any("kept sound peaks at" in words for words in kept.warnings) == bool(known[:8000].abs().max() > 1)


def test_a_track_that_ends_a_little_early_is_known_to_the_end(generator, silent, tmp_path):
    write_wav(tmp_path / "early.wav", tone(1.5)[:-600], RATE)
    made = generator.prepare(request(silent, audio=tmp_path / "early.wav", keep_levels=2))
    assert made.known.mask[:2].all()
    write_wav(tmp_path / "short.wav", tone(1.5)[:-4000], RATE)
    made = generator.prepare(request(silent, audio=tmp_path / "short.wav", keep_levels=2))
    assert not made.known.mask[:2].all()


def test_quiet_sound_is_left_alone(generator, clip):
    quiet = sound(replace(generator, codec=QuietCodec().freeze()), clip)
    assert quiet.waveform.abs().max() == pytest.approx(0.9, rel=1e-5)
    assert quiet.gain_db == 0
