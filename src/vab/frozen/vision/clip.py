"""The image encoder of any open_clip model: CLIP, EVA-CLIP, SigLIP 2, DFN, PE-Core and others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vab.files import sha256_of
from vab.frozen.precision import has_bfloat16, one_by_one
from vab.frozen.protocols import VisionEncoder
from vab.frozen.vision.clip_files import DTYPES, Place, package, parse, place_of
from vab.frozen.weight_files.catalogue import MODEL_CARD
from vab.frozen.weight_files.published import print_licence
from vab.frozen.weight_files.reading import read_weights, refusing
from vab.resizing import INTERPOLATIONS, MODES, Resizer
from vab.spec import UserError

_PACKAGES = ("open_clip_torch", "torchvision", "pillow")
"""With those that prepare pixels."""
_BATCH_SIZE = 64
"""Frames of a batch on a GPU."""
_TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
"""A minimal text encoder: open_clip makes no model without one, and downloads parts of some."""


class OpenClip(VisionEncoder):
    """One vector per frame from a model of open_clip.

    Pixels are prepared as the model's configuration says, never by defaults: a configuration that does not say how is
    refused. Weights that were trained with QuickGELU get QuickGELU, whatever the model's name says.

    On a CPU each frame is encoded alone. On a GPU all batches have one size, the last one padded, so that the kernels,
    and with them the rounding, do not depend on the number of frames.

    Args:
        name: The model, as `parse` reads it: "EVA02-L-14-336/merged2b_s6b_b61k", "hf-hub:timm/ViT-B-16-SigLIP2",
            "local-dir:FOLDER"; then, after commas, "pooled" (before the last projection; else projected),
            "normalised" (to unit length), "float32", "bf16" or "fp16".
        weights: File of weights for a model and tag, or for hf-hub: a folder as on the hub; if None, it is searched in
            the folder $VAB_WEIGHTS, then in the hub's cache, and fetched unless the user forbids it.
        device: Device that it will run on. If the name states no precision, it is bfloat16 on a GPU that computes in it
            (Ampere and later), else float32.

    Raises:
        UserError: If the package is absent, the name unknown, or the weights absent or of another model.

    Source: Radford et al. 2021; Ilharco et al. 2021, "OpenCLIP".
    """

    encodes_frames_alone = True
    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: Path | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__()
        wanted = parse(name)
        open_clip = package()
        place = place_of(wanted, weights, open_clip)
        contents = read_weights(place.file)
        model = _model(place, open_clip)
        _fill(model, contents, f"{place.file} does not hold the weights of {wanted.model}")
        self.name, self.weight_hash = name, sha256_of(place.file)
        own = torch.bfloat16 if has_bfloat16(torch.device(device)) else torch.float32  # features are stored as float16
        self.dtype = DTYPES[wanted.dtype] if wanted.dtype else own
        self.precision = str(self.dtype).removeprefix("torch.")
        self.layer, self.normalised = wanted.layer, wanted.normalised
        self.visual: Any = model.visual.eval()
        self.packages = (*_PACKAGES, "timm") if hasattr(self.visual, "trunk") else _PACKAGES
        if self.layer == "pooled" and not hasattr(self.visual, "trunk"):
            if getattr(self.visual, "proj", None) is None:
                raise UserError(f"{name}: this model has no vector before a last projection: leave out pooled")
            self.visual.proj = None
        settings = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in model.visual.preprocess_cfg.items()
        }
        self.resizer = _resizer(settings)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(settings[key], dtype=torch.float32).view(-1, 1, 1), persistent=False)
        quick_gelu = any(type(layer).__name__ == "QuickGELU" for layer in self.visual.modules())
        steps = [f"{key} {value}" for key, value in settings.items()] + ["QuickGELU"] * quick_gelu
        self.preprocessing = f"open_clip {', '.join(steps)}"
        height, width = self.resizer.size
        described = f"{wanted.model} as {place.described_in} describes it"
        problem = f"{described} does not take pictures of {height} x {width}"
        with refusing(problem, "; fetch its configuration again"), torch.no_grad():
            self.feature_dim = int(self._forward(torch.zeros(1, 3, height, width)).shape[-1])
        self.visual.to(self.dtype)
        print_licence(f"vision encoder {wanted.model}", MODEL_CARD)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation of each channel, as open_clip's transform after resizing."""
        return pixels.float().div(255).sub(self.mean).div(self.std)

    def _encode(self, pixels: Tensor) -> Tensor:
        run = one_by_one if pixels.device.type == "cpu" else in_equal_batches
        features = run(self._features, pixels).float()
        return F.normalize(features, dim=-1) if self.normalised else features

    def _features(self, pixels: Tensor) -> Tensor:
        """(M, 3, h, w) uint8, or normalised float32 -> (M, C)."""
        return self._forward((self.normalise(pixels) if pixels.dtype == torch.uint8 else pixels).to(self.dtype))

    def _forward(self, pixels: Tensor) -> Tensor:
        """(M, 3, h, w) of the network's dtype -> (M, C)."""
        if self.layer == "pooled" and hasattr(self.visual, "trunk"):
            trunk = self.visual.trunk
            features = trunk.forward_head(trunk.forward_features(pixels), pre_logits=True)
        else:
            features = self.visual(pixels)
        got: Tensor = features[0] if isinstance(features, tuple) else features
        return got


