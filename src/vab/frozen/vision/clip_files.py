"""Models of open_clip: the names that users give them, and the files of their weights."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vab.extras import install_hint
from vab.frozen.weight_files.catalogue import VISION
from vab.frozen.weight_files.downloading import cached, fetch, from_hub, is_offline
from vab.frozen.weight_files.published import folders
from vab.frozen.weight_files.reading import is_torchscript, read_json
from vab.spec import UserError

DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OPTIONS = {layer: ("layer", layer) for layer in ("projected", "pooled")} | {
    dtype: ("dtype", dtype) for dtype in DTYPES
}
_HUB, _LOCAL = "hf-hub:", "local-dir:"
_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
"""Possible names of a folder's file of weights, the preferred one first, as in open_clip."""
_CONFIG = "open_clip_config.json"


@dataclass(frozen=True)
class Wanted:
    """A vision encoder as a user names it."""

    model: str
    """For open_clip: a name, or with its scheme hf-hub: or local-dir:."""
    tag: str
    """Tag of the weights of a model that is given by name."""
    layer: str = "projected"
    """``projected``, or ``pooled``: before the last projection."""
    normalised: bool = False
    """Whether vectors are scaled to unit length."""
    dtype: str = ""
    """Floating-point type of the computation; empty if the device decides."""

    @property
    def name(self) -> str:
        """MODEL/TAG."""
        return f"{self.model}/{self.tag}"


def parse(name: str) -> Wanted:
    """Read the name of a vision encoder: MODEL/TAG, hf-hub:OWNER/NAME or local-dir:FOLDER; then options after commas.

    Raises:
        UserError: If it is not of this form.
    """
    model, *options = (part.strip() for part in name.split(","))
    chosen: dict[str, Any] = {}
    for option in options:
        if option != "normalised" and option not in _OPTIONS:
            raise UserError(
                f"vision encoder {name}: unknown option {option!r}: there is {', '.join([*_OPTIONS, 'normalised'])}"
            )
        key, value = _OPTIONS.get(option, ("normalised", True))
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
    """The file of a model's weights, and the arguments with which open_clip makes the model."""

    model: str
    file: Path
    config: dict[str, Any]
    """open_clip's ``model_cfg``."""
    described_in: str
    """The source of that, in words."""
    preprocessing: dict[str, Any] | None
    quick_gelu: bool


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
    """Find a model's weights; they are fetched if they are absent, unless the user forbids it.

    Args:
        wanted: The model.
        weights: A file given by the user, or for hf-hub: a folder.
        open_clip: The module.

    Raises:
        UserError: If there is no such model, or its weights are absent or in a form that is not read.
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
    settings = open_clip.get_pretrained_cfg(wanted.model, wanted.tag)
    config = open_clip.get_model_config(wanted.model)
    quick_gelu = bool(settings.get("quick_gelu"))
    if config.get("quick_gelu") and not quick_gelu:
        plain = f"{wanted.model.removesuffix('-quickgelu')}/{wanted.tag}"
        raise UserError(f"{wanted.model} has QuickGELU, its weights {wanted.tag} were trained without: type {plain}")
    keys = open_clip.transform.PreprocessCfg().__dict__
    preprocessing = {key: value for key, value in settings.items() if key in keys and value is not None}
    file = weights or file_of_tag(wanted, settings, open_clip)
    if weights is not None and weights.is_file() and is_torchscript(weights):
        raise _torchscript(wanted, weights, settings)
    if file.suffix in (".npz", ".npy"):
        raise UserError(f"{file} is in big_vision's form, which is not read: take the same model by hf-hub:timm/NAME")
    return Place(wanted.model, file, config, "its name", preprocessing, quick_gelu)


def file_of_tag(wanted: Wanted, settings: dict[str, Any], open_clip: Any) -> Path:
    """Find or fetch the file of weights of a model and a tag; ``settings`` are open_clip's ``pretrained_cfg``.

    Raises:
        UserError: If it is absent, and cannot be fetched.
    """
    repository, _, own_name = settings.get("hf_hub", "").rpartition("/")
    address = settings.get("url", "").rpartition("/")[2]
    hub_names = [own_name] if own_name else [name for name in _WEIGHTS if name.startswith("open_clip")]
    names = [f"{wanted.name}{suffix}" for suffix in (".safetensors", ".bin", ".pt")]
    names += [f"{repository.rpartition('/')[2]}/{name}" for name in hub_names if repository]
    names += [address] if address else []
    present = [folder / name for folder in folders() for name in names if (folder / name).is_file()]
    for path in present:
        if not is_torchscript(path):
            return path
    for name in hub_names if repository else []:
        if found := cached(repository, (name,)):
            return found
    if present and is_offline():
        raise _torchscript(wanted, present[0], settings)
    source = repository or address
    problem = f"vision encoder {wanted.name} needs its weights ({source} as published): they are not there"
    advice = f"put them into a folder named by VAB_WEIGHTS as {names[0]}"
    if wanted.name in VISION:
        advice += f" (where there is a network: vab weights fetch --names {wanted.name} --out FOLDER)"
    return fetch(problem, advice, lambda _: open_clip.download_pretrained(settings), source)


def _torchscript(wanted: Wanted, path: Path, settings: dict[str, Any]) -> UserError:
    """The error for a file in the form in which OpenAI published CLIP."""
    repository = settings.get("hf_hub", "").rpartition("/")[0]
    instead = f"take open_clip_model.safetensors of {repository} on a model hub" if repository else "take another form"
    return UserError(
        f"{path} is TorchScript, which holds a program and is not read: for vision encoder {wanted.name} {instead}, "
        f"as {wanted.name}.safetensors in a folder named by VAB_WEIGHTS"
    )


def _hub_folder(repository: str) -> Path:
    """Folder with configuration and weights of a repository: below $VAB_WEIGHTS, else in the hub's cache."""
    name = repository.rpartition("/")[2]
    for folder in folders():
        if (folder / name / _CONFIG).is_file():
            return folder / name
    for file in _WEIGHTS:
        if found := cached(repository, (_CONFIG, file)):
            return found
    advice = f"put {_CONFIG} and the weights into a folder {name} in a folder named by VAB_WEIGHTS"
    problem = f"vision encoder hf-hub:{repository} is not in the hub's cache"
    return fetch(problem, advice, _from_hub, repository)


