"""EnCodec: of the package encodec (24 kHz), AudioGen's (16 kHz, the paper's codec), MusicGen's (32 kHz)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from vab.extras import install_hint
from vab.files import sha256_of
from vab.frozen.codec.convolutions import Weights, check_sample_rate, fold_weight_norm, in_pieces
from vab.frozen.protocols import Codec
from vab.frozen.weight_files.catalogue import BANDWIDTHS, published_weights
from vab.frozen.weight_files.published import Published, print_licence
from vab.frozen.weight_files.reading import read_checkpoint, read_model_folder, refusing
from vab.spec import UserError


class EnCodec(Codec):
    """A SEANet with a residual quantiser, built from the modules of the package encodec.

    Long sounds go through the convolutions in pieces. The recurrent layers, whose state has no limited reach, run over
    the whole sound.

    Args:
        name: "encodec_24khz:6" (6 is the bandwidth in kbit/s), "audiogen_16khz" or "encodec_32khz".
        weights: The published file, or a folder as transformers writes it for the hub (config.json and
            model.safetensors); if None, it is searched as `Published.find` says.

    Raises:
        UserError: If the package or the file is absent, or the file is not an EnCodec of this name.

    Source: Defossez et al. 2022, "High fidelity neural audio compression"; Kreuk et al. 2023, "AudioGen".
    """

    packages = ("encodec",)

    def __init__(self, name: str, weights: Path | None = None) -> None:
        super().__init__()
        published = published_weights("codec", name)
        package_modules()  # before the weights are searched, and perhaps fetched
        architecture, state, path = _read(published, published.find(weights))
        check_sample_rate(name, architecture.sample_rate, path)
        problem = f"{path}: its configuration is of a network that the package encodec cannot make"
        with refusing(problem, "; fetch it again, or take another file"):
            network = build(architecture)
        _fill(network, state, path)
        self.encoder, self.decoder, self.quantizer = network["encoder"], network["decoder"], network["quantizer"]
        self.name, self.weight_hash = name, sha256_of(path)
        self.sample_rate, self.codebook_size = architecture.sample_rate, architecture.codebook_size
        self.num_codebooks = BANDWIDTHS.get(name.partition(":")[2], architecture.num_codebooks)
        self.code_dim = int(self.encoder.dimension)
        self.hop = prod(self.encoder.ratios)
        self.code_rate = self.sample_rate / self.hop
        print_licence(published.owner, published.licence)

    def codebooks(self) -> Tensor:
        """(K, S, code_dim) float32."""
        return torch.stack([layer.codebook for layer in self.quantizer.vq.layers[: self.num_codebooks]])

    def _encode(self, waveform: Tensor) -> Tensor:
        layers = self.encoder.model
        recurrent = _recurrent(layers, len(layers) - 2)
        front, back = layers[:recurrent], layers[recurrent:]
        latent = back(in_pieces(front, waveform, Fraction(1, self.hop), self.sample_rate))
        codes: Tensor = self.quantizer.vq.encode(latent, n_q=self.num_codebooks)  # (K, 1, T)
        return codes.transpose(0, 1)

    def _decode(self, codes: Tensor) -> Tensor:
        layers = self.decoder.model
        recurrent = _recurrent(layers, 0)
        front, back = layers[: recurrent + 1], layers[recurrent + 1 :]
        latent = front(self.quantizer.decode(codes.transpose(0, 1)))
        return in_pieces(back, latent, Fraction(self.hop), self.code_rate)


def _recurrent(layers: nn.Sequential, default: int) -> int:
    """Index of the recurrent layer, or ``default`` if there is none: that of a layer at the rate of the codes."""
    return next((number for number, layer in enumerate(layers) if hasattr(layer, "lstm")), default)


def _old_weight_norm() -> warnings.catch_warnings[None]:
    """Suppress the warning of torch's older weight norm, which the package uses."""
    return warnings.catch_warnings(action="ignore", category=FutureWarning)


