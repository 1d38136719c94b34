"""What all sounds of a run are generated with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vab.generation.generator import Generator
from vab.generation.outputs import Job, WavFormat, write_sound
from vab.generation.sampler_files import Changes, changed_sampler, sampler_file
from vab.generation.sound import Sound
from vab.generation.windows import Precision
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
    seed: int = 0
    sampler: Changes = None
    fine_sampler: Changes = None
    overlap_seconds: float | None = None
    wav_format: WavFormat = "pcm16"
    weights: Literal["ema", "live"] = "ema"
    precision: Precision = "32-true"
    compile: bool = False

    def __post_init__(self) -> None:
        """Check the samplers before any network is loaded."""
        changed_sampler(Sampler(), self.sampler, "--sampler")
        changed_sampler(Sampler(), self.fine_sampler, "--fine_sampler")

    @property
    def files(self) -> list[str | None]:
        """The files that it reads."""
        return [self.checkpoint, self.fine_checkpoint, sampler_file(self.sampler), sampler_file(self.fine_sampler)]

    def load(self, device: str) -> tuple[Generator, Sampler, Sampler | None]:
        """Load the networks onto a device; the samplers are those of the model and of its fine stage, if any."""
        generator = Generator.load(
            self.checkpoint,
            self.weights,
            device,
            self.fine_checkpoint,
            self.precision,
            self.compile,
            self.overlap_seconds,
        )
        task, fine = generator.task, generator.fine
        sampler = changed_sampler(task.sampler, self.sampler, "--sampler", task.made_levels)
        if fine is None:
            if self.fine_sampler is not None:
                raise UserError("--fine_sampler is for the fine stage: give one with --fine_checkpoint")
            return generator, sampler, None
        return generator, sampler, changed_sampler(fine.sampler, self.fine_sampler, "--fine_sampler", fine.made_levels)

    def write(self, job: Job, sound: Sound, sample_rate: int) -> None:
        """Write a sound (of a sample rate in Hz) to its target, whole or not at all."""
        write_sound(job, sound, sample_rate, self.wav_format)
