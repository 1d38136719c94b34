"""Names of all networks that vab loads, with their published weights: source, licence, size. It imports no torch."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from vab import UserError
from vab.frozen.weight_files.published import Published

_NON_COMMERCIAL = "CC BY-NC 4.0: not for commercial use"
_ENCODEC_24KHZ = Published(
    "codec encodec_24khz",
    ("encodec_24khz-d7cc33bc.th",),
    "the package encodec (Defossez et al.)",
    licence=_NON_COMMERCIAL,
    url="https://dl.fbaipublicfiles.com/encodec/v0/encodec_24khz-d7cc33bc.th",
    sha256="d7cc33bc",
    extra="encodec",
)
_AUDIOGEN = Published(
    "codec audiogen_16khz",
    ("audiogen_16khz/compression_state_dict.bin", "compression_state_dict.bin"),
    "a model hub as facebook/audiogen-medium",
    licence=_NON_COMMERCIAL,
    repository="facebook/audiogen-medium",
    files=("compression_state_dict.bin",),
    extra="encodec",
)
_ENCODEC_32KHZ = Published(
    "codec encodec_32khz",
    ("encodec_32khz", "encodec_32khz/compression_state_dict.bin"),
    "a model hub as facebook/encodec_32khz (a folder), or as compression_state_dict.bin of facebook/musicgen-small",
    licence=_NON_COMMERCIAL,
    repository="facebook/encodec_32khz",
    files=("config.json", "model.safetensors"),
    extra="encodec",
)
# Release 0.0.1 calls its file weights.pth; the package descript-audio-codec saves it under the last of these names.
_DAC = {
    f"dac_{rate}": Published(
        f"codec dac_{rate}",
        (f"dac_{rate}", f"weights_{rate}.pth", f"weights_{rate}_8kbps_{release}.pth"),
        f"a model hub as descript/dac_{rate} (a folder), or by descript-audio-codec, release {release} "
        f"(weights_{rate}.pth)",
        licence="MIT licence",
        repository=f"descript/dac_{rate}",
        files=("config.json", "model.safetensors"),
        extra="dac",
    )
    for rate, release in (("16khz", "0.0.5"), ("24khz", "0.0.4"), ("44khz", "0.0.1"))
}
_VGGISH = Published(
    "judge vggish",
    ("vggish-10086976.pth",),
    "release v0.1 of harritaylor/torchvggish",
    licence="Apache-2.0",
    url="https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth",
    sha256="10086976",
)
_PANNS = {
    name: Published(
        f"judge {name}",
        (f"{file}.pth", f"{file.replace('=', '%3D')}.pth"),
        "Zenodo record 3987831 (Kong et al., PANNs)",
        licence="CC BY 4.0",
        url=f"https://zenodo.org/record/3987831/files/{file.replace('=', '%3D')}.pth",
        sha256=sha256,
        extra="fad",
    )
    for name, file, sha256 in (
        ("panns_16k", "Cnn14_16k_mAP=0.438", "e2ee543a27919542c2ea03eabaa70b24dcd4e6c8e05621de6b67a94e4c5058e6"),
        ("panns_32k", "Cnn14_mAP=0.431", "0dc499e40e9761ef5ea061ffc77697697f277f6a960894903df3ada000e34b31"),
    )
}
_PASST = Published(
    "judge passt",
    ("passt-s-f128-p16-s10-ap.476-swa.pt",),
    "release v0.0.1-audioset of kkoutini/PaSST",
    licence="Apache-2.0",
    url="https://github.com/kkoutini/PaSST/releases/download/v0.0.1-audioset/passt-s-f128-p16-s10-ap.476-swa.pt",
    sha256="302903fa8c4aee817b11dc982da0b29aaf8d11a3e722420476d0a12c9db70c2c",
    extra="passt",
)
_CLAP = Published(
    "judge clap",
    ("clap-htsat-unfused",),
    "a model hub as laion/clap-htsat-unfused (a folder)",
    licence="Apache-2.0",
    repository="laion/clap-htsat-unfused",
    files=("config.json", "model.safetensors", "preprocessor_config.json"),
    extra="dac",
)
MODEL_CARD = "the licence that its model card states"
_EVA = "EVA02-L-14-336/merged2b_s6b_b61k"
_EVA_REPOSITORY = "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k"
# Of open_clip's models, which it finds by itself, the one that the shipped recipes name.
_EVA02 = Published(
    f"vision encoder {_EVA}",
    (
        *(f"{_EVA}{suffix}" for suffix in (".safetensors", ".bin", ".pt")),
        *(
            f"{_EVA_REPOSITORY.partition('/')[2]}/open_clip_{name}"
            for name in ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")
        ),
    ),
    f"a model hub as {_EVA_REPOSITORY}",
    licence=MODEL_CARD,
    repository=_EVA_REPOSITORY,
    files=("open_clip_model.safetensors",),
    extra="clip",
)

BANDWIDTHS = {"1.5": 2, "3": 4, "6": 8, "12": 16, "24": 32}
"""Bandwidths of encodec_24khz, kbit/s, and the number of levels of each."""
PUBLISHED: dict[str, dict[str, Published | None]] = {
    "codec": {
        "tiny": None,
        "tiny8": None,
        "audiogen_16khz": _AUDIOGEN,
        "encodec_32khz": _ENCODEC_32KHZ,
        **{f"encodec_24khz:{kbits}": _ENCODEC_24KHZ for kbits in BANDWIDTHS},
        **_DAC,
    },
    "vision encoder": {"tiny": None, _EVA: _EVA02},
    "judge": {
        "tiny": None,
        "vggish": _VGGISH,
        "vggish_relu": _VGGISH,
        **_PANNS,
        "passt": _PASST,
        "clap": _CLAP,
    },
}
"""The weights of each network, by kind and by the loader's name; None if they ship with the package."""
CODECS, VISION, JUDGES = (tuple(networks) for networks in PUBLISHED.values())
"""Names of the loaders. Of vision encoders, those of the shipped recipes: `load_vision` knows all of open_clip's."""
CODEC_NUMBERS: dict[str, tuple[int, float, int, int]] = {
    "audiogen_16khz": (16000, 50.0, 4, 2048),
    "encodec_32khz": (32000, 50.0, 4, 2048),
    **{f"encodec_24khz:{kbits}": (24000, 75.0, levels, 1024) for kbits, levels in BANDWIDTHS.items()},
    "dac_16khz": (16000, 50.0, 12, 1024),
    "dac_24khz": (24000, 75.0, 32, 1024),
    "dac_44khz": (44100, 44100 / 512, 9, 1024),
}
"""Sample rate (Hz), steps per second, K and S of the published codecs, for callers that have codes and no weights."""