@dataclass(frozen=True)
class Architecture:
    """The arguments from which a SEANet and its quantiser are built."""

    sample_rate: int
    """Hz."""
    num_codebooks: int
    """K."""
    codebook_size: int
    """S."""
    seanet: dict[str, Any]
    """Arguments of both encoder and decoder, by their names in the package encodec."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the decoder."""


def package_modules() -> tuple[Any, Any, Any]:
    """Classes of the package encodec: encoder, decoder, quantiser.

    Raises:
        UserError: If the package is not installed, or does not import.
    """
    try:
        with _old_weight_norm():
            from encodec.modules import SEANetDecoder, SEANetEncoder
            from encodec.quantization import ResidualVectorQuantizer
    except (ImportError, OSError, RuntimeError) as error:  # a torchaudio for another torch raises any of them
        hint = install_hint("encodec")
        raise UserError(f"EnCodec needs a package ({error}): {hint}; vab doctor says more") from error
    return SEANetEncoder, SEANetDecoder, ResidualVectorQuantizer


def build(architecture: Architecture) -> Any:
    """``nn.ModuleDict`` of encoder, decoder and quantizer with random weights, as the package encodec defines them.

    Raises:
        UserError: If the package is not installed, or does not import.
    """
    encoder_class, decoder_class, quantizer_class = package_modules()
    with _old_weight_norm():
        encoder = encoder_class(**architecture.seanet)
        decoder = decoder_class(**architecture.seanet, **architecture.decoder)
    levels, size = architecture.num_codebooks, architecture.codebook_size
    quantizer = quantizer_class(dimension=encoder.dimension, n_q=levels, bins=size)
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder, "quantizer": quantizer})


def _read(published: Published, path: Path) -> tuple[Architecture, Weights, Path]:
    """Architecture, weights and their file, from any of the layouts in which an EnCodec is published.

    Args:
        published: The published weights.
        path: The file, or a folder with it.
    """
    file = path / Path(published.names[-1]).name if path.is_dir() else path
    if path.is_dir() and not file.exists() and (len(published.files) > 1 or (path / "config.json").exists()):
        settings, state, file = read_model_folder(path, "encodec", "an EnCodec")
        return _of_transformers(settings, state, path), state, file
    contents = read_checkpoint(file)
    if published.name == "encodec_24khz":
        return Architecture(24000, num_codebooks=32, codebook_size=1024, seanet={"causal": True}), contents, file
    return _of_audiocraft(contents, file), contents["best_state"], file


_AUDIOCRAFT = (
    ("compression_model", "encodec"),
    ("channels", 1),
    ("encodec.autoencoder", "seanet"),
    ("encodec.quantizer", "rvq"),
    ("encodec.renormalize", False),
    ("seanet.norm", "weight_norm"),
    ("seanet.disable_norm_outer_blocks", 0),
)
"""Values that a configuration of audiocraft must have, if it states them, for the package's modules to fit."""


def _of_audiocraft(contents: dict[str, Any], path: Path) -> Architecture:
    """The architecture that audiocraft's ``compression_state_dict.bin`` states.

    Args:
        contents: Contents of the file: ``xp.cfg``, YAML, and ``best_state``.
        path: Path of the file, for messages.

    Raises:
        UserError: If it is no such file, or the package's modules cannot make the network.
    """
    if not isinstance(contents.get("xp.cfg"), str) or "best_state" not in contents:
        raise UserError(
            f"{path} is not audiocraft's compression_state_dict.bin: expected xp.cfg and best_state, "
            f"got {', '.join(map(str, list(contents)[:5]))}"
        )
    remedy = "; fetch it again, or take another file"
    with refusing(f"{path}: its xp.cfg does not say what the network is", remedy):
        # Parts refer to each other (${channels}), others to what only audiocraft has: each part is resolved by itself.
        config = OmegaConf.create(contents["xp.cfg"])
        for name, expected in _AUDIOCRAFT:
            value = OmegaConf.select(config, name, default=expected)
            if value != expected:
                raise UserError(f"{path}: its {name} is {value!r}, only {expected!r} can be read")
        seanet, rvq = (_resolved(config, name) for name in ("seanet", "rvq"))
        encoder, decoder = seanet.pop("encoder", None) or {}, seanet.pop("decoder", None) or {}
        if encoder:
            raise UserError(f"{path}: its encoder has settings of its own ({encoder}), which cannot be read")
        seanet.pop("disable_norm_outer_blocks", None)
        return Architecture(int(config["sample_rate"]), int(rvq["n_q"]), int(rvq["bins"]), seanet, decoder)


