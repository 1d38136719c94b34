"""The one trained network: a multiway transformer over video features and audio tokens, whole, in this file.

    features (B, V, C) -- linear --------------------------+
                                                           +-> N1 modality blocks -> N2 joint blocks -> K heads
    codes (B, K, T) -- frozen codebooks, summed, linear ---+        |                                   (B, K, T, S)
                                                                    +-> `encode`, for alignment and classification

Positions are [visual ; audio]: V frames, then T codec steps. In a modality block both share the self-attention, then
each has a feed-forward network of its own: two slices, no masks. In a joint block one feed-forward network serves all.

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

_INIT_STD = 0.02  # GPT-2's; the paper prints no initialisation
_LONGEST = 10_000.0  # positions per radian of the slowest channels: Vaswani et al.'s, and RoFormer's


class Attention(nn.Module):
    """Every position looks at every other. Normalises its input; the caller adds the result to it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, turn: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """(B, P, D) to (B, P, D). Both arguments as `Backbone._positions` gives them."""
        qkv = self.qkv(self.norm(x))  # (B, P, 3 * D)
        if turn is not None:
            qkv = turn_queries_and_keys(qkv, turn, self.num_heads)
        q, k, v = rearrange(qkv, "B P (three H d) -> three B H P d", three=3, H=self.num_heads)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.out(rearrange(attended, "B H P d -> B P (H d)"))


class FeedForward(nn.Module):
    """Every position by itself. Normalises its input; the caller adds the result to it."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, D) to (B, P, D)."""
        return self.down(F.gelu(self.up(self.norm(x))))


