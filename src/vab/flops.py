"""Floating-point operations of the backbone, counted from its sizes.

Counted are matrix products (2 for each weight, position and row) and attention. Norms, GELU and embedding look-ups are
left out, as is usual in the literature. Padding counts, because it is computed.
"""

from __future__ import annotations

from typing import Any

from vab.spec import SegmentSpec


def pass_flops(
    spec: SegmentSpec,
    arguments: dict[str, Any],
    rows: int,
    *,
    visual: bool = True,
    audio: bool = True,
    joint: bool = True,
) -> int:
    """Count the operations of one forward pass.

    Args:
        spec: Sizes of a segment.
        arguments: Of `Backbone`: its ``init_args``.
        rows: B, twice that with guidance.
        visual: Whether the positions include frames.
        audio: Whether the positions include codec steps.
        joint: Whether the joint blocks and the heads are run, as in `Backbone.forward`.
    """
    inputs = sum(_inputs(spec, arguments, visual, audio, joint))
    return 2 * rows * (_blocks(spec, arguments, visual, audio, joint) + inputs)


def step_flops(
    spec: SegmentSpec,
    arguments: dict[str, Any],
    rows: int,
    *,
    visual: bool = True,
    audio: bool = True,
    joint: bool = True,
) -> int:
    """Count the operations of a training step: forward and backward. Arguments as in `pass_flops`.

    Backward is twice forward, except at the input layers, whose inputs need no gradient.
    """
    forward = pass_flops(spec, arguments, rows, visual=visual, audio=audio, joint=joint)
    frames, steps, hidden = _inputs(spec, arguments, visual, audio, joint)
    # The joint pass hides codes; their learned MASK vectors are an input of the codec steps and do need a gradient.
    return 3 * forward - 2 * rows * (frames + hidden + (0 if joint else steps))


def _blocks(spec: SegmentSpec, arguments: dict[str, Any], visual: bool, audio: bool, joint: bool) -> int:
    """Multiplications for one row in the blocks and the heads."""
    dim = arguments["dim"]
    positions = spec.num_frames * visual + spec.num_steps * audio
    layers = arguments["num_modality_layers"] + arguments["num_joint_layers"] * joint
    # Each position uses the attention's four matrices and one feed-forward network, in both kinds of block.
    block = positions * (4 + 2 * arguments["feedforward_ratio"]) * dim * dim + 2 * positions * positions * dim
    heads = spec.num_steps * spec.num_codebooks * spec.codebook_size * dim * joint
    return layers * block + heads


def _inputs(
    spec: SegmentSpec, arguments: dict[str, Any], visual: bool, audio: bool, joint: bool
) -> tuple[int, int, int]:
    """Multiplications for one row before the blocks: of frames, codec steps, and vectors of hidden codes."""
    frames = spec.num_frames * spec.feature_dim * arguments["dim"] * visual
    steps = spec.num_steps * spec.code_dim * arguments["dim"] * audio
    hidden = spec.num_steps * spec.num_codebooks * spec.code_dim * (audio and joint)
    return frames, steps, hidden
