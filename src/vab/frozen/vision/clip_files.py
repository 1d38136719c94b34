"""Models of open_clip: what a user calls them, and where their weights are."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vab.extras import install_hint
from vab.frozen.weight_files.catalogue import MODEL_CARD, VISION
from vab.frozen.weight_files.downloading import cached, fetch, from_hub, is_offline
from vab.frozen.weight_files.published import folders
from vab.frozen.weight_files.reading import is_torchscript, read_json
from vab.spec import UserError

_LAYERS = ("projected", "pooled")
DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HUB, _LOCAL = "hf-hub:", "local-dir:"
_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
"""What a folder's file of weights may be called, the preferred name first, as open_clip does it."""
_CONFIG = "open_clip_config.json"


@dataclass(frozen=True)
class Wanted:
    """A vision encoder as a user names it."""

    model: str
    """For open_clip: a name, or with its scheme hf-hub: or local-dir:."""
    tag: str
    """Of the weights, where the model is called by name."""
    layer: str = "projected"
    """``projected``, or ``pooled``: before the last projection."""
    normalised: bool = False
    """To unit length."""
    dtype: str = ""
    """In which the network computes; empty where the device decides."""


def parse(name: str) -> Wanted:
    """Read the name of a vision encoder: MODEL/TAG, hf-hub:OWNER/NAME or local-dir:FOLDER; then options after commas.

    Raises:
        UserError: If it is not of this form.
    """
    model, *options = (part.strip() for part in name.split(","))
    known = {layer: ("layer", layer) for layer in _LAYERS} | {dtype: ("dtype", dtype) for dtype in DTYPES}
    chosen: dict[str, Any] = {}
    for option in options:
        if option != "normalised" and option not in known:
            raise UserError(
                f"vision encoder {name}: unknown option {option!r}: there is {', '.join([*known, 'normalised'])}"
            )
        key, value = known.get(option, ("normalised", True))
        if key in chosen:
            raise UserError(f"vision encoder {name}: {option!r} and {chosen[key]!r} do not go together")
        chosen[key] = value
    if model.startswith((_HUB, _LOCAL)):
        return Wanted(model, "", **chosen)
    stem, _, tag = model.partition("/")
    if not stem or not tag:
        raise UserError(
            f"vision encoder {name!r}: expected MODEL/TAG such as EVA02-L-14-336/merged2b_s6b_b61k, "
            "hf-hub:OWNER/NAME, local-dir:FOLDER, or tiny"
        )
    return Wanted(stem, tag, **chosen)


@dataclass(frozen=True)
class Place:
    """Where the weights are, and what open_clip is to be told."""

    model: str
    file: Path
    config: dict[str, Any]
    """open_clip's ``model_cfg``."""
    described_in: str
    """Where that is from, in words."""
    preprocessing: dict[str, Any] | None
    quick_gelu: bool
    licence: str


