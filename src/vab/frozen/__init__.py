"""Networks that are used and never trained: codecs, vision encoders, judges.

Each kind has a protocol in `vab.frozen.protocols` and a loader by name: `vab.frozen.codec.load_codec`,
`vab.frozen.vision.load_vision`, `vab.frozen.judges.load_judge`. `vab.frozen.weight_files` lists and fetches published
weights, and needs no torch for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vab import UserError

if TYPE_CHECKING:
    import torch


def device_named(name: str) -> torch.device:
    """The device that a user names: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.

    Raises:
        UserError: If there is no such device here.
    """
    import torch

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