class ModalityBlock(nn.Module):
    """Shared attention, then an expert for each modality. Each expert has its own norm (VLMo): the two differ in scale.

    Dropout falls on what a block adds, not on the attention's probabilities: the fast kernels stay usable.
    """

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads)
        self.visual = FeedForward(dim, hidden_dim)
        self.audio = FeedForward(dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, num_visual: int, turn: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """(B, P, D) to (B, P, D); the first ``num_visual`` positions are visual, which may be none or all."""
        x = x + self.dropout(self.attention(x, turn, attention_mask))
        if num_visual == 0:
            return x + self.dropout(self.audio(x))
        if num_visual == x.shape[1]:
            return x + self.dropout(self.visual(x))
        visual, audio = x.split([num_visual, x.shape[1] - num_visual], dim=1)
        return x + self.dropout(torch.cat([self.visual(visual), self.audio(audio)], dim=1))


class JointBlock(nn.Module):
    """Shared attention, then one feed-forward network for all positions."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads)
        self.feedforward = FeedForward(dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, turn: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """(B, P, D) to (B, P, D)."""
        x = x + self.dropout(self.attention(x, turn, attention_mask))
        return x + self.dropout(self.feedforward(x))


class Backbone(nn.Module):
    """Guesses hidden audio tokens from the visible ones and the video; its first layers encode either modality.

    Parameter names and shapes do not depend on the segment's length: weights trained on 10 s load into a network for
    1 s. ``module.compile()`` works in place: no branch depends on data, shapes are static, names of weights stay.

    Args:
        spec: The numbers of the shards; a dict of them is accepted, as configurations and checkpoints carry.
        dim: D, width of the network.
        num_heads: H, attention heads; divides ``dim``.
        num_modality_layers: N1, blocks with an expert for each modality.
        num_joint_layers: N2, blocks with one feed-forward network. 0 where only `encode` is used.
        feedforward_ratio: Width of the feed-forward networks over ``dim``.
        dropout: On what each block adds to the stream.
        positions: ``rotary`` turns queries and keys by time in seconds, on one axis for frames and codec steps.
            ``alibi`` is the paper's: sines and cosines added to the inputs and a penalty on distance in [visual ;
            audio], which does not tell a step which frame is its own.
        activation_checkpointing: In training keep only what enters each block, and make the rest again for the
            gradient, dropout as it was: less memory, about a third more time, the same gradient.

    Raises:
        UserError: If the sizes do not fit together.

    Source: defaults as VAB's "large", Su et al. 2024, and the authors' follow-up code; rotary positions: RoFormer,
    Su et al. 2021, here in seconds; ALiBi: Press et al. 2022, made symmetric.
    """

    codebooks: Tensor
    turn: Tensor  # (2, V + T, D / H / 2): cosines, sines
    alibi: Tensor  # (H, V + T, V + T)
    sinusoid: Tensor  # (V + T, D)

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
        self.spec = spec = SegmentSpec.from_dict(spec) if isinstance(spec, dict) else spec
        if positions not in get_args(Positions):
            raise UserError(f"backbone: positions must be one of {', '.join(get_args(Positions))}, got {positions!r}")
        if min(dim, num_heads, num_modality_layers, feedforward_ratio) < 1 or num_joint_layers < 0:
            raise UserError("backbone: dim, num_heads, num_modality_layers and feedforward_ratio must be 1 or more")
        if dim % (2 * num_heads):
            raise UserError(f"backbone: dim must be a multiple of 2 x num_heads, got dim {dim}, num_heads {num_heads}")
        if not 0 <= dropout < 1:
            raise UserError(f"backbone: dropout must be in [0, 1), got {dropout}")
        self.init_args: dict[str, Any] = {
            "spec": spec.to_dict(),
            "dim": dim,
            "num_heads": num_heads,
            "num_modality_layers": num_modality_layers,
            "num_joint_layers": num_joint_layers,
            "feedforward_ratio": feedforward_ratio,
            "dropout": dropout,
            "positions": positions,
            "activation_checkpointing": activation_checkpointing,
        }
        """The arguments that make this network again, as JSON; checkpoints carry them."""
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
            self.register_buffer("turn", torch.stack([angles.cos(), angles.sin()]).float(), persistent=False)
        else:
            alibi = symmetric_alibi(spec.num_frames + spec.num_steps, num_heads)
            sinusoid = torch.cat([sincos_table(spec.num_frames, dim), sincos_table(spec.num_steps, dim)])
            self.register_buffer("alibi", alibi, persistent=False)
            self.register_buffer("sinusoid", sinusoid, persistent=False)

        self._init_weights()
        self.register_load_state_dict_post_hook(_note_loaded_codebooks)

    def set_codebooks(self, codebooks: Tensor) -> None:
        """Give the codec's vectors, once, before the first step; a checkpoint brings its own.

        Args:
            codebooks: (K, S, code_dim) float: the vectors whose sum over levels the codec's decoder reads.

        Raises:
            UserError: If they belong to a codec of another shape, or are empty.
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
        """Its large parts in the order in which they are used."""
        return [*self.modality_blocks, *(self.joint_blocks or [])]

    def drop_joint_part(self) -> None:
        """Leave out what only `forward` needs, for tasks that end with the modality blocks: they have less to carry."""
        for name in ("joint_blocks", "joint_norm", "heads", "mask_code"):
            setattr(self, name, None)

    def freeze_modality(self, name: Literal["visual", "audio"]) -> None:
        """Train nothing of what one modality alone uses, for tasks that never see it: DDP waits for every gradient."""
        for module in (getattr(self, f"{name}_input"), *(getattr(block, name) for block in self.modality_blocks)):
            module.requires_grad_(False)

    def forward(
        self,
        codes: Tensor,
        features: Tensor,
        mask: Tensor | None = None,
        *,
        drop_features: Tensor | None = None,
        steps: Tensor | None = None,
        frames: Tensor | None = None,
    ) -> Tensor:
        """Score every code of every step.

        Args:
            codes: (B, K, T) int64 in [0, S). Unread where ``mask`` is True.
            features: (B, V, C) float.
            mask: (B, K, T) bool, True = hidden; None if nothing is.
            drop_features: (B,) bool. Records whose video is withheld; None for none.
            steps: (B,) int64 in [1, T]. Steps from there on are padding; None if no record is shorter than the
                segment, which is faster.
            frames: (B,) int64 in [0, V], as ``steps``; 0 for a record that has no video.

        Returns:
            (B, K, T, S) float logits, also at visible codes and at padding, where they mean nothing.
        """
        return self.score(self.trunk(codes, features, mask, drop_features=drop_features, steps=steps, frames=frames))

    def score(self, x: Tensor) -> Tensor:
        """(B, T, D) of `trunk` to (B, K, T, S) logits."""
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
        """(B, T, D): what the heads read, from what `forward` takes."""
        visual = self.embed_features(features, drop_features)
        audio = self.embed_codes(codes, mask)
        turn, attention_mask = self._positions(slice(None), frames, steps)
        x = self._modality_stack(torch.cat([visual, audio], dim=1), visual.shape[1], turn, attention_mask)
        for block in self.joint_blocks:
            x = self._through(block, x, turn, attention_mask)
        normed: Tensor = self.joint_norm(x[:, visual.shape[1] :])
        return normed

    def encode(
        self,
        codes: Tensor | None = None,
        features: Tensor | None = None,
        *,
        steps: Tensor | None = None,
        frames: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The output of the modality blocks, for alignment and classification. Nothing is hidden.

        Given both modalities, each sees the other; given one, it passes through the same attention and its own expert.

        Args:
            codes: (B, K, T) int64 in [0, S), or None.
            features: (B, V, C) float, or None.
            steps: As in `forward`.
            frames: As in `forward`.

        Returns:
            Visual (B, V, D) and audio (B, T, D), each None where its input was None. Padding holds anything.
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
        """`encode` from the inputs of the first block: visual (B, V, D) and audio (B, T, D), either of them or both."""
        given = [x for x in (visual, audio) if x is not None]
        if not given:
            raise ValueError("encode needs codes, features or both")
        num_visual = 0 if visual is None else self.spec.num_frames
        start = self.spec.num_frames - num_visual
        end = self.spec.num_frames + (0 if audio is None else self.spec.num_steps)
        turn, attention_mask = self._positions(slice(start, end), frames, steps)
        x = self._modality_stack(torch.cat(given, dim=1), num_visual, turn, attention_mask)
        return None if visual is None else x[:, :num_visual], None if audio is None else x[:, num_visual:]

    def embed_features(self, features: Tensor, drop_features: Tensor | None = None) -> Tensor:
        """(B, V, C) float to (B, V, D): the visual inputs of the first block. See `forward`."""
        _check_shape("features", features, (self.spec.num_frames, self.spec.feature_dim))
        x = self.visual_input(features.to(self.visual_input.weight.dtype))
        if drop_features is not None:
            x = x.masked_fill(drop_features[:, None, None], 0.0)
        x = x + self.modality[0]
        return x if self.positions == "rotary" else x + self.sinusoid[: self.spec.num_frames]

    def embed_codes(self, codes: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, K, T) int64 to (B, T, D): the audio inputs of the first block. See `forward`."""
        _check_shape("codes", codes, (self.spec.num_codebooks, self.spec.num_steps))
        if not self.has_codebooks:
            raise RuntimeError("the backbone has no codebooks: call set_codebooks or load a checkpoint first")
        num_codebooks, codebook_size, _ = self.codebooks.shape
        codebooks = self.codebooks.to(self.modality.dtype)
        visible = hidden = None
        if mask is not None:
            codes = codes.masked_fill(mask, 0)  # hidden codes must not be read, whatever stands there
            hidden = rearrange(mask, "B K T -> (B T) K").to(codebooks.dtype)  # 0 and 1
            visible = 1 - hidden
        level = torch.arange(num_codebooks, device=codes.device)
        rows = rearrange(codes + level[:, None] * codebook_size, "B K T -> (B T) K")  # in [0, K * S)
        table = rearrange(codebooks, "K S d -> (K S) d")
        x = F.embedding_bag(rows, table, mode="sum", per_sample_weights=visible)  # visible codes, summed over levels
        x = x if hidden is None else x + hidden @ self.mask_code  # and a learned row for each hidden level
        x = rearrange(x, "(B T) d -> B T d", B=len(codes))
        x = self.audio_input(x) + self.modality[1]
        return x if self.positions == "rotary" else x + self.sinusoid[self.spec.num_frames :]

    def _modality_stack(self, x: Tensor, num_visual: int, turn: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        for block in self.modality_blocks:
            x = self._through(block, x, num_visual, turn, attention_mask)
        return self.modality_norm(x)

    def _through(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            made_again: Tensor = checkpoint(block, *inputs, use_reentrant=False)
            return made_again
        x: Tensor = block(*inputs)
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """Move or convert the network; what positions and codes are made of stays float32, whatever the weights are.

        In bfloat16 an angle near 1 is known to 1 in 256, and a checkpoint would hold other codebooks than the codec's.
        """
        kept = {name: tensor for name, tensor in self._buffers.items() if name in ("codebooks", "turn")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def _positions(
        self, span: slice, frames: Tensor | None, steps: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What attention over a span of [visual ; audio] is told: the `rotate` turn and the mask, None for none.

        The mask broadcasts with (B, H, P, P): bool, True = look, or float, added to the scores.
        """
        turn = self.turn[:, span] if self.positions == "rotary" else None
        mask = self.alibi[None, :, span, span] if self.positions == "alibi" else None  # (1, H, P, P), added
        given = steps if frames is None else frames
        if given is None:
            return turn, mask  # rotary: no mask at all, so the fastest kernels apply
        is_sound = []
        for length, size in ((frames, self.spec.num_frames), (steps, self.spec.num_steps)):
            end = torch.full_like(given, size) if length is None else length
            is_sound.append(torch.arange(size, device=given.device) < end[:, None])
        keys = torch.cat(is_sound, dim=1)[:, None, None, span]  # (B, 1, 1, P): padding is not looked at
        return turn, keys if mask is None else mask.masked_fill(~keys, -torch.inf)

    def _init_weights(self) -> None:
        """Normal of 0.02; what is added to the stream smaller by the root of the number of additions (GPT-2)."""
        num_layers = len(self.modality_blocks) + len(self.joint_blocks)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, (Attention, FeedForward)):
                added = module.out if isinstance(module, Attention) else module.down
                nn.init.normal_(added.weight, std=_INIT_STD / math.sqrt(2 * num_layers))
        for parameter in (self.mask_code, self.modality, self.heads):
            nn.init.normal_(parameter, std=_INIT_STD)


