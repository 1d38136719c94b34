"""Generation timed: a backbone with parallel decoding, and its autoregressive twin, both from features to waveform."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.codecs import fitted
from bench.timing import Timed, measured, peak_memory, reset_peak_memory
from vab.backbone import Backbone
from vab.flops import pass_flops
from vab.frozen.protocols import Codec
from vab.spec import SegmentSpec
from vab.tasks.pretrain import PretrainTask
from vab.tokens.noise import record_keys
from vab.tokens.sampler import Sampler

BF16 = "bf16-mixed"


@dataclass(frozen=True)
class Conditions:
    """What all measurements of a run share."""

    spec: SegmentSpec
    codec: Codec
    device: torch.device
    precision: str = "32-true"
    compile: bool = False
    repeats: int = 1

    @property
    def samples(self) -> int:
        """Of one segment's waveform."""
        return round(self.spec.segment_seconds * self.codec.sample_rate)

    def autocast(self) -> AbstractContextManager:
        """The precision's context."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == BF16 else nullcontext()

    def features(self, batch: int) -> Tensor:
        """(B, V, C) float32: any numbers will do."""
        return torch.randn(batch, self.spec.num_frames, self.spec.feature_dim, device=self.device)


@dataclass(frozen=True)
class Row:
    """One line of the table. Seconds are of the whole batch, medians of the repeats, each part measured by itself."""

    size: str
    system: str
    batch: int
    parameters: int
    calls: int
    """Of the network."""
    flops: int
    """Of the network, for the whole batch."""
    total_seconds: float
    """Features to waveform, with no clock inside."""
    network_seconds: float
    loop_seconds: float
    """Features to codes, with the clock around the network's calls: network_seconds and the rest."""
    codec_seconds: float
    total_runs: list[float]
    peak_bytes: int | None

    @property
    def rest_seconds(self) -> float:
        """The loop without the network: sampling arithmetic and Python."""
        return self.loop_seconds - self.network_seconds

    @property
    def network_share(self) -> float:
        """Of the loop."""
        return self.network_seconds / self.loop_seconds


def paper_spec(seconds: float = 10.0) -> SegmentSpec:
    """The paper's segment: 16 kHz, 50 steps per second, 4 levels of 2048 entries, one frame per second of 768-d."""
    return SegmentSpec(
        segment_seconds=seconds,
        sample_rate=16000,
        code_rate=50.0,
        num_codebooks=4,
        codebook_size=2048,
        code_dim=128,
        num_steps=round(50 * seconds),
        video_fps=1.0,
        num_frames=max(1, round(seconds)),
        feature_dim=768,
        codec="random",
        codec_hash="0",
        vision="random",
        vision_hash="0",
    )


def weights_of(module: nn.Module) -> int:
    """How many parameters a network has."""
    return sum(weight.numel() for weight in module.parameters())


@dataclass(frozen=True)
class System:
    """A way of making codes from features, and where a clock can be put into it."""

    name: str
    make: Callable[[Tensor, bool], Tensor]
    """(B, V, C) float32 to codes; with True it may stop early, as a warm-up."""
    network: nn.Module
    put: Callable[[nn.Module], None]
    """Sets what is called as the network."""
    parameters: int
    calls: int
    """Of the network, per generation."""
    flops: Callable[[int], int]
    """Of the network, for a batch of so many records."""
    autocast: Callable[[], AbstractContextManager]
    """Spans a whole generation: the weights are cast once, not in every pass."""


