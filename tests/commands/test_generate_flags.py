"""Each flag of ``vab generate`` changes the sound, its file or its note as it says."""

import json
from functools import cached_property

import numpy as np
import pytest
import soundfile
import torch

from flags import batches_seen, each_flag, flip, precisions_of
from small_media import save_model, tone, video
from tone_shards import short_spec
from vab.audio import log_mel_distance
from vab.backbone import Backbone
from vab.commands.generate import generate
from vab.data.media.write import write_wav
from vab.frozen.codec import load_codec
from vab.spec import UserError

RATE = 16_000


def alike(sound, other):
    """Whether two sounds are the same, sample for sample."""
    return sound.shape == other.shape and np.array_equal(sound, other)


class Generate:
    """Runs on one clip of 0.9 s, a window and a half, with an untrained model."""

    def __init__(self, folder, checkpoint, two_stages):
        self.folder, self.model, self.stages = folder, checkpoint, two_stages
        self.clip = video(folder / "in" / "clip.mp4", 0.9)

    def run(self, name="x.wav", **changes):
        """Run the command; gives the path of the output."""
        out = self.folder / name
        settings = {
            "checkpoint": self.model, "video": self.clip, "out": str(out), "wav_format": "float", "device": "cpu",
        }  # fmt: skip
        generate(**settings | changes)
        return out

    def sound(self, **changes):
        """The waveform that is written."""
        return soundfile.read(self.run(**changes), dtype="float32")[0]

    def note(self, **changes):
        """What is written beside the sound."""
        out = self.run(**changes)
        return json.loads(out.with_name(f"{out.name}.json").read_text())

    @cached_property
    def plain(self):
        """With no flag but those that must be."""
        return self.sound()

    def checkpoint(self):
        other = save_model(self.folder / "other.ckpt", short_spec(), load_codec("tiny").codebooks(), seed=1)
        assert not alike(self.sound(checkpoint=other), self.plain)

    def video(self):
        assert len(self.sound(video=video(self.folder / "short.mp4", 0.5))) == RATE // 2 < len(self.plain)

    def out(self):
        assert soundfile.info(self.run("elsewhere.wav")).frames == len(self.plain)

    def fine_checkpoint(self):
        coarse, fine = self.stages
        alone, both = self.note(checkpoint=coarse), self.note(checkpoint=coarse, fine_checkpoint=fine)
        assert [len(note["health"]["entropy"]) for note in (alone, both)] == [2, 4]

    def audio(self):
        write_wav(self.folder / "known.wav", tone(0.5), RATE, "FLOAT")
        made = self.sound(audio=str(self.folder / "known.wav"))
        codec = load_codec("tiny")
        codes = codec.encode(torch.from_numpy(tone(0.5))[None, None])
        assert alike(made[:8000], codec.decode(codes, 8000)[0, 0].numpy())

    def keep(self):
        whole, start = self.sound(keep="0-"), self.sound(keep="0-0.3")
        assert alike(start[:4800], whole[:4800])
        assert not alike(start[9600:], whole[9600:])
        assert not alike(whole[:4800], self.plain[:4800])

    def keep_levels(self):
        known = torch.from_numpy(self.sound(keep="0-"))[None, None]
        made = [torch.from_numpy(sound)[None, None] for sound in (self.sound(keep_levels=3), self.plain)]
        kept, free = (float(log_mel_distance(sound, known, RATE)) for sound in made)
        assert kept < 0.5 * free

    def seconds(self):
        assert len(self.sound(seconds=0.5)) == RATE // 2

    def num_variations(self):
        self.run("v.wav", num_variations=2)
        first, second = (soundfile.read(self.folder / f"v_{number}.wav", dtype="float32")[0] for number in (1, 2))
        assert alike(first, self.plain)
        assert not alike(first, second)

    def seed(self):
        assert not alike(self.sound(seed=1), self.plain)

    def sampler(self):
        assert not alike(self.sound(sampler={"decode_steps": 1}), self.plain)

    def fine_sampler(self):
        coarse, fine = self.stages
        usual = {"checkpoint": coarse, "fine_checkpoint": fine}
        assert not alike(self.sound(**usual, fine_sampler={"decode_steps": 1}), self.sound(**usual))

    def overlap_seconds(self):
        clip = video(self.folder / "long.mp4", 1.5)
        usual, apart = self.sound(video=clip), self.sound(video=clip, overlap_seconds=0.0)
        assert usual.shape == apart.shape
        assert not alike(usual, apart)

    def format(self):
        made = self.run("folder", video=str(self.folder / "in"), format="mkv")
        assert [path.name for path in made.glob("clip.*")] == ["clip.mkv"]

    def wav_format(self):
        assert soundfile.info(self.run(wav_format="pcm16")).subtype == "PCM_16"
        assert soundfile.info(self.run(wav_format="float")).subtype == "FLOAT"

    def weights(self):
        content = torch.load(self.model, weights_only=True)
        other = save_model(self.folder / "live.ckpt", short_spec(), load_codec("tiny").codebooks(), seed=1)
        content["live_state_dict"] = torch.load(other, weights_only=True)["state_dict"]
        torch.save(content, self.folder / "both.ckpt")
        both = str(self.folder / "both.ckpt")
        assert alike(self.sound(checkpoint=both, weights="live"), self.sound(checkpoint=other))
        assert alike(self.sound(checkpoint=both, weights="ema"), self.plain)

    def precision(self):
        with precisions_of(Backbone) as precisions:
            made = self.sound(precision="bf16-mixed")
        assert precisions == {torch.bfloat16}
        assert not alike(made, self.plain)
        assert alike(self.sound(precision="32-true"), self.plain)  # the default on a CPU
        assert [self.note(precision=one)["precision"] for one in ("auto", "bf16-mixed")] == [
            "32-true", "bf16-mixed",
        ]  # fmt: skip

    def compile(self):
        with pytest.MonkeyPatch.context() as patch:
            compiled = []
            patch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(type(module)))
            self.run(compile=True)
        assert compiled == [Backbone]

    def batch_size(self):
        batches = []
        for size in (8, 1):
            with batches_seen(Backbone) as sizes:
                self.run(num_variations=3, batch_size=size)
            batches.append(set(sizes))
        assert batches == [{6}, {2}]  # guidance doubles them

    def device(self):
        with pytest.raises(UserError, match="there is no cuda:99"):
            self.run(device="cuda:99")

    devices = "tests/generation/test_batch.py::test_two_ranks_make_what_one_makes"

    def num_nodes(self):
        with pytest.raises(UserError, match="--num_nodes 2: MASTER_ADDR and MASTER_PORT are not set"):
            self.run("nodes", video=str(self.folder / "in"), format="wav", num_nodes=2)

    def overwrite(self):
        usual = {"video": str(self.folder / "in"), "format": "wav"}
        first = (self.run("again", **usual) / "clip.wav").read_bytes()
        with pytest.raises(UserError, match="seed: 0 != 1"):
            self.run("again", **usual, seed=1)
        assert (self.run("again", **usual, seed=1, overwrite=True) / "clip.wav").read_bytes() != first


@pytest.fixture(scope="module")
def generating(tmp_path_factory, checkpoint, two_stages):
    return Generate(tmp_path_factory.mktemp("generate_flags"), checkpoint, two_stages)


@each_flag(generate)
def test_generate(request, generating, flag):
    flip(request, generating, flag)