def rotary_angles(seconds: Tensor, code_rate: float, head_dim: int) -> Tensor:
    """How far to turn each pair of channels at each position: (P,) seconds to (P, head_dim / 2) radians, float64.

    Time is counted in codec steps, so the fastest pair turns by one radian per step, as RoFormer's does per word.
    """
    frequency = _LONGEST ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (seconds * code_rate)[:, None] * frequency


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the pairs of channels (2 i, 2 i + 1) of (B, P, A, H, head_dim) by their position's angles.

    The product of two turned vectors depends on the difference of their angles: on how far apart in time they are.
    ``turn`` is (2, P, head_dim / 2): cosines and sines.
    """
    if not torch.compiler.is_compiling():  # one product of complex numbers instead of six of strided halves
        return torch.view_as_real(_as_complex(x.float()) * _angles(turn)).flatten(-2).type_as(x)
    cos, sin = turn[:, :, None, None].float()  # (P, 1, 1, head_dim / 2) each
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # a compiler fuses real arithmetic, and knows no complex numbers
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


def turn_queries_and_keys(qkv: Tensor, turn: Tensor, num_heads: int) -> Tensor:
    """`rotate` the first two thirds of (B, P, 3 * D), which may be written over: nothing is kept for the gradient."""
    if qkv.dtype == torch.float32 and not torch.compiler.is_compiling():
        turned: Tensor = _TurnInPlace.apply(qkv, _angles(turn), num_heads)
        return turned
    qk, v = _apart(qkv, num_heads).split((2, 1), dim=2)
    return torch.cat([rotate(qk, turn), v], dim=2).flatten(2)


class _TurnInPlace(torch.autograd.Function):
    """Autograd's own rule for a product in place of a part would copy the whole gradient three times a block."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, angles: Tensor, num_heads: int) -> Tensor:
        _as_complex(_apart(qkv, num_heads)[:, :, :2]).mul_(angles)
        ctx.save_for_backward(angles)
        ctx.num_heads = num_heads
        ctx.mark_dirty(qkv)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        back = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        given, turned = _apart(gradient, ctx.num_heads), _apart(back, ctx.num_heads)
        torch.mul(_as_complex(given[:, :, :2]), angles.conj(), out=_as_complex(turned[:, :, :2]))
        turned[:, :, 2] = given[:, :, 2]
        return back, None, None


