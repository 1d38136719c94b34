"""Write the weights files of the tiny networks, as `vab.frozen.tiny.read_weights` reads them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from safetensors.torch import save
from torch import Tensor

from vab.frozen.codec.tiny import CodecNetwork
from vab.frozen.judges.tiny import JudgeNetwork
from vab.frozen.vision.tiny import VisionNetwork

AnyNetwork = CodecNetwork | VisionNetwork | JudgeNetwork


def weights_to_bytes(network: AnyNetwork, made_by: dict[str, Any]) -> bytes:
    """The contents of a weights file: matrices in float16, the rest as it is.

    Codebooks stay float32, since shards and checkpoints carry copies of them.

    Args:
        network: The network to write; its config is stored in the metadata.
        made_by: How it was made, as JSON types; stored for readers, and not used by the loader.
    """
    tensors = {
        name: tensor.half().contiguous() if tensor.ndim >= 2 and name != "codebooks" else tensor.contiguous()
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    metadata = {"config": json.dumps(asdict(network.config)), "made": json.dumps(made_by)}
    return save(tensors, metadata)


def levels_to_bytes(codebooks: Tensor, codec_hash: str, made_by: dict[str, Any]) -> bytes:
    """The contents of a file of further levels for a codec.

    Args:
        codebooks: (K, S, code_dim) float32.
        codec_hash: SHA-256 of the weights file of the codec that they belong to.
        made_by: How they were made, as JSON types; stored for readers, and not used by the loader.
    """
    # One entry: safetensors writes several in random order, and the hash of the file would be random too.
    metadata = {"levels": json.dumps({"codec_hash": codec_hash, "made": made_by})}
    return save({"codebooks": codebooks.float().contiguous()}, metadata)
