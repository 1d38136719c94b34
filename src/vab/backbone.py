"""The network that vab trains: a multiway transformer over video features and audio tokens.

    features (B, V, C) -- linear --------------------------+
                                                           +-> N1 modality blocks -> N2 joint blocks -> K heads
    codes (B, K, T) -- frozen codebooks, summed, linear ---+        |                                   (B, K, T, S)
                                                                    +-> `encode`, for alignment and classification

A sequence has P = V + T positions: first the frames, then the codec steps. In a modality block all positions share the
self-attention, then each modality passes through its own feed-forward network: two slices, no masks. A joint block has
one feed-forward network for all positions.

Source: VAB, Su et al. 2024, figure 2; the authors' follow-up code (pre-norm, no biases, codebooks as input, heads).
Multiway blocks: VLMo, Bao et al. 2022; BEiT-3, Wang et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from vab.spec import SegmentSpec, UserError

Positions = Literal["rotary", "alibi"]

_INIT_STD = 0.02  # as GPT-2; the paper does not print its initialisation
_FREQUENCY_BASE = 10_000.0  # positions per radian of the slowest channels, as Vaswani et al. and RoFormer


class _LayerNorm(nn.LayerNorm):
    """Normalises in the dtype of its input if its weights are narrower, as those of a sharded network can be.

    Under autocast torch does this on GPUs alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps)


class Attention(nn.Module):
    """Self-attention over all positions. It normalises its input; the caller adds the residual."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = _LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rotary: Tensor | None, attn_mask: Tensor | None) -> Tensor:
        """(B, P, D) to (B, P, D). `Backbone._rotary_and_mask` returns the other two arguments."""
        qkv = self.qkv(self.norm(x))
        if rotary is not None:
            qkv = rotate_queries_and_keys(qkv, rotary, self.num_heads)
        # Not one rearrange to "three B H P d": its gradient would have another layout than qkv and be copied.
        q, k, v = (part.transpose(1, 2) for part in _split_heads(qkv, self.num_heads).unbind(2))  # (B, H, P, D / H)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out(rearrange(attended, "B H P d -> B P (H d)"))


class FeedForward(nn.Module):
    """A network of two layers for each position. It normalises its input; the caller adds the residual."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm = _LayerNorm(dim)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, D) to (B, P, D)."""
        return self.down(F.gelu(self.up(self.norm(x))))


class ModalityBlock(nn.Module):
    """Shared attention, then one expert per modality.

    Each expert has its own norm, as in VLMo, because the modalities differ in scale. Dropout applies to the residual
    branches, not to the attention probabilities, so that the fast attention kernels stay usable.
    """

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads)
        self.visual = FeedForward(dim, hidden_dim)
        self.audio = FeedForward(dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, num_visual: int, rotary: Tensor | None, attn_mask: Tensor | None) -> Tensor:
        """(B, P, D) to (B, P, D). The first ``num_visual`` of the P positions are visual: 0 to P."""
        x = x + self.dropout(self.attention(x, rotary, attn_mask))
        if num_visual == 0:
            return x + self.dropout(self.audio(x))
        if num_visual == x.shape[1]:
            return x + self.dropout(self.visual(x))
        visual, audio = x.split([num_visual, x.shape[1] - num_visual], dim=1)
        return x + self.dropout(torch.cat([self.visual(visual), self.audio(audio)], dim=1))


