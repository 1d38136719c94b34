"""Audio codecs by name: waveform to codes and back.

Extraction encodes with a codec, generation and the metrics decode with it. Training needs none: shards contain the
codes and the codebooks.
"""

from __future__ import annotations

from pathlib import Path

import torch

from vab.frozen.codec.dac import Dac
from vab.frozen.codec.encodec import EnCodec
from vab.frozen.codec.tiny import TinyCodec, TinyCodec8
from vab.frozen.protocols import Codec
from vab.frozen.weight_files.catalogue import CODECS
from vab.spec import UserError


def load_codec(name: str, device: torch.device | str = "cpu", weights: str | Path | None = None) -> Codec:
    """Load a codec by name.

    Args:
        name: "tiny" ships with the package and needs no network; "tiny8" is tiny with four finer levels more.
            "audiogen_16khz" is the paper's EnCodec, "encodec_24khz:6" the public one (after the colon its bandwidth,
            kbit/s), "encodec_32khz" MusicGen's, "dac_16khz" the paper's DAC, "dac_24khz" and "dac_44khz" the others.
        device: Device of the codec.
        weights: Its published file or folder. If None, it is searched in the folder $VAB_WEIGHTS, then in the folders
            of torch.hub and the model hub; if it is in none, it is fetched, unless HF_HUB_OFFLINE is set.

    Raises:
        UserError: If the name is unknown, or a package or the weights are absent.
    """
    if name not in CODECS:
        raise UserError(f"unknown codec {name!r}: there is {', '.join(CODECS)}")
    if weights is not None and name.startswith("tiny"):
        raise UserError(f"codec {name} ships with its weights: leave out {weights}")
    if name.startswith("tiny"):
        codec: Codec = TinyCodec() if name == "tiny" else TinyCodec8()
    else:
        own = None if weights is None else Path(weights).expanduser()
        codec = Dac(name, own) if name.startswith("dac") else EnCodec(name, own)
    return codec.freeze().to(device)
