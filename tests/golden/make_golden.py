"""Writes the golden files beside it: ``python tests/golden/make_golden.py``. Only where results are meant to change.

A golden file holds weights, inputs and outputs, so a test needs nothing of the code that once made them.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vab.backbone import Backbone
from vab.spec import SegmentSpec

HERE = Path(__file__).parent

SPEC = SegmentSpec(
    segment_seconds=0.5,
    sample_rate=16_000,
    code_rate=24.0,
    num_codebooks=3,
    codebook_size=11,
    code_dim=5,
    num_steps=12,
    video_fps=8.0,
    num_frames=4,
    feature_dim=6,
    codec="golden",
    codec_hash="0",
    vision="golden",
    vision_hash="0",
)
SIZES: dict[str, Any] = {"dim": 16, "num_heads": 2, "num_modality_layers": 2, "num_joint_layers": 1}


def make_backbone(positions: str) -> None:
    """Logits of a network of a few thousand weights, some codes hidden, one record without video, one padded."""
    generator = torch.Generator().manual_seed(0)
    backbone = Backbone(SPEC, **SIZES, positions=positions).eval()
    for parameter in backbone.parameters():  # of a size that lets every weight tell
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    backbone.set_codebooks(torch.randn(3, 11, 5, generator=generator))
    inputs = {
        "codes": torch.randint(0, 11, (3, 3, 12), generator=generator),
        "features": torch.randn(3, 4, 6, generator=generator),
        "mask": torch.rand(3, 3, 12, generator=generator) < 0.6,
        "drop_features": torch.tensor([False, True, False]),
        "steps": torch.tensor([12, 12, 7]),
        "frames": torch.tensor([4, 4, 2]),
    }
    with torch.no_grad():
        logits = backbone(**inputs)
    tensors = {f"weight.{name}": tensor for name, tensor in backbone.state_dict().items()}
    tensors |= {f"input.{name}": tensor for name, tensor in inputs.items()} | {"logits": logits.contiguous()}
    save_file(tensors, HERE / f"backbone_{positions}.safetensors")


if __name__ == "__main__":
    for positions in ("rotary", "alibi"):
        make_backbone(positions)