class JointBlock(nn.Module):
    """Attention, then one feed-forward network for all positions."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads)
        self.feedforward = FeedForward(dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotary: Tensor | None, attn_mask: Tensor | None) -> Tensor:
        """(B, P, D) to (B, P, D)."""
        x = x + self.dropout(self.attention(x, rotary, attn_mask))
        return x + self.dropout(self.feedforward(x))


class Backbone(nn.Module):
    """Predicts hidden audio tokens from the visible ones and the video. Its first blocks encode either modality.

    Names and shapes of the parameters do not depend on the segment's length: weights trained on 10 s load into a
    network for 1 s. ``module.compile()`` works in place: shapes are static, no branch depends on data, and the
    parameters keep their names.

    Args:
        spec: The numbers of the shards, also as a dict, which is how configurations and checkpoints store them.
        dim: D, width of the network.
        num_heads: H, attention heads; divides ``dim``.
        num_modality_layers: N1, blocks with one expert per modality.
        num_joint_layers: N2, blocks with one feed-forward network. 0 if only `encode` is used.
        feedforward_ratio: Width of the feed-forward networks as a multiple of ``dim``.
        dropout: Dropout of each residual branch.
        positions: ``rotary`` rotates queries and keys by time in seconds, on one time axis for frames and codec steps.
            ``alibi`` is the paper's: sines and cosines are added to the inputs, and attention scores fall with the
            distance between positions, which does not tell a codec step which frame it belongs to.
        activation_checkpointing: In training, keep only the input of each block and recompute its activations, with
            the same dropout, in the backward pass: less memory, about a third more time, the same gradient.

    Raises:
        UserError: If the sizes do not fit together.

    Source: defaults as VAB's "large", Su et al. 2024, and the authors' follow-up code; rotary positions: RoFormer,
    Su et al. 2021, here in seconds; ALiBi: Press et al. 2022, made symmetric.
    """

    codebooks: Tensor  # (K, S, code_dim)
    rotary: Tensor  # (2, P, D / H / 2): cosines, sines
    alibi: Tensor  # (H, P, P)
    sinusoid: Tensor  # (P, D)

    def __init__(
        self,
        spec: SegmentSpec | dict[str, Any],
        dim: int = 1024,
        num_heads: int = 16,
        num_modality_layers: int = 12,
        num_joint_layers: int = 12,
        feedforward_ratio: int = 4,
        dropout: float = 0.1,
        positions: Positions = "rotary",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.spec = spec = SegmentSpec.from_dict(spec) if isinstance(spec, dict) else spec
        if positions not in get_args(Positions):
            raise UserError(f"backbone: positions must be one of {', '.join(get_args(Positions))}, got {positions!r}")
        if min(dim, num_heads, num_modality_layers, feedforward_ratio) < 1 or num_joint_layers < 0:
            raise UserError("backbone: dim, num_heads, num_modality_layers and feedforward_ratio must be 1 or more")
        if dim % (2 * num_heads):
            raise UserError(f"backbone: dim must be a multiple of 2 x num_heads, got dim {dim}, num_heads {num_heads}")
        if not 0 <= dropout < 1:
            raise UserError(f"backbone: dropout must be in [0, 1), got {dropout}")
        self.init_args: dict[str, Any] = arguments | {"spec": spec.to_dict()}
        """The arguments that build this network, as plain JSON; checkpoints store them."""
        self.dim = dim
        self.activation_checkpointing = activation_checkpointing
        self.positions = positions

        self.register_buffer("codebooks", torch.zeros(spec.num_codebooks, spec.codebook_size, spec.code_dim))
        self.has_codebooks = False
        self.mask_code = nn.Parameter(torch.empty(spec.num_codebooks, spec.code_dim))
        self.audio_input = nn.Linear(spec.code_dim, dim)
        self.visual_input = nn.Linear(spec.feature_dim, dim)
        self.modality = nn.Parameter(torch.empty(2, dim))  # visual, audio

        hidden_dim = feedforward_ratio * dim
        self.modality_blocks = nn.ModuleList(
            ModalityBlock(dim, num_heads, hidden_dim, dropout) for _ in range(num_modality_layers)
        )
        self.modality_norm = nn.LayerNorm(dim)
        self.joint_blocks = nn.ModuleList(
            JointBlock(dim, num_heads, hidden_dim, dropout) for _ in range(num_joint_layers)
        )
        self.joint_norm = nn.LayerNorm(dim)
        self.heads = nn.Parameter(torch.empty(spec.num_codebooks, spec.codebook_size, dim))

        frame_seconds = (torch.arange(spec.num_frames, dtype=torch.float64) + 0.5) / spec.video_fps
        step_seconds = (torch.arange(spec.num_steps, dtype=torch.float64) + 0.5) / spec.code_rate
        if positions == "rotary":
            angles = rotary_angles(torch.cat([frame_seconds, step_seconds]), spec.code_rate, dim // num_heads)
            self.register_buffer("rotary", torch.stack([angles.cos(), angles.sin()]).float(), persistent=False)
        else:
            alibi = symmetric_alibi(spec.num_frames + spec.num_steps, num_heads)
            sinusoid = torch.cat([sincos_table(spec.num_frames, dim), sincos_table(spec.num_steps, dim)])
            self.register_buffer("alibi", alibi, persistent=False)
            self.register_buffer("sinusoid", sinusoid, persistent=False)

        self._init_weights()
        self.register_load_state_dict_post_hook(_note_loaded_codebooks)

    def set_codebooks(self, codebooks: Tensor) -> None:
        """Set the codec's vectors, once, before the first step. Loading a checkpoint sets them too.

        Args:
            codebooks: (K, S, code_dim) float: the vectors whose sum over levels the codec's decoder reads.

        Raises:
            UserError: If the shape does not fit the spec, or the values are not finite or all zero.
        """
        if codebooks.shape != self.codebooks.shape:
            raise UserError(
                f"codebooks of shape {tuple(codebooks.shape)}, expected {tuple(self.codebooks.shape)} "
                f"(levels, entries, width) of codec {self.spec.codec!r}"
            )
        if not (codebooks.isfinite().all() and codebooks.any()):
            raise UserError("codebooks must be finite and not all zero")
        self.codebooks.copy_(codebooks)
        self.has_codebooks = True

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order in which they are used."""
        return [*self.modality_blocks, *(self.joint_blocks or [])]

    def drop_joint_part(self) -> None:
        """Delete the weights that only `forward` uses, for tasks that read the output of the modality blocks."""
        for name in ("joint_blocks", "joint_norm", "heads", "mask_code"):
            setattr(self, name, None)

    def freeze_modality(self, name: Literal["visual", "audio"]) -> None:
        """Freeze the weights that only one modality uses, for tasks without it: DDP waits for every gradient."""
        for module in (getattr(self, f"{name}_input"), *(getattr(block, name) for block in self.modality_blocks)):
            module.requires_grad_(False)

    def forward(self, codes: Tensor, features: Tensor, mask: Tensor | None = None, **options: Tensor | None) -> Tensor:
        """(B, K, T, S) float logits. They mean nothing at visible codes and at padding. Arguments as for `trunk`."""
        return self.score(self.trunk(codes, features, mask, **options))

    def score(self, x: Tensor) -> Tensor:
        """The K heads: (B, T, D) from `trunk` to (B, K, T, S) logits."""
        return einsum(x, self.heads, "B T D, K S D -> B K T S")

    def trunk(
        self,
        codes: Tensor,
        features: Tensor,
        mask: Tensor | None = None,
        *,
        drop_features: Tensor | None = None,
        steps: Tensor | None = None,
        frames: Tensor | None = None,
    ) -> Tensor:
        """The input of the heads.

        Args:
            codes: (B, K, T) int64 in [0, S). Not read where ``mask`` is True.
            features: (B, V, C) float.
            mask: (B, K, T) bool, True = hidden; None if nothing is hidden.
            drop_features: (B,) bool, True = ignore the record's video; None to use every video.
            steps: (B,) int64 in [1, T]: the codec steps of each record before its padding. None if no record is
                shorter than the segment, which is faster.
            frames: (B,) int64 in [0, V]: the same for frames; 0 for a record without video.

        Returns:
            (B, T, D) float.
        """
        visual = self.embed_features(features, drop_features)
        audio = self.embed_codes(codes, mask)
        rotary, attn_mask = self._rotary_and_mask(slice(None), frames, steps)
        x = self._modality_stack(torch.cat([visual, audio], dim=1), self.spec.num_frames, rotary, attn_mask)
        for block in self.joint_blocks:
            x = self._run_block(block, x, rotary, attn_mask)
        normed: Tensor = self.joint_norm(x[:, self.spec.num_frames :])
        return normed

    def encode(
        self,
        codes: Tensor | None = None,
        features: Tensor | None = None,
        *,
        steps: Tensor | None = None,
        frames: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The output of the modality blocks, for alignment and classification. No code is hidden.

        Two modalities attend to each other. A single one passes through the same attention and its own expert.

        Args:
            codes: (B, K, T) int64 in [0, S), or None.
            features: (B, V, C) float, or None.
            steps: As for `trunk`.
            frames: As for `trunk`.

        Returns:
            Visual (B, V, D) and audio (B, T, D), each None if its input was None. Values at padding mean nothing.
        """
        visual = None if features is None else self.embed_features(features)
        audio = None if codes is None else self.embed_codes(codes)
        return self.encode_inputs(visual, audio, steps=steps, frames=frames)

    def encode_inputs(
        self,
        visual: Tensor | None,
        audio: Tensor | None,
        *,
        steps: Tensor | None = None,
        frames: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """`encode` for embedded inputs: visual (B, V, D), audio (B, T, D), or both."""
        given = [x for x in (visual, audio) if x is not None]
        if not given:
            raise ValueError("encode needs codes, features or both")
        num_visual = 0 if visual is None else self.spec.num_frames
        start = self.spec.num_frames - num_visual
        end = self.spec.num_frames + (0 if audio is None else self.spec.num_steps)
        rotary, attn_mask = self._rotary_and_mask(slice(start, end), frames, steps)
        x = self._modality_stack(torch.cat(given, dim=1), num_visual, rotary, attn_mask)
        return None if visual is None else x[:, :num_visual], None if audio is None else x[:, num_visual:]

    def embed_features(self, features: Tensor, drop_features: Tensor | None = None) -> Tensor:
        """The visual inputs of the first block: (B, V, C) float to (B, V, D). Arguments as for `trunk`."""
        _check_shape("features", features, (self.spec.num_frames, self.spec.feature_dim))
        x = self.visual_input(features.to(self.visual_input.weight.dtype))
        if drop_features is not None:
            x = x.masked_fill(drop_features[:, None, None], 0.0)
        x = x + self.modality[0]
        return x if self.positions == "rotary" else x + self.sinusoid[: self.spec.num_frames]

    def embed_codes(self, codes: Tensor, mask: Tensor | None = None) -> Tensor:
        """The audio inputs of the first block: (B, K, T) int64 to (B, T, D). Arguments as for `trunk`."""
        _check_shape("codes", codes, (self.spec.num_codebooks, self.spec.num_steps))
        if not self.has_codebooks:
            raise RuntimeError("the backbone has no codebooks: call set_codebooks or load a checkpoint first")
        num_codebooks, codebook_size, _ = self.codebooks.shape
        codebooks = self.codebooks.to(self.modality.dtype)
        visible = hidden = None
        if mask is not None:
            codes = codes.masked_fill(mask, 0)  # a hidden code may be no index at all
            hidden = rearrange(mask, "B K T -> (B T) K").to(codebooks.dtype)  # 0 and 1
            visible = 1 - hidden
        level = torch.arange(num_codebooks, device=codes.device)
        rows = rearrange(codes + level[:, None] * codebook_size, "B K T -> (B T) K")  # in [0, K * S)
        table = rearrange(codebooks, "K S d -> (K S) d")
        x = F.embedding_bag(rows, table, mode="sum", per_sample_weights=visible)  # the sum over levels
        x = x if hidden is None else x + hidden @ self.mask_code  # a learned vector for each hidden level
        x = rearrange(x, "(B T) d -> B T d", B=len(codes))
        x = self.audio_input(x) + self.modality[1]
        return x if self.positions == "rotary" else x + self.sinusoid[self.spec.num_frames :]

    def _modality_stack(self, x: Tensor, num_visual: int, rotary: Tensor | None, attn_mask: Tensor | None) -> Tensor:
        for block in self.modality_blocks:
            x = self._run_block(block, x, num_visual, rotary, attn_mask)
        return self.modality_norm(x)

    def _run_block(self, block: nn.Module, *inputs: Any) -> Tensor:
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        x: Tensor = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return x

    def _rotary_and_mask(
        self, span: slice, frames: Tensor | None, steps: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The rotary table and the attention mask of a span of the positions; None where there is none.

        The mask broadcasts with (B, H, P, P). It is bool, True = attend, or a float that is added to the scores. The
        float mask is cast and its rows are aligned once, here: otherwise attention on GPUs would do both in each block
        and keep each copy for the gradient.
        """
        rotary = self.rotary[:, span] if self.positions == "rotary" else None
        bias, num_keys = None, None
        if self.positions == "alibi":
            bias = self.alibi[None, :, span, span]  # (1, H, P, P)
            device, num_keys = bias.device.type, bias.shape[-1]
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else bias.dtype
            bias = _with_aligned_rows(bias.to(dtype))
        lengths = steps if frames is None else frames
        if lengths is None:
            return rotary, None if bias is None else bias[..., :num_keys]  # without a mask attention is fastest
        has_content = []
        for length, size in ((frames, self.spec.num_frames), (steps, self.spec.num_steps)):
            end = torch.full_like(lengths, size) if length is None else length
            has_content.append(torch.arange(size, device=lengths.device) < end[:, None])
        keys = torch.cat(has_content, dim=1)[:, None, None, span]  # (B, 1, 1, P): no position attends to padding
        if bias is None:
            return rotary, keys
        return rotary, bias.masked_fill(~_with_aligned_rows(keys), -torch.inf)[..., :num_keys]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """Move or convert the network, but keep the codebooks and the rotary table in float32.

        bfloat16 resolves an angle near 1 to 1 / 256, and a checkpoint would store other codebooks than the codec's.
        """
        kept = {name: tensor for name, tensor in self._buffers.items() if name in ("codebooks", "rotary")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def _init_weights(self) -> None:
        """Normal of std 0.02; output layers of residual branches over the root of the number of branches (GPT-2)."""
        num_layers = len(self.modality_blocks) + len(self.joint_blocks)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, (Attention, FeedForward)):
                output = module.out if isinstance(module, Attention) else module.down
                nn.init.normal_(output.weight, std=_INIT_STD / math.sqrt(2 * num_layers))
        for parameter in (self.mask_code, self.modality, self.heads):
            nn.init.normal_(parameter, std=_INIT_STD)


def rotary_angles(seconds: Tensor, code_rate: float, head_dim: int) -> Tensor:
    """The rotation of each pair of channels at each position: (P,) seconds to (P, head_dim / 2) radians, float64.

    Time is counted in codec steps: the fastest pair rotates by one radian per step, as RoFormer's does per word.
    """
    frequency = _FREQUENCY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (seconds * code_rate)[:, None] * frequency


def rotate_queries_and_keys(qkv: Tensor, rotary: Tensor, num_heads: int) -> Tensor:
    """Rotate the channel pairs (2 i, 2 i + 1) of queries and keys by the angles of their position, in float32.

    The product of two rotated vectors depends on the difference of their angles: on the time between them.

    Args:
        qkv: (B, P, 3 * D) float: queries, keys, values. It may be overwritten.
        rotary: (2, P, D / H / 2) float: cosines and sines of the angles.
        num_heads: H.

    Returns:
        (B, P, 3 * D) of the dtype of ``qkv``.
    """
    if not torch.compiler.is_compiling():
        rotated: Tensor = _RotateInPlace.apply(qkv, torch.complex(*rotary[:, :, None, None].float()), num_heads)
        return rotated
    cos, sin = rotary[:, :, None, None].float()  # (P, 1, 1, D / H / 2) each
    qk, v = _split_heads(qkv, num_heads).split((2, 1), dim=2)
    a, b = rearrange(qk.float(), "B P A H (pair two) -> two B P A H pair", two=2)  # compilers fuse real arithmetic only
    qk = rearrange([a * cos - b * sin, a * sin + b * cos], "two B P A H pair -> B P A H (pair two)").type_as(qkv)
    return rearrange(torch.cat([qk, v], dim=2), "B P three H d -> B P (three H d)")


class _RotateInPlace(torch.autograd.Function):
    """One complex product, and no copy: autograd's own rule would copy the whole gradient three times per block."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotary: Tensor, num_heads: int) -> Tensor:
        qk = _split_heads(qkv, num_heads)[:, :, :2]
        _rotate_pairs(qk, rotary, qk)
        ctx.save_for_backward(rotary)
        ctx.num_heads = num_heads
        ctx.mark_dirty(qkv)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rotary,) = ctx.saved_tensors
        grad_qkv = torch.empty_like(grad, memory_format=torch.contiguous_format)
        source, target = _split_heads(grad, ctx.num_heads), _split_heads(grad_qkv, ctx.num_heads)
        _rotate_pairs(source[:, :, :2], rotary.conj(), target[:, :, :2])
        target[:, :, 2] = source[:, :, 2]
        return grad_qkv, None, None


def _split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """(B, P, 3 * D) as (B, P, 3, H, D / H), always over the same memory, which ``rearrange`` does not promise."""
    return qkv.unflatten(-1, (3, num_heads, -1))


def _rotate_pairs(x: Tensor, rotary: Tensor, out: Tensor) -> None:
    """Write the products of x's channel pairs and complex64 numbers to ``out``, which may be x. x: (..., head_dim)."""
    if x.dtype == torch.float32:
        torch.mul(_as_complex(x), rotary, out=_as_complex(out))
    else:  # other dtypes have no complex products; values, a third of the tensor, are not copied
        out.copy_(torch.view_as_real(_as_complex(x.float()).mul_(rotary)).flatten(-2))


def _as_complex(x: Tensor) -> Tensor:
    """(..., head_dim) float32 as (..., head_dim / 2) complex, over the same memory."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _with_aligned_rows(mask: Tensor) -> Tensor:
    """(..., P) with zeros behind each row, up to the multiple of 8 elements that attention on GPUs reads at once."""
    return F.pad(mask, (0, -mask.shape[-1] % 8))


def symmetric_alibi(num_positions: int, num_heads: int) -> Tensor:
    """ALiBi for attention in both directions: (H, P, P) of -slope |i - j|, slopes 2^(-8 h / H) for h = 1..H."""
    position = torch.arange(num_positions)
    distance = (position[:, None] - position).abs()  # (P, P)
    slopes = torch.tensor([2.0 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)])
    return -slopes[:, None, None] * distance


def sincos_table(num_positions: int, dim: int) -> Tensor:
    """Position embeddings: (P, dim) of sines, then cosines (Vaswani et al. 2017, section 3.5; order as in MAE)."""
    frequency = _FREQUENCY_BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, int]) -> None:
    if tensor.dim() != 3 or tensor.shape[1:] != expected:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)}, expected (batch, {expected[0]}, {expected[1]})")


def _note_loaded_codebooks(backbone: Backbone, _: Any) -> None:
    """After loading weights, record whether they hold codebooks. Reading the answer waits for the device: only once."""
    backbone.has_codebooks = bool(backbone.codebooks.any())
