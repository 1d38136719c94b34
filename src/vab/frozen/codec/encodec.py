"""EnCodec: 24 kHz as the package encodec has it, AudioGen's of 16 kHz (the paper's codec), MusicGen's of 32 kHz."""

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
from vab.frozen.codec.convolutions import (
    PIECE_SECONDS,
    Weights,
    check_sample_rate,
    down_reach,
    fold_weight_norm,
    in_pieces,
    up_reach,
)
from vab.frozen.protocols import Codec
from vab.frozen.weight_files.catalogue import BANDWIDTHS, published_weights
from vab.frozen.weight_files.published import Published, print_licence
from vab.frozen.weight_files.reading import read_checkpoint, read_model_folder, refusing
from vab.spec import UserError


class EnCodec(Codec):
    """A SEANet with a residual quantiser, out of the modules of the package encodec.

    Each waveform is encoded by itself: in a batch the order of float additions is another, and some codes with it.
    Long ones go through the convolutions in pieces; the recurrent layers, which remember without end, see the whole.

    Args:
        name: "encodec_24khz:6", the number being the bandwidth in kbit/s, "audiogen_16khz" or "encodec_32khz".
        weights: The published file, or a folder as transformers writes it for the hub (config.json and
            model.safetensors); looked for as `Published.find` says if None.

    Raises:
        UserError: If the package or the file is absent, or the file holds something else.

    Source: Defossez et al. 2022, "High fidelity neural audio compression"; Kreuk et al. 2023, "AudioGen".
    """

    packages = ("encodec",)

    def __init__(self, name: str, weights: Path | None = None) -> None:
        super().__init__()
        published = published_weights("codec", name)
        package_modules()  # before the weights are looked for, and perhaps fetched
        numbers, state, path = _read(published, published.find(weights))
        check_sample_rate(name, numbers.sample_rate, path)
        problem = f"{path}: its configuration is of a network that the package encodec cannot make"
        with refusing(problem, "; fetch it again, or take another file"):
            self.encoder, self.decoder, self.quantizer = networks(numbers)
        _fill(
            nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder, "quantizer": self.quantizer}), state, path
        )
        self.name, self.weight_hash = name, sha256_of(path)
        self.sample_rate, self.codebook_size = numbers.sample_rate, numbers.codebook_size
        self.num_codebooks = BANDWIDTHS.get(name.partition(":")[2], numbers.num_codebooks)
        self.code_dim = int(self.encoder.dimension)
        self.hop = prod(self.encoder.ratios)
        self.code_rate = self.sample_rate / self.hop
        print_licence(published.owner, published.licence)

    def steps_for(self, samples: int) -> int:
        """A step for every `hop` samples, the last one begun included."""
        return -(-samples // self.hop)

    def codebooks(self) -> Tensor:
        """(K, S, code_dim) float32."""
        return torch.stack([layer.codebook for layer in self.quantizer.vq.layers[: self.num_codebooks]])

    def _encode(self, waveform: Tensor) -> Tensor:
        return torch.cat([self._codes(row[None]) for row in waveform])

    def _codes(self, waveform: Tensor) -> Tensor:
        """(1, 1, N) -> (1, K, T)."""
        layers = self.encoder.model
        recurrent = _recurrent(layers, len(layers) - 2)
        front, back = layers[:recurrent], layers[recurrent:]
        size = PIECE_SECONDS * self.sample_rate // self.hop * self.hop
        latent = back(in_pieces(front, waveform, Fraction(1, self.hop), size, down_reach(front)))
        codes: Tensor = self.quantizer.vq.encode(latent, n_q=self.num_codebooks)  # (K, 1, T)
        return codes.transpose(0, 1)

    def _decode(self, codes: Tensor) -> Tensor:
        layers = self.decoder.model
        recurrent = _recurrent(layers, 0)
        front, back = layers[: recurrent + 1], layers[recurrent + 1 :]
        size = int(PIECE_SECONDS * self.code_rate)
        return in_pieces(
            back, front(self.quantizer.decode(codes.transpose(0, 1))), Fraction(self.hop), size, up_reach(back)
        )


def _old_weight_norm() -> warnings.catch_warnings[None]:
    """Suppress the warning of torch's older weight norm, which the package uses."""
    return warnings.catch_warnings(action="ignore", category=FutureWarning)


@dataclass(frozen=True)
class Numbers:
    """The arguments from which a SEANet and its quantiser are built."""

    sample_rate: int
    """Hz."""
    num_codebooks: int
    """K."""
    codebook_size: int
    """S."""
    seanet: dict[str, Any]
    """Arguments of both halves of the network, by their names in the package encodec."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the decoder."""


def _read(published: Published, path: Path) -> tuple[Numbers, Weights, Path]:
    """Numbers, weights and their file, of any of the layouts in which an EnCodec is published.

    Args:
        published: Which one.
        path: Of the file, or of a folder that has it.
    """
    file = path / Path(published.names[-1]).name if path.is_dir() else path
    if path.is_dir() and not file.exists() and (len(published.files) > 1 or (path / "config.json").exists()):
        settings, state, file = read_model_folder(path, "encodec", "an EnCodec")
        return numbers_of_transformers(settings, state, path), state, file
    contents = read_checkpoint(file)
    if published.name == "encodec_24khz":
        return Numbers(24000, num_codebooks=32, codebook_size=1024, seanet={"causal": True}), contents, file
    return numbers_of(contents, file), contents["best_state"], file


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


def networks(numbers: Numbers) -> tuple[Any, Any, Any]:
    """Encoder, decoder and quantiser with random weights, as the package encodec defines them.

    Raises:
        UserError: If the package is not installed, or does not import.
    """
    encoder_class, decoder_class, quantizer_class = package_modules()
    with _old_weight_norm():
        encoder = encoder_class(**numbers.seanet)
        decoder = decoder_class(**numbers.seanet, **numbers.decoder)
    quantizer = quantizer_class(dimension=encoder.dimension, n_q=numbers.num_codebooks, bins=numbers.codebook_size)
    return encoder, decoder, quantizer


_AUDIOCRAFT = (
    ("compression_model", "encodec"),
    ("channels", 1),
    ("encodec.autoencoder", "seanet"),
    ("encodec.quantizer", "rvq"),
    ("encodec.renormalize", False),
    ("seanet.norm", "weight_norm"),
    ("seanet.disable_norm_outer_blocks", 0),
)
"""What a configuration of audiocraft must say, where it says anything, for these modules to be its network."""


def numbers_of(contents: dict[str, Any], path: Path) -> Numbers:
    """The numbers that audiocraft's ``compression_state_dict.bin`` states of itself.

    Args:
        contents: Of the file: ``xp.cfg``, YAML, and ``best_state``.
        path: Of the file, for complaints.

    Raises:
        UserError: If it is no such file, or of a network that these modules cannot make.
    """
    if not isinstance(contents.get("xp.cfg"), str) or "best_state" not in contents:
        raise UserError(
            f"{path} is not audiocraft's compression_state_dict.bin: expected xp.cfg and best_state, "
            f"got {', '.join(map(str, list(contents)[:5]))}"
        )
    remedy = "; fetch it again, or take another file"
    with refusing(f"{path}: its xp.cfg does not say what the network is", remedy):
        # Its parts refer to each other (${channels}); they are read one by one, as others refer to what is not here.
        config = OmegaConf.create(contents["xp.cfg"])
        for name, expected in _AUDIOCRAFT:
            value = OmegaConf.select(config, name, default=expected)
            if value != expected:
                raise UserError(f"{path}: its {name} is {value!r}, only {expected!r} can be read")
        seanet, rvq = (_plain(OmegaConf.select(config, name), name) for name in ("seanet", "rvq"))
        encoder, decoder = seanet.pop("encoder", None) or {}, seanet.pop("decoder", None) or {}
        if encoder:
            raise UserError(f"{path}: its encoder has settings of its own ({encoder}), which cannot be read")
        seanet.pop("disable_norm_outer_blocks", None)
        return Numbers(int(config["sample_rate"]), int(rvq["n_q"]), int(rvq["bins"]), seanet, decoder)


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
"""What transformers' ``EncodecConfig`` calls the settings of both halves, and what the package calls them."""
_TRANSFORMERS_FIXED = {"audio_channels": 1, "normalize": False, "norm_type": "weight_norm", "chunk_length_s": None}


def numbers_of_transformers(settings: dict[str, Any], state: Weights, folder: Path) -> Numbers:
    """The numbers that a folder of transformers' ``EncodecModel`` states of itself.

    Args:
        settings: Of its config.json, which names all of them.
        state: Of its weights; there are as many levels as it has codebooks.
        folder: Its path, for messages.

    Raises:
        UserError: If a setting is missing, or of a network that these modules cannot make.
    """
    for name, expected in _TRANSFORMERS_FIXED.items():
        if (value := settings.get(name, expected)) != expected:
            raise UserError(f"{folder / 'config.json'}: its {name} is {value!r}, only {expected!r} can be read")
    remedy = "; fetch it again, or take another folder"
    with refusing(f"{folder / 'config.json'} does not say what the network is", remedy):
        seanet = {ours: settings[theirs] for theirs, ours in _TRANSFORMERS.items()}
        seanet["true_skip"] = not settings["use_conv_shortcut"]
        levels = sum(name.endswith(".codebook.embed") for name in state)
        numbers = int(settings["sampling_rate"]), levels, int(settings["codebook_size"])
        return Numbers(*numbers, seanet, {"trim_right_ratio": settings["trim_right_ratio"]})


def _in_transformers(name: str) -> str:
    """The name that a weight of the package's modules has in transformers' ``EncodecModel``."""
    name = (
        name.replace("quantizer.vq.", "quantizer.").replace("._codebook.", ".codebook.").replace(".model.", ".layers.")
    )
    return name.replace(".convtr.convtr.", ".conv.").replace(".conv.conv.", ".conv.")


def _plain(part: Any, name: str) -> dict[str, Any]:
    """A part of a configuration, in which nothing refers to others any more."""
    if not OmegaConf.is_dict(part):
        raise KeyError(f"it has no {name}")
    return {str(key): value for key, value in OmegaConf.to_container(part, resolve=True).items()}  # type: ignore[union-attr]


def _recurrent(layers: nn.Sequential, otherwise: int) -> int:
    """Which of the layers is recurrent, and ``otherwise`` if none is: one that runs at the rate of the codes."""
    return next((number for number, layer in enumerate(layers) if hasattr(layer, "lstm")), otherwise)


def _fill(network: nn.Module, state: Any, path: Path) -> None:
    """Give the network all its weights, named as in the package or in transformers, weight norm folded in."""
    for layer in network.modules():
        if hasattr(layer, "weight_g"):
            with _old_weight_norm():
                nn.utils.remove_weight_norm(layer)
    names = {_in_transformers(name): name for name in network.state_dict()}
    with refusing(f"{path} does not hold the weights of an EnCodec"):
        folded = fold_weight_norm({name: value.float() for name, value in state.items()})
        network.load_state_dict({names.get(name, name): value for name, value in folded.items()})
