"""What all sounds of a run are generated with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vab.generation.generator import Generator
from vab.generation.outputs import Job, WavFormat, write_sound
from vab.generation.sampler_files import Changes, changed_sampler, sampler_file
from vab.generation.sound import Sound
from vab.generation.windows import ChosenPrecision
from vab.spec import UserError
from vab.tokens.sampler import Sampler


@dataclass(frozen=True)
class Recipe:
    """The flags of ``vab generate`` that hold for all outputs of a run.

    Raises:
        UserError: If a sampler file cannot be read, or the changes are not valid for any sampler.
    """

    checkpoint: str
    fine_checkpoint: str | None = None
    weights: Literal["ema", "live"] = "ema"
    precision: ChosenPrecision = "auto"
    compile: bool = False
    overlap_seconds: float | None = None
    sampler: Changes = None
    fine_sampler: Changes = None
    seed: int = 0
    wav_format: WavFormat = "pcm16"

    def __post_init__(self) -> None:
        """Check the samplers before any network is loaded."""
        changed_sampler(Sampler(), self.sampler, "--sampler")
        changed_sampler(Sampler(), self.fine_sampler, "--fine_sampler")

    @property
    def files(self) -> list[str | None]:
        """The files that it reads."""
        return [self.checkpoint, self.fine_checkpoint, sampler_file(self.sampler), sampler_file(self.fine_sampler)]

    def load(self, device: str) -> Generator:
        """Load the networks onto a device; the samplers of model and fine stage are changed as the recipe says."""
        model = (self.checkpoint, self.weights, device, self.fine_checkpoint)
        generator = Generator.load(*model, self.precision, self.compile, self.overlap_seconds)
        if generator.fine is None and self.fine_sampler is not None:
            raise UserError("--fine_sampler is for the fine stage: give one with --fine_checkpoint")
        stages = (generator.task, self.sampler, "--sampler"), (generator.fine, self.fine_sampler, "--fine_sampler")
        for task, changes, flag in stages:
            if task is not None:
                task.sampler = changed_sampler(task.sampler, changes, flag, task.predicted_levels)
        return generator

    def write(self, job: Job, sound: Sound, sample_rate: int) -> None:
        """Write a sound (of a sample rate in Hz) to its target, whole or not at all."""
        write_sound(job, sound, sample_rate, self.wav_format)
