"""Random weights in the layouts in which the codecs' weights are published, and the networks that they are of."""

import json
import math
import warnings

import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.nn.utils import weight_norm

AUDIOCRAFT = {
    "compression_model": "encodec",
    "sample_rate": 16000,
    "channels": 1,
    "encodec": {
        "autoencoder": "seanet",
        "quantizer": "rvq",
        "sample_rate": 16000,
        "channels": 1,
        "causal": False,
        "renormalize": False,
    },
    "seanet": {
        "dimension": 16,
        "channels": 1,
        "causal": False,
        "n_filters": 4,
        "n_residual_layers": 1,
        "ratios": [8, 5, 4, 2],
        "activation": "ELU",
        "activation_params": {"alpha": 1.0},
        "norm": "weight_norm",
        "norm_params": {},
        "kernel_size": 7,
        "residual_kernel_size": 3,
        "last_kernel_size": 7,
        "dilation_base": 2,
        "pad_mode": "constant",
        "true_skip": True,
        "compress": 2,
        "lstm": 2,
        "disable_norm_outer_blocks": 0,
        "decoder": {"trim_right_ratio": 1.0, "final_activation": None, "final_activation_params": None},
        "encoder": {},
    },
    "rvq": {"n_q": 4, "bins": 64, "q_dropout": False, "decay": 0.99, "kmeans_init": True},
}
"""AudioGen's configuration as audiocraft has it (config/model/encodec: default, encodec_large_nq4_s320), smaller."""

MUSICGEN = AUDIOCRAFT | {"sample_rate": 32000, "seanet": AUDIOCRAFT["seanet"] | {"ratios": [8, 5, 4, 4]}}
"""MusicGen's (config/model/encodec/encodec_large_nq4_s640), smaller."""


def sounds(count, samples, seed=0):
    """(B, 1, N): a tone and noise in each, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    pitch = 0.01 + 0.2 * torch.rand(count, 1, 1, generator=generator)
    tone = 0.3 * torch.sin(2 * torch.pi * pitch * torch.arange(samples))
    return tone + 0.1 * torch.randn(count, 1, samples, generator=generator)


def settle_quantiser(quantizer, encoder, rate):
    """Entries among what the encoder gives, so that all are in use and no choice is by accident."""
    with torch.no_grad():
        left = encoder(sounds(2, 2 * rate, 9)).transpose(1, 2).flatten(0, 1)
        for number, layer in enumerate(quantizer.vq.layers):
            book = layer._codebook
            spread = left.std(dim=0) * 0.6**number
            book.embed.copy_(left.mean(dim=0) * (number == 0) + spread * torch.randn(book.embed.shape))
            book.embed_avg.copy_(book.embed)
            book.inited.fill_(1)
            book.cluster_size.fill_(1)


def encodec_24khz(path):
    """The package's own 24 kHz model at full size; its weights are written as its authors publish them."""
    from encodec import EncodecModel

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = EncodecModel.encodec_model_24khz(pretrained=False).eval()
    settle_quantiser(model.quantizer, model.encoder, 24000)
    torch.save(model.state_dict(), path)
    return model


def audiogen(path, config=None):
    """A compression_state_dict.bin as audiocraft exports it; gives its ``best_state``."""
    from vab.frozen.codec.encodec import Architecture, build

    config = config or AUDIOCRAFT
    torch.manual_seed(4)
    seanet = {name: value for name, value in config["seanet"].items() if name not in ("encoder", "decoder")}
    seanet.pop("disable_norm_outer_blocks")
    rate = config["sample_rate"]
    sizes = config["rvq"]["n_q"], config["rvq"]["bins"]
    network = build(Architecture(rate, *sizes, seanet, config["seanet"]["decoder"])).eval()
    settle_quantiser(network["quantizer"], network["encoder"], rate)
    state = network.state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    # As audiocraft dumps it: parts refer to others, and some to what only audiocraft can resolve.
    dumped = config | {
        "encodec": config["encodec"] | {"sample_rate": "${sample_rate}", "channels": "${channels}"},
        "seanet": config["seanet"] | {"channels": "${channels}", "causal": "${encodec.causal}"},
        "dset": {"train": "${hydra:job.name}", "valid": "???"},
    }
    torch.save({"best_state": state, "xp.cfg": yaml.safe_dump(dumped), "version": "1.0.0", "exported": True}, path)
    return state


