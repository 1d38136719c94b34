"""The settings of iterative decoding and its schedules: how many codes stay hidden after each pass."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from vab.spec import UserError

Order = Literal["confidence", "random", "van_der_corput", "halton"]
Guidance = Literal["constant", "ramp", "anneal"]
Remask = Literal["none", "cap", "rescale", "loop"]

# The "loop" strategy of ReMDM, Wang et al. 2025: with time from 1 to 0, the share of revealed codes is held at 0.9 from
# time 0.55 to 0.05.
_HELD_HIDDEN = 0.1
_HOLD_BEGIN, _HOLD_END = 0.45, 0.95  # shares of the passes
_HELD_PROGRESS = math.acos(_HELD_HIDDEN) / (math.pi / 2)  # where the cosine schedule has this share hidden


@dataclass(frozen=True)
class Stage:
    """Passes that fill some levels together."""

    first_level: int
    """The first level."""
    end_level: int
    """One after the last level."""
    steps: int
    """The number of passes."""


@dataclass(frozen=True)
class Sampler:
    """How hidden codes are filled. Saved with every output; the defaults are the paper's.

    Source: VAB, Su et al. 2024 (guidance scale, as third parties report it); steps, top-k and choice temperature: the
    authors' follow-up code. The other options name their sources.
    """

    decode_steps: int | list[int] = 16
    """Passes of the network. A number fills all levels together. A list fills level by level, coarse to fine, such as
    ``[16, 1, 1, 1]`` (SoundStorm, Borsos et al. 2023) or ``[20, 10, 10, 10]`` (MAGNeT, Ziv et al. 2024). If the list is
    shorter than the number of levels, its first entry fills all remaining coarse levels together."""
    temperature: float = 1.0
    """Divides the logits before a code is sampled; 0 always takes the most likely code."""
    top_k: int | None = 256
    """Sample from this many most likely codes only; None samples from all."""
    choice_temperature: float = 15.5
    """Scale of the Gumbel noise that is added to the confidences, with order ``confidence``. It falls linearly to 0
    within a stage. 0 keeps the most confident codes."""
    guidance_scale: float = 5.0
    """w in u + w (c - u), c the logits with the video, u without. 1 is plain conditioning, in one pass; 0 ignores the
    video."""
    top_p: float = 1.0
    """After top-k, sample from the smallest set of most likely codes whose total probability reaches this; 1 samples
    from all (Holtzman et al. 2020)."""
    order: Order = "confidence"
    """Which codes a pass keeps. ``confidence``: those with the highest probability when they were sampled (MaskGIT,
    Chang et al. 2022). ``random``: any (ancestral sampling of masked diffusion, Sahoo et al. 2024). ``van_der_corput``:
    coarse to fine, within a level at steps that divide the time more and more finely. ``halton``: spread over steps and
    levels together (Halton-MaskGIT, Besnier et al. 2025)."""
    guidance: Guidance = "constant"
    """``ramp`` raises the scale from 1 to w over the passes (MUSE, Chang et al. 2023). ``anneal`` lowers it from w to 1
    with the share of hidden codes (MAGNeT)."""
    remask: Remask = "none"
    """Whether filled codes may be hidden again, so that later passes can correct them (ReMDM, Wang et al. 2025).
    ``cap``: in every pass the share ``remask_strength`` of the filled codes, at most as many as stay hidden.
    ``rescale``: that share of the most that the schedule allows. ``loop``: as ``cap``, while the schedule is held with
    nine tenths of the codes filled."""
    remask_strength: float = 0.05
    """The share of codes that ``remask`` hides again."""
    expected: bool = False
    """Sample nothing: in one pass, take the codes whose vectors sum to nearly what the network expects. For fine
    stages, whose levels correct the coarser ones. Of the other settings only the guidance scale counts. See
    ``vab.tokens.expectation``."""

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        steps = self.decode_steps if isinstance(self.decode_steps, list) else [self.decode_steps]
        if not steps or min(steps) < 1:
            raise UserError(f"sampler: decode_steps must be at least 1, each of a list, got {self.decode_steps}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"sampler: top_k must be at least 1, or null for all codes, got {self.top_k}")
        if 0 < self.temperature < 1e-3:  # logits over less than this overflow
            raise UserError(f"sampler: temperature must be 0 (greedy) or at least 0.001, got {self.temperature}")
        for name in ("temperature", "choice_temperature", "guidance_scale"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"sampler: {name} must be 0 or above, got {value}")
        for name in ("top_p", "remask_strength"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise UserError(f"sampler: {name} must be above 0 and at most 1, got {value}")
        for name, known in (("order", get_args(Order)), ("guidance", get_args(Guidance)), ("remask", get_args(Remask))):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"sampler: {name} must be one of {', '.join(known)}, got {value!r}")

    @property
    def passes(self) -> int:
        """Rows of the network's batch per record: 2 with guidance, else 1."""
        return 1 if self.guidance_scale == 1 else 2

    @property
    def total_steps(self) -> int:
        """Total passes of the network."""
        if self.expected:
            return 1
        return sum(self.decode_steps) if isinstance(self.decode_steps, list) else self.decode_steps

    def stages(self, num_codebooks: int) -> list[Stage]:
        """The stages: levels that are filled together, with their passes.

        Raises:
            UserError: If ``decode_steps`` lists more levels than there are.
        """
        if not isinstance(self.decode_steps, list):
            return [Stage(0, num_codebooks, self.decode_steps)]
        first = num_codebooks - len(self.decode_steps)
        if first < 0:
            raise UserError(
                f"sampler: decode_steps lists {len(self.decode_steps)} levels, but the codes have {num_codebooks}"
            )
        starts = [0, *range(first + 1, num_codebooks)]
        ends = [*starts[1:], num_codebooks]
        return [Stage(*stage) for stage in zip(starts, ends, self.decode_steps, strict=True)]

    def guidance_at(self, step: int, stage_step: int, stage_steps: int) -> float:
        """The guidance scale of a pass.

        Args:
            step: The pass, from 0.
            stage_step: The pass within its stage, from 0.
            stage_steps: Passes of the stage.
        """
        if self.guidance == "ramp":
            share = step / (self.total_steps - 1) if self.total_steps > 1 else 1.0
        elif self.guidance == "anneal":
            share = 1.0 if stage_step == 0 else self.hidden_ratio(stage_step - 1, stage_steps)
        else:
            share = 1.0
        return 1 + (self.guidance_scale - 1) * share

    def hidden_ratio(self, step: int, steps: int) -> float:
        """The share of a stage's codes that stay hidden after a pass: few codes are revealed at first, many at the end.

        It is cos(pi/2 (step + 1) / steps), MaskGIT's schedule, and exactly 0 after the last pass. With the remasking
        ``loop`` it is held at one tenth.

        Args:
            step: The pass within its stage, from 0.
            steps: Passes of the stage.
        """
        if step + 1 == steps:
            return 0.0
        progress = (step + 1) / steps
        if self.remask == "loop":
            progress = _with_hold(progress)
        return math.cos(math.pi / 2 * progress)

    def remask_share(self, step: int, steps: int) -> float:
        """The share of the filled codes (``rescale``: of the most allowed) that a pass hides again."""
        if self.remask == "none" or step + 1 == steps:
            return 0.0
        holds = _HOLD_BEGIN < (step + 1) / steps <= _HOLD_END
        return 0.0 if self.remask == "loop" and not holds else self.remask_strength


