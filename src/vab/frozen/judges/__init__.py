"""Judges by name: audio networks that give metrics their embeddings and class probabilities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from vab.frozen.judges import golden
from vab.frozen.judges.clap import Clap
from vab.frozen.judges.panns import Panns
from vab.frozen.judges.passt import Passt
from vab.frozen.judges.tiny import TinyJudge
from vab.frozen.judges.vggish import VGGish
from vab.frozen.protocols import Judge
from vab.frozen.weight_files.catalogue import JUDGES
from vab.spec import UserError

_JUDGES: dict[str, Callable[..., Judge]] = {
    "tiny": TinyJudge,
    "vggish": VGGish,
    "vggish_relu": partial(VGGish, final_relu=True),
    "panns_16k": partial(Panns, "panns_16k"),
    "panns_32k": partial(Panns, "panns_32k"),
    "passt": Passt,
    "clap": Clap,
}


def load_judge(name: str, device: torch.device | str = "cpu", weights: str | Path | None = None) -> Judge:
    """Load a judge by name, and check it (`vab.frozen.judges.golden.check`).

    Args:
        name: "tiny" ships with the package, needs no network and knows the demo world's classes; "vggish" ends before
            the last layer's ReLU, "vggish_relu" after it; "panns_16k" and "panns_32k" are CNN14.
        device: Device of the judge.
        weights: The published file of its weights (clap: a folder). If None, it is searched in the folder
            $VAB_WEIGHTS, then in the folders of torch.hub and the model hub; if it is in none, it is fetched, unless
            HF_HUB_OFFLINE is set.

    Raises:
        UserError: If the name is unknown, a package or the weights are absent, or the judge fails its check.
    """
    if name not in JUDGES:
        raise UserError(f"unknown judge {name!r}: there is {', '.join(JUDGES)}")
    judge = _JUDGES[name](weights=None if weights is None else Path(weights).expanduser()).freeze().to(device)
    golden.check(judge)
    return judge