def _from_hub(repository: str) -> Path:
    """Download the configuration and the weights of a repository as `from_hub`, which documents the errors."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    from_hub(repository, [_CONFIG])
    for name in _WEIGHTS[:-1]:
        with suppress(RemoteEntryNotFoundError):  # a repository has one of these; its configuration does not say which
            return from_hub(repository, [_CONFIG, name])
    return from_hub(repository, [_CONFIG, _WEIGHTS[-1]])


def _of_folder(folder: Path, name: str = "") -> Place:
    """A folder as on the hub, whose configuration describes the model and how pixels are prepared.

    Raises:
        UserError: If the configuration or the weights are missing, or the configuration is incomplete.
    """
    config = folder / _CONFIG
    if not config.is_file():
        problem = f"there is no {config}, which says what the model is and how pixels are prepared"
        raise UserError(f"{name or folder}: {problem if folder.is_dir() else f'there is no folder {folder}'}")
    settings = read_json(config)
    if "model_cfg" not in settings:
        raise UserError(f"{config} lacks model_cfg, got {', '.join(settings)}; fetch it again")
    model, preprocessing = (
        part if isinstance(part := settings.get(key), dict) else {} for key in ("model_cfg", "preprocess_cfg")
    )
    if missing := [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model]:
        raise UserError(f"{config}: its model_cfg lacks {', '.join(missing)}; fetch it again")
    if not {"mean", "std"} <= preprocessing.keys():
        raise UserError(
            f"{config} does not say how pixels are prepared (preprocess_cfg: mean, std, interpolation, resize_mode):"
            " open_clip would silently take CLIP's, which is wrong for other models; add it"
        )
    for file in (folder / known for known in _WEIGHTS):
        if file.is_file():
            return Place(f"{_LOCAL}{folder}", file, model, str(config), None, False)
    raise UserError(f"{folder} has no file of weights: expected one of {', '.join(_WEIGHTS)}")