def _resolved(config: Any, name: str) -> dict[str, Any]:
    """A part of a configuration, with references replaced by their values."""
    part = OmegaConf.select(config, name)
    if not OmegaConf.is_dict(part):
        raise KeyError(f"it has no {name}")
    return {str(key): value for key, value in OmegaConf.to_container(part, resolve=True).items()}  # type: ignore[union-attr]


_TRANSFORMERS = {
    "hidden_size": "dimension",
    "num_filters": "n_filters",
    "num_residual_layers": "n_residual_layers",
    "upsampling_ratios": "ratios",
    "kernel_size": "kernel_size",
    "last_kernel_size": "last_kernel_size",
    "residual_kernel_size": "residual_kernel_size",
    "dilation_growth_rate": "dilation_base",
    "use_causal_conv": "causal",
    "pad_mode": "pad_mode",
    "compress": "compress",
    "num_lstm_layers": "lstm",
}
"""Settings of encoder and decoder: their names in transformers' ``EncodecConfig``, and in the package."""
_TRANSFORMERS_FIXED = {"audio_channels": 1, "normalize": False, "norm_type": "weight_norm", "chunk_length_s": None}


def _of_transformers(settings: dict[str, Any], state: Weights, folder: Path) -> Architecture:
    """The architecture that a folder of transformers' ``EncodecModel`` states.

    Args:
        settings: Contents of its config.json.
        state: Its weights; there are as many levels as they have codebooks.
        folder: Its path, for messages.

    Raises:
        UserError: If a setting is missing, or the package's modules cannot make the network.
    """
    for name, expected in _TRANSFORMERS_FIXED.items():
        if (value := settings.get(name, expected)) != expected:
            raise UserError(f"{folder / 'config.json'}: its {name} is {value!r}, only {expected!r} can be read")
    remedy = "; fetch it again, or take another folder"
    with refusing(f"{folder / 'config.json'} does not say what the network is", remedy):
        seanet = {ours: settings[theirs] for theirs, ours in _TRANSFORMERS.items()}
        seanet["true_skip"] = not settings["use_conv_shortcut"]
        levels = sum(name.endswith(".codebook.embed") for name in state)
        rate, size = int(settings["sampling_rate"]), int(settings["codebook_size"])
        return Architecture(rate, levels, size, seanet, {"trim_right_ratio": settings["trim_right_ratio"]})


def _in_transformers(name: str) -> str:
    """The name that a weight of the package's modules has in transformers' ``EncodecModel``."""
    name = (
        name.replace("quantizer.vq.", "quantizer.").replace("._codebook.", ".codebook.").replace(".model.", ".layers.")
    )
    return name.replace(".convtr.convtr.", ".conv.").replace(".conv.conv.", ".conv.")


def _fill(network: nn.Module, state: Any, path: Path) -> None:
    """Load all weights, named as in the package or as in transformers, with weight norm folded in."""
    for layer in network.modules():
        if hasattr(layer, "weight_g"):
            with _old_weight_norm():
                nn.utils.remove_weight_norm(layer)
    names = {_in_transformers(name): name for name in network.state_dict()}
    with refusing(f"{path} does not hold the weights of an EnCodec"):
        folded = fold_weight_norm({name: value.float() for name, value in state.items()})
        network.load_state_dict({names.get(name, name): value for name, value in folded.items()})
