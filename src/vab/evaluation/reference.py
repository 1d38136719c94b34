"""Save the real side of an evaluation as one file, which later evaluations read instead of the audio."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from vab.data.extract.sounds import Listening
from vab.evaluation.sides import ONSET_RATE, Side
from vab.files import write_atomically
from vab.frozen.batches import JudgeOutputs
from vab.frozen.protocols import Judge
from vab.spec import UserError

FORMAT = 1
"""Version of the file's layout."""


def _settings(judges: Sequence[Judge], listening: Listening) -> dict[str, Any]:
    """What the numbers in a reference depend on."""
    return {
        "format": FORMAT,
        "length": listening.length,
        "mono": listening.mono,
        "onset_rate": ONSET_RATE,
        "judges": {
            judge.name: {
                "weight_hash": judge.weight_hash,
                "sample_rate": judge.sample_rate,
                "conventions": judge.conventions,
                "classes": list(judge.classes),
            }
            for judge in judges
        },
    }


def save_reference(path: Path, side: Side, judges: Sequence[Judge], listening: Listening) -> None:
    """Write a side: plain arrays and one line of JSON, nothing that could run code; whole or not at all.

    Raises:
        UserError: If the disk is full.
    """
    settings = _settings(judges, listening) | {"lost": side.left_out, "ignored": list(side.ignored)}
    arrays: dict[str, Any] = {
        "facts": np.array(json.dumps(settings, allow_nan=False)),
        "keys": np.array(side.keys),
        "hashes": np.array(side.hashes),
        "seconds": side.seconds.numpy(),
        "level_db": side.level_db.numpy(),
        "onsets": torch.cat(side.onsets).numpy(),
        "onset_counts": np.array([len(onsets) for onsets in side.onsets]),
    }
    for name, outputs in side.outputs.items():
        arrays |= {f"{name}.{part}": tensor.numpy() for part, tensor in outputs._asdict().items()}
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    write_atomically(path, stream.getbuffer())


def load_reference(path: Path, judges: Sequence[Judge], listening: Listening) -> Side:
    """Read what ``save_reference`` wrote, for judges that all are in it.

    Raises:
        UserError: If it is not such a file, or was made with other settings; both values are named.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        theirs = json.loads(str(arrays["facts"]))
        _require_same(path, theirs, _settings(judges, listening))
        counts = arrays["onset_counts"].tolist()
        return Side(
            tuple(arrays["keys"].tolist()),
            tuple(arrays["hashes"].tolist()),
            torch.from_numpy(arrays["seconds"]),
            torch.from_numpy(arrays["level_db"]),
            torch.from_numpy(arrays["onsets"]).split(counts),
            {
                judge.name: JudgeOutputs(
                    *(torch.from_numpy(arrays[f"{judge.name}.{part}"]) for part in JudgeOutputs._fields)
                )
                for judge in judges
            },
            theirs["lost"],
            tuple(theirs["ignored"]),
        )
    except UserError:
        raise
    except (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, BadZipFile) as error:
        raise UserError(f"{path} is not a reference that --save_reference wrote, or it is damaged: {error}") from error


def _require_same(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    if absent := [name for name in ours["judges"] if name not in theirs["judges"]]:
        raise UserError(
            f"{path} was made with the judges {', '.join(theirs['judges'])}, not {', '.join(absent)}: make it again "
            "with them"
        )
    pairs = [(name, theirs[name], ours[name]) for name in ("format", "length", "mono", "onset_rate")]
    for judge, settings in ours["judges"].items():
        pairs += [(f"{judge} {name}", theirs["judges"][judge][name], value) for name, value in settings.items()]
    if unlike := [f"{name}: {their} there, {our} here" for name, their, our in pairs if their != our]:
        raise UserError(f"{path} was made with other settings ({'; '.join(unlike)}): make it again, or set these alike")