def in_equal_batches(run: Callable[[Tensor], Tensor], rows: Tensor, size: int = _BATCH_SIZE) -> Tensor:
    """Run a network on batches of exactly ``size`` rows; the last one is padded with zeros.

    Args:
        run: (size, ...) to (size, ...).
        rows: (B, ...).
        size: Rows of each batch.

    Returns:
        (B, ...), without gradients.
    """
    with torch.no_grad():
        padding = rows.new_zeros(-len(rows) % size if len(rows) else size, *rows.shape[1:])
        return torch.cat([run(batch) for batch in torch.cat([rows, padding]).split(size)])[: len(rows)]


def _resizer(settings: dict[str, Any]) -> Resizer:
    """The resizer that open_clip's ``preprocess_cfg`` describes.

    Raises:
        UserError: If it has a value that open_clip does not know.
    """
    size = settings["size"]
    height, width = (size, size) if isinstance(size, int) else size
    # "random" is for training: open_clip evaluates such models with bicubic.
    mode, interpolation = settings["resize_mode"], settings["interpolation"].replace("random", "bicubic")
    for key, value, known in (("resize_mode", mode, MODES), ("interpolation", interpolation, INTERPOLATIONS)):
        if value not in known:
            raise UserError(f"preprocess_cfg: {key} must be {', '.join(known)}, got {value!r}")
    return Resizer((height, width), mode, interpolation, settings["fill_color"])


def _model(place: Place, open_clip: Any) -> Any:
    """The model with random weights and a minimal text encoder.

    Raises:
        UserError: If open_clip cannot make it.
    """
    text = {"text_cfg": _TEXT} | ({"multimodal_cfg": _TEXT} if "multimodal_cfg" in place.config else {})
    problem = f"open_clip {open_clip.__version__} cannot make the model that {place.described_in} describes"
    with refusing(problem, "; fetch it again, or install the version that it is for"), _quiet():
        return open_clip.create_model(
            place.model,
            load_weights=False,
            force_quick_gelu=place.quick_gelu,
            force_preprocess_cfg=place.preprocessing,
            pretrained_text=False,
            **text,
        )


def _fill(model: Any, contents: dict[str, Any], refused: str) -> None:
    """Load all weights of the image encoder, each in its own shape.

    open_clip and timm would silently interpolate the positions of a model for another image size.

    Args:
        model: Model of open_clip.
        contents: Contents of a file of weights.
        refused: Beginning of the message if they do not fit.

    Raises:
        UserError: If they are another model's.
    """
    from open_clip.convert import convert_state_dict

    with refusing(refused):
        state = contents.get("state_dict", contents)
        if all(key.startswith("module.") for key in state):  # as saved under DDP
            state = {key.removeprefix("module."): value for key, value in state.items()}
        state = convert_state_dict(model, dict(state))
        weights = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        wanted = model.visual.state_dict()
        for key in sorted(
            weights.keys() & wanted.keys(), key=lambda key: "pos" not in key
        ):  # positions first: they tell the image size
            if weights[key].shape != wanted[key].shape:
                raise UserError(
                    f"{refused}: visual.{key} is {tuple(weights[key].shape)}, expected {tuple(wanted[key].shape)}"
                    + (": it is for another image size" if _are_positions(key, weights[key], wanted[key]) else "")
                )
        model.visual.load_state_dict(weights)


def _are_positions(key: str, given: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors of different shapes are the positions of one network at two image sizes."""
    return "pos" in key and given.ndim == wanted.ndim > 1 and given.shape[-1] == wanted.shape[-1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress open_clip's warning of random weights, which are replaced afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