def transformers_encodec(state, config=None):
    """Transformers' own EnCodec with the weights of an audiocraft file: a second implementation."""
    from transformers import EncodecConfig, EncodecModel

    config = config or AUDIOCRAFT
    seanet, rvq = config["seanet"], config["rvq"]
    rate = config["sample_rate"] / math.prod(seanet["ratios"]) * math.log2(rvq["bins"]) / 1000
    settings = EncodecConfig(
        target_bandwidths=[rate * rvq["n_q"]],
        sampling_rate=config["sample_rate"],
        hidden_size=seanet["dimension"],
        num_filters=seanet["n_filters"],
        upsampling_ratios=seanet["ratios"],
        use_causal_conv=False,
        pad_mode="constant",
        use_conv_shortcut=False,
        codebook_size=rvq["bins"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = EncodecModel(settings).eval()
    theirs = model.state_dict()
    wanted = {}
    for name, value in state.items():
        # encoder.model.3.conv.conv.weight_g -> encoder.layers.3.conv.parametrizations.weight.original0
        name = (
            name.replace(".model.", ".layers.")
            .replace("quantizer.vq.", "quantizer.")
            .replace("._codebook.", ".codebook.")
        )
        name = name.replace(".convtr.convtr.", ".conv.").replace(".conv.conv.", ".conv.")
        if name not in theirs:
            name = name.replace("weight_g", "parametrizations.weight.original0")
            name = name.replace("weight_v", "parametrizations.weight.original1")
        wanted[name] = value
    model.load_state_dict(wanted)
    return model


def encodec_of_hub(folder, older=True):
    """A folder as the hub has MusicGen's EnCodec; gives transformers' model.

    Args:
        folder: To write.
        older: Names of weight norm as transformers 4 wrote them, which the published folder has.
    """
    from safetensors.torch import load_file, save_file

    model = transformers_encodec(
        audiogen(folder.with_name("musicgen") / "compression_state_dict.bin", MUSICGEN), MUSICGEN
    )
    model.save_pretrained(folder)
    if older:
        names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        weights = load_file(folder / "model.safetensors")
        for newer, name in names.items():
            weights = {key.replace(newer, name): value for key, value in weights.items()}
        save_file(weights, folder / "model.safetensors")
    return model


DAC = {"encoder_dim": 4, "encoder_rates": [2, 4, 5, 8], "decoder_dim": 32, "decoder_rates": [8, 5, 4, 2]}
DAC |= {"n_codebooks": 12, "codebook_size": 64, "codebook_dim": 8, "quantizer_dropout": 0.5, "sample_rate": 16000}
"""Of descript's 16 kHz model, but narrower and with fewer entries."""

DAC24 = DAC | {"n_codebooks": 32, "sample_rate": 24000}
DAC44 = DAC | {"encoder_rates": [2, 4, 8, 8], "decoder_rates": [8, 8, 4, 2], "n_codebooks": 9, "sample_rate": 44100}
"""Of descript's 24 and 44.1 kHz models (conf/final/24khz.yml, 44khz.yml), narrower as the first."""


def dac_config(numbers=None):
    from transformers import DacConfig

    numbers = numbers or DAC
    return DacConfig(
        encoder_hidden_size=numbers["encoder_dim"],
        downsampling_ratios=numbers["encoder_rates"],
        decoder_hidden_size=numbers["decoder_dim"],
        n_codebooks=numbers["n_codebooks"],
        codebook_size=numbers["codebook_size"],
        codebook_dim=numbers["codebook_dim"],
        sampling_rate=numbers["sample_rate"],
    )


def settle_dac(model):
    """Weights of some size: transformers' own beginning is so small that all sounds are silence to it."""
    torch.manual_seed(6)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
                fan = layer.weight[0].numel() if isinstance(layer, nn.Conv1d) else layer.weight[:, 0].numel() / 2
                layer.weight.normal_(0, (0.5 if name.startswith("decoder") else 0.9) / math.sqrt(fan))
                layer.bias.normal_(0, 0.05)
            elif isinstance(layer, nn.Embedding):
                layer.weight.normal_()


def dac_of_hub(folder, numbers=None):
    """A folder as transformers writes it for the hub; gives the model."""
    from transformers import DacModel

    model = DacModel(dac_config(numbers)).eval()
    settle_dac(model)
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "dac"
    return model


class Snake(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(0.5 + torch.rand(1, channels, 1))

    def forward(self, x):
        return x + (torch.sin(self.alpha * x) ** 2) / (self.alpha + 1e-9)


class Unit(nn.Module):
    def __init__(self, width, dilation):
        super().__init__()
        self.block = nn.Sequential(
            Snake(width),
            weight_norm(nn.Conv1d(width, width, 7, dilation=dilation, padding=3 * dilation)),
            Snake(width),
            weight_norm(nn.Conv1d(width, width, 1)),
        )

    def forward(self, x):
        return x + self.block(x)


class Block(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.block = nn.Sequential(*layers)

    def forward(self, x):
        return self.block(x)


class Half(nn.Module):
    """Either half: the encoder calls its layers block, the decoder model."""

    def __init__(self, name, *layers):
        super().__init__()
        setattr(self, name, nn.Sequential(*layers))
        self.run = name

    def forward(self, x):
        return getattr(self, self.run)(x)


class Level(nn.Module):
    def __init__(self, width, dim, size):
        super().__init__()
        self.in_proj = weight_norm(nn.Conv1d(width, dim, 1))
        self.out_proj = weight_norm(nn.Conv1d(dim, width, 1))
        self.codebook = nn.Embedding(size, dim)


class DescriptDac(nn.Module):
    """DAC as descript names its weights, written anew from its paper: a second implementation."""

    def __init__(self, numbers=None):
        super().__init__()
        numbers = numbers or DAC
        width, rates = numbers["encoder_dim"], numbers["encoder_rates"]
        layers = [weight_norm(nn.Conv1d(1, width, 7, padding=3))]
        for rate in rates:
            down = weight_norm(nn.Conv1d(width, 2 * width, 2 * rate, stride=rate, padding=math.ceil(rate / 2)))
            layers.append(Block(*(Unit(width, d) for d in (1, 3, 9)), Snake(width), down))
            width *= 2
        layers += [Snake(width), weight_norm(nn.Conv1d(width, width, 3, padding=1))]
        self.encoder = Half("block", *layers)
        self.quantizer = nn.Module()
        self.quantizer.quantizers = nn.ModuleList(
            Level(width, numbers["codebook_dim"], numbers["codebook_size"]) for _ in range(numbers["n_codebooks"])
        )
        channels = numbers["decoder_dim"]
        layers = [weight_norm(nn.Conv1d(width, channels, 7, padding=3))]
        for rate in rates[::-1]:
            half = channels // 2
            up = weight_norm(nn.ConvTranspose1d(channels, half, 2 * rate, stride=rate, padding=math.ceil(rate / 2)))
            layers.append(Block(Snake(channels), up, *(Unit(half, d) for d in (1, 3, 9))))
            channels = half
        layers += [Snake(channels), weight_norm(nn.Conv1d(channels, 1, 7, padding=3)), nn.Tanh()]
        self.decoder = Half("model", *layers)

    def encode(self, waveform):
        left, codes = self.encoder(waveform), []
        for level in self.quantizer.quantizers:
            seen = F.normalize(level.in_proj(left), dim=1)  # (B, dim, T)
            similar = torch.einsum("bdt,sd->bts", seen, F.normalize(level.codebook.weight, dim=1))
            code = similar.argmax(dim=-1)
            left = left - level.out_proj(level.codebook(code).transpose(1, 2))
            codes.append(code)
        return torch.stack(codes, dim=1)

    def decode(self, codes):
        levels = list(self.quantizer.quantizers)[: codes.shape[1]]
        parts = [level.out_proj(level.codebook(codes[:, k]).transpose(1, 2)) for k, level in enumerate(levels)]
        return self.decoder(sum(parts))


def dac_of_descript(path, numbers=None):
    """A .pth as descript publishes it; gives the second implementation."""
    numbers = numbers or DAC
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = DescriptDac(numbers).eval()
    with torch.no_grad():
        for name, layer in model.named_modules():
            if hasattr(layer, "weight_g"):
                layer.weight_v.normal_()
                layer.weight_g.fill_(0.5 if name.startswith("decoder") else 0.9)
                layer.bias.normal_(0, 0.05)
    metadata = {"kwargs": dict(numbers, latent_dim=None), "logs": {}}
    torch.save({"state_dict": model.state_dict(), "metadata": metadata}, path)
    return model
