"""A gallery: items with the embeddings of their sound, their video or both, from files, shards or media."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vab import __version__
from vab.console import track
from vab.data.inputs.listing import find_sources
from vab.data.media.open import MediaError
from vab.data.reading.dataset import ShardDataset
from vab.data.reading.labels import first_of, refuse_duplicates
from vab.evaluation.embedding import MediaEncoders, embed_file, embed_records
from vab.files import sha256_of, write_atomically
from vab.spec import UserError
from vab.tasks import AlignTask
from vab.tasks.checkpoints import find_checkpoint


@dataclass(frozen=True)
class Gallery:
    """N items and their embeddings."""

    path: str
    """Where they are from, for messages."""
    embeddings: dict[str, Tensor]
    """``audio``, ``video`` or both: (N, E) float."""
    keys: tuple[str, ...] | None
    """N different names; None if items are known by their order only."""
    recordings: tuple[str, ...] | None = None
    """N names of the recordings that the items are cut from; None if not known."""
    dataset: ShardDataset | None = None
    """The data set whose records they are."""
    numbers: tuple[int, ...] = ()
    """N record numbers in the data set."""
    files: tuple[Path, ...] = ()
    """N media files, if the items are files."""
    left_out: tuple[str, ...] = ()
    """What could not be embedded, and why."""


def read_embeddings(path: str, *sides: str) -> Gallery:
    """Read embeddings that this or another system saved.

    Args:
        path: .npz with the array keys, perhaps the array recordings, and an array (N, E) named as the side, or of any
            name if one side is asked for. For one side also .npy with (N, E) alone.
        sides: ``audio``, ``video`` or both.

    Raises:
        UserError: If it is none of these, or a key is in it twice.
    """
    keys: tuple[str, ...] | None = None
    recordings: tuple[str, ...] | None = None
    rows = {}
    try:
        content = np.load(path, allow_pickle=False)  # pickles can run code
        if isinstance(content, np.ndarray):
            if len(sides) > 1:
                raise UserError(f"{path} has no keys: save a .npz with the arrays keys, audio and video")
            rows = dict.fromkeys(sides, content)
        else:
            with content:
                others = [name for name in content.files if name not in ("keys", "about", "recordings")]
                chosen = others if len(sides) == len(others) == 1 else [side for side in sides if side in others]
                if "keys" not in content.files or len(chosen) != len(sides):
                    one = len(sides) == 1
                    needed = "array keys and one array of embeddings" if one else "arrays keys, audio and video"
                    held = ", ".join(content.files) or "nothing"
                    raise UserError(f"{path} must hold the {needed}, it holds {held}")
                rows = {side: content[name] for side, name in zip(sides, chosen, strict=True)}
                keys = _names(path, "keys", content["keys"])
                refuse_duplicates(path, keys)
                if "recordings" in content.files:
                    recordings = _names(path, "recordings", content["recordings"])
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path}: there is no such file") from error
        reason = (
            "; arrays of objects are not read, save keys as np.array(keys, dtype=str)" if "pickle" in str(error) else ""
        )
        raise UserError(f"{path} cannot be read as .npz or .npy{reason}") from error
    for array in rows.values():
        if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiu":
            raise UserError(f"{path}: embeddings are (N, E) numbers, got {array.dtype} {array.shape}")
        for words, listed in (("keys", keys), ("recordings", recordings)):
            if listed is not None and len(listed) != len(array):
                raise UserError(f"{path} has {len(listed)} {words} and {len(array)} embeddings")
    embeddings = {side: torch.from_numpy(array.astype(np.float64)) for side, array in rows.items()}
    return Gallery(path, embeddings, keys, recordings)


def _names(path: str, what: str, array: np.ndarray) -> tuple[str, ...]:
    if array.ndim != 1 or array.dtype.kind not in "USiu":
        raise UserError(f"{path}: {what} are (N,) strings or whole numbers, got {array.dtype} {array.shape}")
    try:
        return tuple(key.decode() if isinstance(key, bytes) else str(key) for key in array.tolist())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {what} are not UTF-8") from error


def embed_shards(
    task: AlignTask, folder: str, wanted: Sequence[str] | None, batch_size: int, device: torch.device
) -> Gallery:
    """Embed the records of a data set that have a video.

    Args:
        task: Embeds.
        folder: Of shards, encoded as the task's training data were.
        wanted: Ids of the records; all if None.
        batch_size: Records that are embedded together.
        device: Where the task is.

    Raises:
        UserError: If the shards are of another spec, no record is wanted or has a video, or a wanted id has several
            records.
    """
    dataset = ShardDataset(folder)
    task.spec.require(dataset.spec, "checkpoint", "shards")
    if not len(dataset):
        raise UserError(f"{folder} has no record")
    names = [dataset.record_id(number) for number in range(len(dataset))]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    if clash := sorted(repeated.intersection(wanted or ())):
        raise UserError(
            f"{folder}: {len(clash)} ids of the list have several records ({first_of(clash)}): a gallery needs "
            "one of each, extract with --segments centre"
        )
    if repeated:
        names = [dataset.key(number) for number in range(len(dataset))]
    chosen = set(names if wanted is None else wanted)
    numbers = [number for number, name in enumerate(names) if name in chosen]
    if not numbers:
        raise UserError(f"{folder} has none of the {len(chosen)} keys of the list, such as {first_of(sorted(chosen))}")
    frames = dataset.frames(numbers)
    left_out = [f"{names[number]}: no video" for number, count in zip(numbers, frames, strict=True) if not count]
    numbers = [number for number, count in zip(numbers, frames, strict=True) if count]
    if not numbers:
        raise UserError(f"{folder}: no record has a video to retrieve")
    audio, video = embed_records(task, dataset, numbers, batch_size, device)
    return Gallery(
        folder,
        {"audio": audio, "video": video},
        tuple(names[number] for number in numbers),
        tuple(map(str, dataset.sources(numbers).tolist())),
        dataset,
        tuple(numbers),
        left_out=tuple(left_out),
    )


def embed_media(task: AlignTask, encoders: MediaEncoders, media: str, side: str) -> Gallery:
    """Embed one side of the files of a folder or a CSV; files without it are left out.

    Raises:
        UserError: If there is no file, or none has that side.
    """
    sources = find_sources(media, "none")
    names, files, rows, left_out = [], [], [], []
    for source in track(sources, "embedding", len(sources), "files"):
        try:
            rows.append(embed_file(task, encoders, source.path, side))
            names.append(source.name)
            files.append(source.path)
        except MediaError as error:
            left_out.append(f"{source.name}: {error.detail}")
    if not rows:
        raise UserError(f"{media}: none of {len(sources)} files has {side} that can be read ({first_of(left_out)})")
    return Gallery(media, {side: torch.stack(rows)}, tuple(names), files=tuple(files), left_out=tuple(left_out))


def save_gallery(gallery: Gallery, path: str, checkpoint: str | None) -> None:
    """Write a gallery of both sides as ``read_embeddings`` reads it, with hashes of what it was made from.

    Raises:
        UserError: If the disk is full.
    """
    about = {"vab": __version__}
    if checkpoint is not None:
        about["checkpoint_sha256"] = sha256_of(find_checkpoint(checkpoint))
    if gallery.dataset is not None:
        about["data_sha256"] = gallery.dataset.manifest_hash
    recordings = {} if gallery.recordings is None else {"recordings": np.array(gallery.recordings)}
    content = io.BytesIO()
    np.savez(
        content,
        **recordings,
        keys=np.array(gallery.keys),
        **{side: rows.float().numpy() for side, rows in gallery.embeddings.items()},
        about=np.array(json.dumps(about)),
    )
    write_atomically(Path(path), content.getbuffer())