def _with_hold(progress: float) -> float:
    """Progress through the cosine schedule with the hold of ``loop``: linear up to it, constant, linear to the end."""
    if progress <= _HOLD_BEGIN:
        return _HELD_PROGRESS * progress / _HOLD_BEGIN
    if progress <= _HOLD_END:
        return _HELD_PROGRESS
    return _HELD_PROGRESS + (1 - _HELD_PROGRESS) * (progress - _HOLD_END) / (1 - _HOLD_END)


def sampler_from(values: Mapping[str, Any], base: Sampler | None = None, where: str = "sampler") -> Sampler:
    """A `Sampler` from plain values, such as those of a YAML file or a command line.

    Args:
        values: Names of `Sampler`'s fields, with their values.
        base: The other fields; the defaults if None.
        where: The source of the values, for errors.

    Raises:
        UserError: If a name is unknown, or a value has the wrong type or is out of range.
    """
    names = [field.name for field in fields(Sampler)]
    settings = asdict(base or Sampler())
    for name, value in values.items():
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
            raise UserError(f"{where}: unknown key {name!r}; {hint}")
        settings[name] = _checked(name, value, where)
    try:
        return Sampler(**settings)
    except UserError as error:
        raise UserError(str(error).replace("sampler:", f"{where}:", 1)) from error


def _checked(name: str, value: Any, where: str) -> Any:
    """The value, checked against the field's type."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if name == "decode_steps":
        wanted = "a whole number, or a list of them"
        fits = is_whole or (isinstance(value, list) and all(type(entry) is int for entry in value))
    elif name == "top_k":
        wanted, fits = "a whole number or null", is_whole or value is None
    elif name in ("order", "guidance", "remask"):
        wanted, fits = "a word", isinstance(value, str)
    elif name == "expected":
        wanted, fits = "true or false", isinstance(value, bool)
    else:
        wanted, fits = "a number", is_whole or isinstance(value, float)
    if not fits:
        raise UserError(f"{where}: {name} must be {wanted}, got {value!r}")
    return float(value) if wanted == "a number" else value
