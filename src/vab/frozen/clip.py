"""The image half of any model that open_clip knows: CLIP, EVA-CLIP, SigLIP 2, DFN, PE-Core and their like."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vab.frozen import one_by_one
from vab.frozen.clip_files import DTYPES, Place, package, parse, place_of
from vab.frozen.published import read_weights, sha256_of, tell_licence
from vab.frozen.vision import VisionEncoder, check_frames
from vab.spec import UserError

_PACKAGES = ("open_clip_torch", "torchvision", "pillow")
"""What prepares pixels is among them."""
_TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
"""A text half that costs nothing: open_clip makes no model without one, some out of what only the hub has."""
_FAULTS = (
    *(TypeError, ValueError, AttributeError, LookupError, RuntimeError),
    *(AssertionError, ArithmeticError, NotImplementedError, OSError),
)
"""What open_clip and timm raise at a configuration or weights that are wrong: they check neither."""


class OpenClip(VisionEncoder):
    """One vector per frame from a model of open_clip.

    Pixels are prepared as the model's own configuration says, never by defaults: where a configuration does not say
    how, it is refused. A tag whose weights were trained with QuickGELU gets QuickGELU, whatever the model's name says.

    On a CPU each frame is encoded by itself, and others beside it change nothing. On a GPU all frames of a call go
    together: which ones, may change their last bits.

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
        open_clip = package()
        place = place_of(wanted, weights, open_clip)
        contents = read_weights(place.file)
        model = _model(place, open_clip)
        _fill(model, contents, f"{place.file} does not hold the weights of {wanted.model}")
        self.name, self.weight_hash = name, sha256_of(place.file)
        self.dtype = DTYPES[wanted.dtype]
        self.precision = str(self.dtype).removeprefix("torch.")
        self.layer, self.normalised = wanted.layer, wanted.normalised
        self.visual: Any = model.visual.eval().to(self.dtype)
        self.packages = (*_PACKAGES, "timm") if hasattr(self.visual, "trunk") else _PACKAGES
        if self.layer == "pooled" and not hasattr(self.visual, "trunk"):
            if getattr(self.visual, "proj", None) is None:
                raise UserError(f"{name}: this model has no vector before a last projection: leave out pooled")
            self.visual.proj = None
        settings = {key: _plain(value) for key, value in model.visual.preprocess_cfg.items()}
        self._preprocessor = ClipPreprocess(settings)
        self.preprocessing = (
            "open_clip "
            + ", ".join(f"{key} {value}" for key, value in settings.items())
            + (", QuickGELU" if _has_quick_gelu(self.visual) else "")
        )
        height, width = self._preprocessor.size
        try:
            with torch.no_grad():
                self.feature_dim = int(self._features(torch.zeros(1, 3, height, width, dtype=self.dtype)).shape[-1])
        except _FAULTS as error:
            raise UserError(
                f"{wanted.model} as {place.described_in} describes it does not take pictures of {height} x {width}: "
                f"{_line(error)}; fetch its configuration anew"
            ) from error
        tell_licence(f"vision encoder {wanted.model}", place.licence)

    def preprocessor(self) -> Callable[[np.ndarray], Tensor]:
        """`preprocess` without the network."""
        return self._preprocessor

    def _encode(self, pixels: Tensor) -> Tensor:
        features = one_by_one(self._features, pixels.to(self.dtype)).float()
        return F.normalize(features, dim=-1) if self.normalised else features

    def _features(self, pixels: Tensor) -> Tensor:
        """(M, 3, h, w) -> (M, C)."""
        if self.layer == "pooled" and hasattr(self.visual, "trunk"):
            trunk = self.visual.trunk
            features = trunk.forward_head(trunk.forward_features(pixels), pre_logits=True)
        else:
            features = self.visual(pixels)
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


def _model(place: Place, open_clip: Any) -> Any:
    """The model with random weights and no text half to speak of.

    Raises:
        UserError: If open_clip cannot make it.
    """
    halves = {"text_cfg": _TEXT} | ({"multimodal_cfg": _TEXT} if "multimodal_cfg" in place.config else {})
    try:
        with _quiet():
            return open_clip.create_model(
                place.model,
                load_weights=False,
                force_quick_gelu=place.quick_gelu,
                force_preprocess_cfg=place.preprocessing,
                pretrained_text=False,
                **halves,
            )
    except _FAULTS as error:
        raise UserError(
            f"open_clip {open_clip.__version__} cannot make the model that {place.described_in} describes: "
            f"{_line(error)}; fetch it anew, or install the version that it is for"
        ) from error


def _fill(model: Any, contents: dict[str, Any], refused: str) -> None:
    """Give the image half all its weights, and none of them in another size.

    open_clip and timm would stretch the positions of a model of another image size to fit, and say nothing.

    Args:
        model: Of open_clip.
        contents: Of a file of its weights.
        refused: What to say first if they are not.

    Raises:
        UserError: If they are another model's.
    """
    from open_clip.convert import convert_state_dict

    try:
        state = contents.get("state_dict", contents)
        if all(key.startswith("module.") for key in state):  # as its trainer had them
            state = {key.removeprefix("module."): value for key, value in state.items()}
        state = convert_state_dict(model, dict(state))
        given = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        wanted = model.visual.state_dict()
        for key in sorted(given.keys() & wanted.keys(), key=lambda key: "pos" not in key):  # the telling ones first
            if given[key].shape != wanted[key].shape:
                raise UserError(
                    f"{refused}: visual.{key} is {tuple(given[key].shape)}, expected {tuple(wanted[key].shape)}"
                    + (": it is for another image size" if _is_stretched(key, given[key], wanted[key]) else "")
                )
        model.visual.load_state_dict(given)
    except UserError:
        raise
    except _FAULTS as error:
        raise UserError(f"{refused}: {_line(error)}") from error


def _is_stretched(key: str, given: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors of different shapes are the positions of one network at two image sizes."""
    return "pos" in key and given.ndim == wanted.ndim > 1 and given.shape[-1] == wanted.shape[-1]


def _line(error: Exception) -> str:
    """What an exception says, in one line."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300]


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
