"""The image half of any model that open_clip knows: CLIP, EVA-CLIP, SigLIP 2, DFN, PE-Core and their like."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vab.frozen.published import Published, cached, fetch, folders, is_offline, sha256_of, tell_licence
from vab.frozen.vision import VisionEncoder, check_frames
from vab.spec import UserError

_LAYERS = ("projected", "pooled")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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
_CARD = "the licence that its model card states"
_EVA = "EVA02-L-14-336/merged2b_s6b_b61k"
_EVA_REPOSITORY = "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k"
PUBLISHED = {
    _EVA: Published(
        f"vision encoder {_EVA}",
        (
            *(f"{_EVA}{suffix}" for suffix in (".safetensors", ".bin", ".pt")),
            *(f"{_EVA_REPOSITORY.partition('/')[2]}/{name}" for name in _WEIGHTS[:3]),
        ),
        f"a model hub as {_EVA_REPOSITORY}",
        licence=_CARD,
        repository=_EVA_REPOSITORY,
        files=("open_clip_model.safetensors",),
        extra="clip",
    )
}
"""What the shipped recipes name, so that it can be fetched where open_clip, which knows all addresses, is not."""


class OpenClip(VisionEncoder):
    """One vector per frame from a model of open_clip.

    Pixels are prepared as the model's own configuration says, never by defaults: where a configuration does not say
    how, it is refused. A tag whose weights were trained with QuickGELU gets QuickGELU, whatever the model's name says.

    Args:
        name: The model, as `parse` reads it: "EVA02-L-14-336/merged2b_s6b_b61k", "hf-hub:timm/ViT-B-16-SigLIP2",
            "local-dir:FOLDER"; then, after commas, "pooled" (before the last projection; else projected),
            "normalised" (to unit length), "bf16" or "fp16".
        weights: File of a model called by name and tag, or folder like one of the hub for hf-hub; if None, it is
            looked for in the folder $VAB_WEIGHTS, then in the hub's cache; and fetched, unless offline.

    Raises:
        UserError: If the package is absent, the name unknown, or the weights absent or of another model.

    Source: Radford et al. 2021; Ilharco et al. 2021, "OpenCLIP".
    """

    def __init__(self, name: str, weights: Path | None = None) -> None:
        super().__init__()
        wanted = parse(name)
        open_clip = _package()
        place = _place(wanted, weights, open_clip)
        try:
            with _quiet():
                model = open_clip.create_model(
                    place.model,
                    load_weights=False,
                    force_quick_gelu=place.quick_gelu,
                    force_preprocess_cfg=place.preprocessing,
                    pretrained_text=False,
                )
            open_clip.load_checkpoint(model, str(place.file), strict=True)
        except (RuntimeError, KeyError, ValueError, OSError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise UserError(
                f"{place.file} does not hold the weights of {wanted.model}: {'; '.join(lines[:3])[:300]}"
            ) from error
        self.name, self.weight_hash = name, sha256_of(place.file)
        self.dtype = _DTYPES[wanted.dtype]
        self.precision = str(self.dtype).removeprefix("torch.")
        self.layer, self.normalised = wanted.layer, wanted.normalised
        self.visual: Any = model.visual.eval().to(self.dtype)
        settings = {key: _plain(value) for key, value in model.visual.preprocess_cfg.items()}
        self._preprocessor = ClipPreprocess(settings)
        self.preprocessing = (
            "open_clip "
            + ", ".join(f"{key} {value}" for key, value in settings.items())
            + (", QuickGELU" if _has_quick_gelu(self.visual) else "")
        )
        with torch.no_grad():
            height, width = self._preprocessor.size
            self.feature_dim = int(self._features(torch.zeros(1, 3, height, width, dtype=self.dtype)).shape[-1])
        tell_licence(f"vision encoder {wanted.model}", place.licence)

    def preprocessor(self) -> Callable[[np.ndarray], Tensor]:
        """`preprocess` without the network."""
        return self._preprocessor

    def _encode(self, pixels: Tensor) -> Tensor:
        features = self._features(pixels.to(self.dtype)).float()
        return F.normalize(features, dim=-1) if self.normalised else features

    def _features(self, pixels: Tensor) -> Tensor:
        """(M, 3, h, w) -> (M, C)."""
        visual = self.visual
        if self.layer == "projected":
            features = visual(pixels)
        elif hasattr(visual, "trunk"):
            features = visual.trunk.forward_head(visual.trunk.forward_features(pixels), pre_logits=True)
        elif getattr(visual, "proj", None) is not None:
            projection, visual.proj = visual.proj, None
            try:
                features = visual(pixels)
            finally:
                visual.proj = projection
        else:
            raise UserError(f"{self.name}: this model has no vector before a last projection: leave out pooled")
        got: Tensor = features[0] if isinstance(features, tuple) else features
        return got


@dataclass(frozen=True)
class ClipPreprocess:
    """Frames to pixels by open_clip's own evaluation transform; small, so that it can be sent to decode workers."""

    settings: dict[str, Any]
    """open_clip's ``preprocess_cfg``."""
    _transform: list[Any] = field(default_factory=list, compare=False, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pixels."""
        size = self.settings["size"]
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def __call__(self, frames: np.ndarray) -> Tensor:
        """(V, H, W, 3) uint8 -> (V, 3, h, w) float32."""
        from PIL import Image

        check_frames(frames)
        if not self._transform:
            from open_clip.transform import PreprocessCfg, image_transform_v2

            self._transform.append(image_transform_v2(PreprocessCfg(**self.settings), is_train=False))
        return torch.stack([self._transform[0](Image.fromarray(frame)) for frame in frames])

    def __reduce__(self) -> tuple[type[ClipPreprocess], tuple[dict[str, Any]]]:
        return ClipPreprocess, (self.settings,)


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
    dtype: str = "fp32"
    """In which the network computes."""


def parse(name: str) -> Wanted:
    """Read the name of a vision encoder: MODEL/TAG, hf-hub:OWNER/NAME or local-dir:FOLDER; then options after commas.

    Raises:
        UserError: If it is not of this form.
    """
    model, *options = (part.strip() for part in name.split(","))
    known = {layer: ("layer", layer) for layer in _LAYERS} | {dtype: ("dtype", dtype) for dtype in _DTYPES}
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
class _Place:
    """Where the weights are, and what open_clip is to be told."""

    model: str
    file: Path
    preprocessing: dict[str, Any] | None
    quick_gelu: bool
    licence: str


def _package() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"this vision encoder needs a package ({error}): pip install 'vab[clip]'") from error
    return open_clip


def _place(wanted: Wanted, weights: Path | None, open_clip: Any) -> _Place:
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
    trained_with, built_with = (
        bool(facts.get("quick_gelu")),
        bool(open_clip.get_model_config(wanted.model).get("quick_gelu")),
    )
    if built_with and not trained_with:
        plain = f"{wanted.model.removesuffix('-quickgelu')}/{wanted.tag}"
        raise UserError(f"{wanted.model} has QuickGELU, its weights {wanted.tag} were trained without: type {plain}")
    keys = open_clip.transform.PreprocessCfg().__dict__
    preprocessing = {key: value for key, value in facts.items() if key in keys and value is not None}
    return _Place(wanted.model, weights or _file_of_tag(wanted, facts, open_clip), preprocessing, trained_with, _CARD)


def _file_of_tag(wanted: Wanted, facts: dict[str, Any], open_clip: Any) -> Path:
    """The file of weights of a name and a tag."""
    repository, _, own = facts.get("hf_hub", "").rpartition("/")
    file_names = [own] if own else [name for name in _WEIGHTS if name.startswith("open_clip")]
    url_name = facts.get("url", "").rpartition("/")[2]
    names = [f"{wanted.model}/{wanted.tag}{suffix}" for suffix in (".safetensors", ".bin", ".pt")]
    names += [f"{repository.rpartition('/')[2]}/{name}" for name in file_names if repository]
    names += [url_name] if url_name else []
    for folder in folders():
        for name in names:
            if (folder / name).is_file():
                return folder / name
    for name in file_names if repository else []:
        if found := cached(repository, [name]):
            return found
    where = repository or url_name
    problem = f"vision encoder {wanted.model}/{wanted.tag} needs its weights ({where} as published): they are not there"
    advice = f"put them into a folder named by VAB_WEIGHTS as {names[0]}"
    if (name := f"{wanted.model}/{wanted.tag}") in PUBLISHED:
        advice += f" (where there is a network: vab weights fetch --names {name} --out FOLDER)"
    if is_offline():
        raise UserError(f"{problem}, and HF_HUB_OFFLINE forbids to fetch them; {advice}")
    try:
        return Path(open_clip.download_pretrained(facts))
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise UserError(f"{problem}, and fetching them failed ({reason}); {advice}") from error


def _hub_folder(repository: str) -> Path:
    """Folder with configuration and weights of a repository: below $VAB_WEIGHTS, else in the hub's cache."""
    own = repository.rpartition("/")[2]
    for folder in folders():
        if (folder / own / _CONFIG).is_file():
            return folder / own
    for name in _WEIGHTS:
        if found := cached(repository, [_CONFIG, name]):
            return found
    advice = f"put {_CONFIG} and the weights into a folder {own} in a folder named by VAB_WEIGHTS"
    problem = f"vision encoder hf-hub:{repository} is not in the hub's cache"
    folder = fetch(repository, _CONFIG, problem, advice).parent
    for name in _WEIGHTS[:-1]:
        with suppress(UserError):  # repositories have one of these, and do not say which
            return fetch(repository, name, problem, advice).parent
    fetch(repository, _WEIGHTS[-1], problem, advice)
    return folder


def _of_folder(folder: Path, name: str = "") -> _Place:
    """A folder as on the hub, whose configuration says all."""
    config = folder / _CONFIG
    if not config.is_file():
        raise UserError(
            f"{name or folder}: there is no {config}, which says what the model is and how pixels are prepared"
        )
    try:
        facts = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config} is not JSON: {error}; fetch it anew") from error
    if "model_cfg" not in facts:
        raise UserError(f"{config} lacks model_cfg, got {', '.join(facts)}")
    if not {"mean", "std"} <= facts.get("preprocess_cfg", {}).keys():
        raise UserError(
            f"{config} does not say how pixels are prepared (preprocess_cfg: mean, std, interpolation, resize_mode):"
            " open_clip would silently take CLIP's, which is wrong for other models; add it"
        )
    for file in (folder / known for known in _WEIGHTS):
        if file.is_file():
            return _Place(f"{_LOCAL}{folder}", file, None, False, _CARD)
    raise UserError(f"{folder} has no file of weights: expected one of {', '.join(_WEIGHTS)}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _has_quick_gelu(network: nn.Module) -> bool:
    return any(type(layer).__name__ == "QuickGELU" for layer in network.modules())


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns of random weights, which are filled a moment later."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
