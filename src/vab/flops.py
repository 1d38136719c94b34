"""How much there is to compute: floating-point operations of the backbone, counted from its sizes.

2 for each weight, position and row that a matrix product multiplies, and attention; norms, GELU and looking up are left
out, as everywhere in the literature. Padding counts: shapes are static, and it is computed.
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
    """Of one pass through the network.

    Args:
        spec: Of the segment.
        arguments: Of `Backbone`, such as its ``init_args``.
        rows: B, twice that with guidance.
        visual: Whether frames are among the positions.
        audio: Whether codec steps are.
        joint: Whether the joint blocks and the heads are passed through, as in `Backbone.forward`.
    """
    return (
        2
        * rows
        * (_blocks(spec, arguments, visual, audio, joint) + sum(_inputs(spec, arguments, visual, audio, joint)))
    )


def step_flops(
    spec: SegmentSpec,
    arguments: dict[str, Any],
    rows: int,
    *,
    visual: bool = True,
    audio: bool = True,
    joint: bool = True,
) -> int:
    """Of a training step: forward, and backward to the weights and to what the weights were applied to.

    Backward is twice forward, but for the inputs, to whose own sources no gradient flows. Arguments as `pass_flops`.
    """
    forward = pass_flops(spec, arguments, rows, visual=visual, audio=audio, joint=joint)
    frames, steps, hidden = _inputs(spec, arguments, visual, audio, joint)
    # Steps have a source that is learned, the vectors of hidden codes, where codes are hidden: in the joint pass.
    return 3 * forward - 2 * rows * (frames + hidden + (0 if joint else steps))


def _blocks(spec: SegmentSpec, arguments: dict[str, Any], visual: bool, audio: bool, joint: bool) -> int:
    """Multiplications of a row in the blocks and the heads."""
    dim = arguments["dim"]
    positions = spec.num_frames * visual + spec.num_steps * audio
    layers = arguments["num_modality_layers"] + arguments["num_joint_layers"] * joint
    # A position passes through the attention's four matrices and one feed-forward network, in either kind of block.
    block = positions * (4 + 2 * arguments["feedforward_ratio"]) * dim * dim + 2 * positions * positions * dim
    heads = spec.num_steps * spec.num_codebooks * spec.codebook_size * dim * joint
    return layers * block + heads


def _inputs(
    spec: SegmentSpec, arguments: dict[str, Any], visual: bool, audio: bool, joint: bool
) -> tuple[int, int, int]:
    """Multiplications of a row before the blocks: of frames, of codec steps, of the vectors of hidden codes."""
    frames = spec.num_frames * spec.feature_dim * arguments["dim"] * visual
    steps = spec.num_steps * spec.code_dim * arguments["dim"] * audio
    hidden = spec.num_steps * spec.num_codebooks * spec.code_dim * (audio and joint)
    return frames, steps, hidden
