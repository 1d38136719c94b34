"""Encoders of others, of a backbone's size, between the backbone's own inputs and heads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vab.backbone import Backbone
from vab.spec import SegmentSpec

Encoder = Callable[[dict[str, Any]], nn.Module]
"""Arguments of `Backbone` to a network (B, P, D) to (B, P, D) of the same width, layers, heads, feed-forward ratio."""


class Peer(nn.Module):
    """A backbone whose blocks are another's encoder: inputs, last norm and heads are as they are.

    Args:
        spec: Of the segment.
        arguments: Of `Backbone`.
        encoder: As `Encoder` makes it.
    """

    def __init__(self, spec: SegmentSpec, arguments: dict[str, Any], encoder: nn.Module) -> None:
        super().__init__()
        self.frame = Backbone(spec, **arguments | {"num_modality_layers": 1, "num_joint_layers": 0})
        self.frame.modality_blocks = nn.ModuleList()
        self.frame.modality_norm = nn.Identity()  # type: ignore[assignment]
        self.encoder = encoder

    def set_codebooks(self, codebooks: Tensor) -> None:
        """As `Backbone.set_codebooks`."""
        self.frame.set_codebooks(codebooks)

    def forward(self, codes: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        """As `Backbone.forward`."""
        x = torch.cat([self.frame.embed_features(features), self.frame.embed_codes(codes, mask)], dim=1)
        x = self.frame.joint_norm(self.encoder(x)[:, features.shape[1] :])
        heads = self.frame.heads
        return F.linear(x, heads.flatten(0, 1)).unflatten(-1, heads.shape[:2]).transpose(1, 2)


def torch_encoder(arguments: dict[str, Any]) -> nn.Module:
    """`torch.nn.TransformerEncoder`: norms first, GELU, no biases."""
    dim, heads, layers = _sizes(arguments)
    hidden = arguments["feedforward_ratio"] * dim
    layer = nn.TransformerEncoderLayer(
        dim, heads, hidden, arguments["dropout"], "gelu", batch_first=True, norm_first=True, bias=False
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def x_transformers_encoder(arguments: dict[str, Any]) -> nn.Module:
    """The Encoder of x-transformers, with rotary positions and torch's attention kernels."""
    from x_transformers import Encoder as Blocks

    dim, heads, layers = _sizes(arguments)
    return Blocks(  # type: ignore[no-any-return]
        dim=dim,
        depth=layers,
        heads=heads,
        attn_dim_head=dim // heads,
        attn_flash=True,
        rotary_pos_emb=True,
        ff_mult=arguments["feedforward_ratio"],
        ff_no_bias=True,
        ff_dropout=arguments["dropout"],
    )


class _Bert(nn.Module):
    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertEncoder

        dim, heads, layers = _sizes(arguments)
        settings = BertConfig(
            vocab_size=1,
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=arguments["feedforward_ratio"] * dim,
            hidden_dropout_prob=arguments["dropout"],
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
        self.blocks = BertEncoder(settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)[0]  # type: ignore[no-any-return]


PEERS: dict[str, tuple[str, Encoder]] = {
    "torch.nn.TransformerEncoder": ("torch", torch_encoder),
    "x-transformers": ("x_transformers", x_transformers_encoder),
    "transformers' BERT": ("transformers", _Bert),
}
"""Name, the package that it needs, and its maker."""


def installed() -> list[str]:
    """Names of the peers whose package is there."""
    return [name for name, (package, _) in PEERS.items() if importlib.util.find_spec(package) is not None]


def _sizes(arguments: dict[str, Any]) -> tuple[int, int, int]:
    layers = arguments["num_modality_layers"] + arguments["num_joint_layers"]
    return arguments["dim"], arguments["num_heads"], layers