def parallel(arguments: dict[str, Any], sampler: Sampler, on: Conditions) -> System:
    """`PretrainTask.generate` with random weights.

    Args:
        arguments: Of `Backbone`.
        sampler: Decoding settings.
        on: Everything else.
    """
    backbone = Backbone(on.spec, **arguments)
    backbone.set_codebooks(torch.randn_like(backbone.codebooks))
    task = PretrainTask(backbone).to(on.device).eval()
    if on.compile:
        backbone.compile(dynamic=False)
    # A GPU's allocator and compiled code want the whole as a warm-up, a CPU one pass.
    one_pass = sampler if on.device.type == "cuda" or on.compile else replace(sampler, decode_steps=1)

    def make(features: Tensor, is_warm_up: bool) -> Tensor:
        keys = record_keys(0, torch.arange(len(features), device=on.device))
        return task.generate(features, keys, one_pass if is_warm_up else sampler)

    return System(
        name="vab",
        make=make,
        network=backbone,
        put=lambda network: setattr(task, "backbone", network),
        parameters=weights_of(backbone),
        calls=sampler.total_steps,
        flops=lambda batch: sampler.total_steps * pass_flops(on.spec, arguments, batch * sampler.passes),
        autocast=on.autocast,
    )


def autoregressive(arguments: dict[str, Any], sampler: Sampler, on: Conditions) -> System:
    """The twin of a backbone; arguments as `parallel` has them. Needs transformers.

    In bfloat16 its weights are held so, not cast: the best case for a network that waits for its weights to be read.
    """
    from bench.autoregressive import AutoregressiveTwin

    layers = arguments["num_modality_layers"] + arguments["num_joint_layers"]
    ratio = arguments["feedforward_ratio"]
    twin = AutoregressiveTwin(on.spec, arguments["dim"], arguments["num_heads"], layers, ratio).to(on.device).eval()
    parameters = weights_of(twin)
    if on.precision == BF16:
        twin = twin.to(torch.bfloat16)
    decoder = twin.decoder
    if on.compile:
        decoder.compile(dynamic=True)  # the cached keys and values grow with every step
    few = None if on.device.type == "cuda" or on.compile else 16
    top_k = sampler.top_k or on.spec.codebook_size

    return System(
        name="autoregressive",
        make=lambda features, is_warm_up: twin.generate(
            features, top_k, sampler.guidance_scale, few if is_warm_up else None
        ),
        network=decoder,
        put=lambda network: setattr(twin, "decoder", network),
        parameters=parameters,
        calls=on.spec.num_steps + on.spec.num_codebooks - 1,
        flops=lambda batch: twin.flops(batch, batch * sampler.passes),
        autocast=nullcontext,
    )


@torch.inference_mode()
def measure(system: System, size: str, batch: int, on: Conditions) -> Row:
    """Time one system with the codec: the whole with nothing inside, then its parts."""
    features = on.features(batch)

    def codes(is_warm_up: bool = False) -> Tensor:
        with system.autocast():
            return system.make(features, is_warm_up)

    def waveform(codes: Tensor) -> Tensor:
        return on.codec.decode(fitted(codes, on.codec), on.samples).cpu()

    codes(is_warm_up=True)
    waveform(torch.zeros(batch, on.spec.num_codebooks, on.spec.num_steps, dtype=torch.int64, device=on.device))
    reset_peak_memory(on.device)
    totals = [measured(lambda: waveform(codes()), on.device)[0] for _ in range(on.repeats)]
    peak = peak_memory(on.device)

    timed, loops, decodings = Timed(system.network, on.device), [], []
    system.put(timed)
    for _ in range(on.repeats):
        timed.marks.clear()
        seconds, made = measured(codes, on.device)
        loops.append((seconds, timed.seconds()))
        decodings.append(measured(partial(waveform, made), on.device)[0])
    system.put(system.network)
    loop_seconds, network_seconds = sorted(loops)[len(loops) // 2]
    return Row(
        size=size,
        system=system.name,
        batch=batch,
        parameters=system.parameters,
        calls=system.calls,
        flops=system.flops(batch),
        total_seconds=statistics.median(totals),
        network_seconds=network_seconds,
        loop_seconds=loop_seconds,
        codec_seconds=statistics.median(decodings),
        total_runs=totals,
        peak_bytes=peak,
    )