class Weights(NamedTuple):
    """One file, or folder, of weights, and the networks that use it."""

    kind: str
    """``codec``, ``vision encoder`` or ``judge``."""
    names: tuple[str, ...]
    """The loader's names of the networks."""
    published: Published | None
    """None if the weights ship with the package."""


def published_weights(kind: str, name: str) -> Published:
    """The published weights of a network of a kind in `PUBLISHED`, by the loader's name."""
    published = PUBLISHED[kind][name]
    assert published is not None
    return published


def all_weights() -> list[Weights]:
    """The weights of all networks that the loaders know by name, each file once."""
    found = []
    for kind, networks in PUBLISHED.items():
        files: dict[str, list[str]] = {}
        for name, published in networks.items():
            files.setdefault(published.name if published else name, []).append(name)
        found += [Weights(kind, tuple(names), networks[names[0]]) for names in files.values()]
    return found


def published_as(name: str) -> Published:
    """The published weights of a network, by the loader's name or by `Published.name`.

    Raises:
        UserError: If there is no such name, or nothing to fetch.
    """
    every = all_weights()
    known = {known: each.published for each in every for known in each.names}
    known |= {each.published.name: each.published for each in every if each.published}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        names = ", ".join(dict.fromkeys(each.published.name for each in every if each.published))
        more = "; other models of open_clip: hf download OWNER/NAME --local-dir FOLDER/NAME" if "/" in name else ""
        raise UserError(f"no weights are called {name!r}{hint}; there are {names}{more}")
    published = known[name]
    if published is None:
        raise UserError(f"{name} ships with vab: there is nothing to fetch")
    return published