def package() -> Any:
    """The module open_clip.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"this vision encoder needs a package ({error}): {install_hint('clip')}") from error
    return open_clip


def place_of(wanted: Wanted, weights: Path | None, open_clip: Any) -> Place:
    """Where a model's weights are; they are fetched if they are nowhere, unless offline.

    Args:
        wanted: The model.
        weights: Where the user says that they are: a file, or for hf-hub: a folder.
        open_clip: The module.

    Raises:
        UserError: If there is no such model, or its weights are absent or of a form that is not read.
    """
    if wanted.model.startswith(_LOCAL):
        if weights is not None:
            raise UserError(f"{wanted.model} is a folder of weights already: leave out {weights}")
        return _of_folder(Path(wanted.model.removeprefix(_LOCAL)).expanduser())
    if wanted.model.startswith(_HUB):
        return _of_folder(weights or _hub_folder(wanted.model.removeprefix(_HUB)), wanted.model)
    if wanted.model not in open_clip.list_models():
        close = [name for name in open_clip.list_models() if wanted.model.lower() in name.lower()]
        raise UserError(f"open_clip has no model {wanted.model!r}" + (f": did you mean {close[0]}?" if close else ""))
    tags = open_clip.list_pretrained_tags_by_model(wanted.model)
    if wanted.tag not in tags:
        raise UserError(
            f"open_clip has no weights {wanted.tag!r} of {wanted.model}, it has: {', '.join(tags) or 'none'}"
        )
    facts = open_clip.get_pretrained_cfg(wanted.model, wanted.tag)
    config = open_clip.get_model_config(wanted.model)
    trained_with, built_with = bool(facts.get("quick_gelu")), bool(config.get("quick_gelu"))
    if built_with and not trained_with:
        plain = f"{wanted.model.removesuffix('-quickgelu')}/{wanted.tag}"
        raise UserError(f"{wanted.model} has QuickGELU, its weights {wanted.tag} were trained without: type {plain}")
    keys = open_clip.transform.PreprocessCfg().__dict__
    preprocessing = {key: value for key, value in facts.items() if key in keys and value is not None}
    file = weights or file_of_tag(wanted, facts, open_clip)
    if weights is not None and weights.is_file() and is_torchscript(weights):
        raise UserError(_not_torchscript(wanted, weights, facts))
    if file.suffix in (".npz", ".npy"):
        raise UserError(f"{file} is in big_vision's form, which is not read: take the same model by hf-hub:timm/NAME")
    return Place(wanted.model, file, config, "its name", preprocessing, trained_with, MODEL_CARD)


def file_of_tag(wanted: Wanted, facts: dict[str, Any], open_clip: Any) -> Path:
    """The file of weights of a name and a tag."""
    repository, _, own = facts.get("hf_hub", "").rpartition("/")
    file_names = [own] if own else [name for name in _WEIGHTS if name.startswith("open_clip")]
    url_name = facts.get("url", "").rpartition("/")[2]
    names = [f"{wanted.model}/{wanted.tag}{suffix}" for suffix in (".safetensors", ".bin", ".pt")]
    names += [f"{repository.rpartition('/')[2]}/{name}" for name in file_names if repository]
    names += [url_name] if url_name else []
    there = [folder / name for folder in folders() for name in names if (folder / name).is_file()]
    for path in there:
        if not is_torchscript(path):
            return path
    for name in file_names if repository else []:
        if found := cached(repository, (name,)):
            return found
    if there and is_offline():
        raise UserError(_not_torchscript(wanted, there[0], facts))
    where = repository or url_name
    problem = f"vision encoder {wanted.model}/{wanted.tag} needs its weights ({where} as published): they are not there"
    advice = f"put them into a folder named by VAB_WEIGHTS as {names[0]}"
    if (name := f"{wanted.model}/{wanted.tag}") in VISION:
        advice += f" (where there is a network: vab weights fetch --names {name} --out FOLDER)"
    return fetch(problem, advice, lambda _: open_clip.download_pretrained(facts), where)


def _not_torchscript(wanted: Wanted, path: Path, facts: dict[str, Any]) -> str:
    """What to take instead of the form in which OpenAI published CLIP."""
    name = f"{wanted.model}/{wanted.tag}"
    repository = facts.get("hf_hub", "").rpartition("/")[0]
    instead = f"take open_clip_model.safetensors of {repository} on a model hub" if repository else "take another form"
    return (
        f"{path} is TorchScript, which holds a program and is not read: for vision encoder {name} {instead}, "
        f"as {name}.safetensors in a folder named by VAB_WEIGHTS"
    )


def _hub_folder(repository: str) -> Path:
    """Folder with configuration and weights of a repository: below $VAB_WEIGHTS, else in the hub's cache."""
    own = repository.rpartition("/")[2]
    for folder in folders():
        if (folder / own / _CONFIG).is_file():
            return folder / own
    for name in _WEIGHTS:
        if found := cached(repository, (_CONFIG, name)):
            return found
    advice = f"put {_CONFIG} and the weights into a folder {own} in a folder named by VAB_WEIGHTS"
    problem = f"vision encoder hf-hub:{repository} is not in the hub's cache"
    return fetch(problem, advice, _from_hub, repository)


def _from_hub(repository: str) -> Path:
    """Download the configuration and the weights of a repository as `from_hub`, which says what it raises."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    from_hub(repository, [_CONFIG])
    for name in _WEIGHTS[:-1]:
        with suppress(RemoteEntryNotFoundError):  # a repository has one of these; its configuration does not say which
            return from_hub(repository, [_CONFIG, name])
    return from_hub(repository, [_CONFIG, _WEIGHTS[-1]])


def _of_folder(folder: Path, name: str = "") -> Place:
    """A folder as on the hub, whose configuration says all."""
    config = folder / _CONFIG
    if not config.is_file():
        problem = f"there is no {config}, which says what the model is and how pixels are prepared"
        raise UserError(f"{name or folder}: {problem if folder.is_dir() else f'there is no folder {folder}'}")
    facts = read_json(config)
    if "model_cfg" not in facts:
        raise UserError(f"{config} lacks model_cfg, got {', '.join(facts)}; fetch it again")
    parts = [_part(facts, key) for key in ("model_cfg", "preprocess_cfg")]
    if missing := [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in parts[0]]:
        raise UserError(f"{config}: its model_cfg lacks {', '.join(missing)}; fetch it again")
    if not {"mean", "std"} <= parts[1].keys():
        raise UserError(
            f"{config} does not say how pixels are prepared (preprocess_cfg: mean, std, interpolation, resize_mode):"
            " open_clip would silently take CLIP's, which is wrong for other models; add it"
        )
    for file in (folder / known for known in _WEIGHTS):
        if file.is_file():
            return Place(f"{_LOCAL}{folder}", file, parts[0], str(config), None, False, MODEL_CARD)
    raise UserError(f"{folder} has no file of weights: expected one of {', '.join(_WEIGHTS)}")


def _part(facts: dict[str, Any], key: str) -> dict[str, Any]:
    """A part of a configuration; empty where it is none."""
    part = facts.get(key)
    return part if isinstance(part, dict) else {}
