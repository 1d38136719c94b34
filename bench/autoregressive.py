"""The other way: an autoregressive decoder, one step of the network per codec step, as FoleyGen makes sound.

Transformers' MusicGen decoder with random weights: delay pattern, cached keys and values, the video's features as the
memory of its cross-attention, guidance by a second row per record.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import MusicgenForCausalLM
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

from vab.spec import SegmentSpec


class AutoregressiveTwin(nn.Module):
    """A decoder of the same width, depth, heads, levels and codebook size as a backbone, and what makes codes with it.

    A layer has self-attention, cross-attention and one feed-forward network: 16 D^2 weights, on average as many as the
    backbone's where N1 = N2.

    Source: delay pattern: MusicGen, Copet et al. 2023; for video: FoleyGen, Mei et al. 2024.
    """

    pattern: Tensor  # (K, T + K) int64: -1 where a code is to be made, S where the delay leaves none

    def __init__(self, spec: SegmentSpec, dim: int, num_heads: int, num_layers: int, feedforward_ratio: int) -> None:
        super().__init__()
        self.spec = spec
        self.sizes = (dim, num_layers, feedforward_ratio * dim)
        size = spec.codebook_size
        self.decoder: nn.Module = MusicgenForCausalLM(
            MusicgenDecoderConfig(
                vocab_size=size,
                num_codebooks=spec.num_codebooks,
                hidden_size=dim,
                num_attention_heads=num_heads,
                num_hidden_layers=num_layers,
                ffn_dim=feedforward_ratio * dim,
                max_position_embeddings=spec.num_steps + spec.num_codebooks,
                pad_token_id=size,
                bos_token_id=size,
            )
        ).eval()
        self.visual_input = nn.Linear(spec.feature_dim, dim)
        start = torch.full((spec.num_codebooks, 1), size)
        _, pattern = self.decoder.build_delay_pattern_mask(start, size, spec.num_steps + spec.num_codebooks)
        self.register_buffer("pattern", pattern, persistent=False)

    @torch.inference_mode()
    def generate(
        self, features: Tensor, top_k: int = 256, guidance_scale: float = 5.0, steps: int | None = None
    ) -> Tensor:
        """Codes for a video, T + K - 1 steps of the network.

        Args:
            features: (B, V, C) float.
            top_k: Draw among this many likeliest codes.
            guidance_scale: As `Sampler` has it; 1 is one row per record.
            steps: Stop after so many, for a warm-up; the rest of the codes is then missing.

        Returns:
            (B, K, T) int64, or (B, K, steps) as drawn, delay and all.
        """
        records, levels = len(features), self.spec.num_codebooks
        guided = guidance_scale != 1
        memory = self.visual_input(features.to(self.visual_input.weight.dtype))
        if guided:
            memory = torch.cat([memory, torch.zeros_like(memory)])
        rows, cache, made = len(memory), None, []
        codes = self.pattern[:, 0].expand(records, levels)
        for step in range(1, self.pattern.shape[1] if steps is None else steps + 1):
            answer = self.decoder(
                codes.repeat(rows // records, 1).reshape(rows * levels, 1),
                encoder_hidden_states=memory,
                past_key_values=cache,
                use_cache=True,
            )
            cache = answer.past_key_values
            logits = answer.logits.view(rows, levels, -1).float()
            if guided:
                with_video, without_video = logits.chunk(2)
                logits = torch.lerp(without_video, with_video, guidance_scale)
            likeliest, code = logits.topk(top_k)  # (B, K, top_k)
            drawn = likeliest.softmax(-1).flatten(0, 1).multinomial(1).view(records, levels, 1)
            allowed = self.pattern[:, step]
            codes = torch.where(allowed == -1, code.gather(-1, drawn)[..., 0], allowed)
            made.append(codes)
        delayed = torch.stack(made, dim=-1)  # (B, K, T + K - 1)
        if steps is not None:
            return delayed
        return torch.stack([delayed[:, k, k : k + self.spec.num_steps] for k in range(levels)], dim=1)

    def flops(self, records: int, rows: int) -> int:
        """Floating-point operations of making one batch: 2 per weight, step and row, and attention over the past."""
        dim, layers, hidden_dim = self.sizes
        spec, steps = self.spec, self.pattern.shape[1] - 1
        # Self-attention 4, cross-attention's query and output 2, feed-forward; cross-attention's look at the frames.
        layer = steps * (6 * dim + 2 * hidden_dim + 2 * spec.num_frames) * dim
        layer += dim * steps * (steps + 1)  # queries with keys, weights with values: 1, 2, ... positions
        layer += 2 * spec.num_frames * dim * dim  # cross-attention's keys and values: once
        heads = steps * spec.num_codebooks * spec.codebook_size * dim
        return 2 * (rows * (layers * layer + heads) + records * spec.num_frames * spec.feature_dim * dim)