def _apart(qkv: Tensor, num_heads: int) -> Tensor:
    """(B, P, 3 * D) as (B, P, 3, H, D / H)."""
    return qkv.unflatten(-1, (3, num_heads, -1))


def _as_complex(x: Tensor) -> Tensor:
    """(..., head_dim) float32 as (..., head_dim / 2) complex, over the same memory."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _angles(turn: Tensor) -> Tensor:
    """(2, P, head_dim / 2) cosines and sines as (P, 1, 1, head_dim / 2) complex numbers."""
    return torch.complex(*turn[:, :, None, None].float())


def symmetric_alibi(num_positions: int, num_heads: int) -> Tensor:
    """ALiBi for attention that looks both ways: (H, P, P) of -slope |i - j|, slopes 2^(-8 h / H) for h = 1..H."""
    position = torch.arange(num_positions)
    distance = (position[:, None] - position).abs()  # (P, P)
    slopes = torch.tensor([2.0 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)])
    return -slopes[:, None, None] * distance


def sincos_table(num_positions: int, dim: int) -> Tensor:
    """Positions to add to inputs: (P, dim) of sines, then cosines (Vaswani et al. 2017, section 3.5; MAE's order)."""
    frequency = _LONGEST ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, int]) -> None:
    if tensor.dim() != 3 or tensor.shape[1:] != expected:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)}, expected (batch, {expected[0]}, {expected[1]})")


def _note_loaded_codebooks(backbone: Backbone, _: Any) -> None:
    """After loading weights: is there more than zeros? Asked here, once, as the answer waits for the device."""
    backbone.has_codebooks = bool(backbone.codebooks.any())
