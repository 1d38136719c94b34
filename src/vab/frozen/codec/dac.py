"""DAC at 16, 24 and 44.1 kHz; that of 16 kHz, with twelve levels, is the paper's second codec."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vab.extras import install_hint
from vab.files import sha256_of
from vab.frozen.codec.convolutions import Weights, check_sample_rate, fold_weight_norm, in_pieces
from vab.frozen.protocols import Codec
from vab.frozen.weight_files.catalogue import published_weights
from vab.frozen.weight_files.published import print_licence
from vab.frozen.weight_files.reading import read_checkpoint, read_model_folder, refusing
from vab.spec import UserError


class Dac(Codec):
    """The network of transformers' ``DacModel``.

    Long sounds go through the network in pieces. The decoder with strides 8, 5, 4, 2 (16 and 24 kHz) ends 8 samples
    early; these samples are zero.

    Args:
        name: "dac_16khz", "dac_24khz" or "dac_44khz".
        weights: Folder as on the hub (config.json and model.safetensors), or descript's .pth file; if None, it is
            searched as `Published.find` says.

    Raises:
        UserError: If the package or the weights are absent, or the weights are not a DAC of this name.

    Source: Kumar et al. 2023, "High-fidelity audio compression with improved RVQGAN".
    """

    packages = ("transformers",)

    def __init__(self, name: str = "dac_16khz", weights: Path | None = None) -> None:
        super().__init__()
        try:  # before the weights are searched, and perhaps fetched
            from transformers import DacConfig, DacModel
        except ImportError as error:
            raise UserError(f"codec {name} needs a package ({error}): {install_hint('dac')}") from error
        published = published_weights("codec", name)
        path = published.find(weights)
        settings, state, file = read_model_folder(path, "dac", "DAC") if path.is_dir() else _of_descript(path)
        problem = f"{path}: its configuration is of a network that transformers cannot make"
        with refusing(problem, "; fetch it again, or take another folder"):
            config = DacConfig.from_dict(settings)
            self.network = DacModel(config)
        check_sample_rate(name, config.sampling_rate, file)
        with refusing(f"{file} does not hold the weights of a DAC"):
            self.network.load_state_dict(fold_weight_norm(state))
        self.name, self.weight_hash = name, sha256_of(file)
        self.sample_rate, self.hop = config.sampling_rate, math.prod(config.downsampling_ratios)
        self.code_rate = self.sample_rate / self.hop
        self.num_codebooks, self.codebook_size = config.n_codebooks, config.codebook_size
        self.code_dim = config.hidden_size
        print_licence(published.owner, published.licence)

    def codebooks(self) -> Tensor:
        """(K, S, code_dim) float32: the entries, which have 8 numbers, as the decoder sees them."""
        quantizers: Any = self.network.quantizer.quantizers
        return torch.stack(
            [F.linear(q.codebook.weight, q.out_proj.weight[..., 0], q.out_proj.bias) for q in quantizers]
        )

    def _encode(self, waveform: Tensor) -> Tensor:
        padded = F.pad(waveform, (0, -waveform.shape[2] % self.hop))  # to whole steps
        latent = in_pieces(self.network.encoder, padded, Fraction(1, self.hop), self.sample_rate)
        codes: Tensor = self.network.quantizer(latent)[1]
        return codes

    def _decode(self, codes: Tensor) -> Tensor:
        latent = self.network.quantizer.from_codes(codes)[0]
        waveform = in_pieces(self.network.decoder, latent, Fraction(self.hop), self.code_rate)
        return F.pad(waveform, (0, codes.shape[2] * self.hop - waveform.shape[2]))


_SETTINGS = {
    "encoder_dim": "encoder_hidden_size",
    "encoder_rates": "downsampling_ratios",
    "decoder_dim": "decoder_hidden_size",
    "n_codebooks": "n_codebooks",
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_dim",
    "sample_rate": "sampling_rate",
}
"""Settings: their names in descript's file, and in transformers' ``DacConfig``."""
_UNIT = ("snake1", "conv1", "snake2", "conv2")
_ENCODER_TAIL = {3: "snake1", 4: "conv1"}
_DECODER_HEAD = {0: "snake1", 1: "conv_t1"}


def _of_descript(file: Path) -> tuple[dict[str, Any], Weights, Path]:
    """Settings for ``DacConfig``, weights by their names in ``DacModel``, and the path of descript's .pth."""
    contents = read_checkpoint(file)
    try:
        kwargs, weights = contents["metadata"]["kwargs"], contents["state_dict"]
        settings = {ours: kwargs[theirs] for theirs, ours in _SETTINGS.items()}
        blocks = len(kwargs["encoder_rates"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is not a DAC as descript publishes it: it has no {error}") from error
    if list(kwargs.get("decoder_rates", [])) != list(kwargs["encoder_rates"])[::-1]:
        raise UserError(f"{file}: its decoder's rates are not its encoder's backwards, which cannot be read")
    return settings, {of_descript(name, blocks): value for name, value in weights.items()}, file


def of_descript(name: str, blocks: int) -> str:
    """The name that a weight of descript's DAC has in transformers' ``DacModel``.

    Args:
        name: Such as ``encoder.block.2.block.0.block.1.bias``.
        blocks: Number of blocks of the encoder.
    """
    for side, stem, unit_shift in (("encoder", "encoder.block", 1), ("decoder", "decoder.model", -1)):
        if match := re.fullmatch(re.escape(stem) + r"\.(\d+)\.block\.(\d+)\.block\.(\d+)\.(.+)", name):
            block, unit, layer = int(match[1]) - 1, int(match[2]) + unit_shift, _UNIT[int(match[3])]
            return f"{side}.block.{block}.res_unit{unit}.{layer}.{match[4]}"
        if match := re.fullmatch(re.escape(stem) + r"\.(\d+)\.block\.(\d+)\.(.+)", name):
            layer = (_ENCODER_TAIL if side == "encoder" else _DECODER_HEAD)[int(match[2])]
            return f"{side}.block.{int(match[1]) - 1}.{layer}.{match[3]}"
        if match := re.fullmatch(re.escape(stem) + r"\.(\d+)\.(.+)", name):
            layer = {0: "conv1", blocks + 1: "snake1", blocks + 2: "conv2"}[int(match[1])]
            return f"{side}.{layer}.{match[2]}"
    return name
