"""Retrieval with a trained alignment: its figures on a data set, and a search with one file."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vab import __version__
from vab.commands.recall import By, Embeddings, check_list_flags, measure, read_embeddings, show
from vab.console import ProgressBar
from vab.data.inputs.listing import find_sources
from vab.data.media.segments import MediaError, scan_packets
from vab.data.reading.dataset import ShardDataset
from vab.data.reading.labels import first_of, read_keys
from vab.evaluation.embedding import MediaEncoders, embed_file, embed_records, load_encoders
from vab.evaluation.results_page import Hit, results_page, sound_of_codes
from vab.files import check_files, sha256_of, write_atomically
from vab.frozen import device_named
from vab.frozen.codec import load_codec
from vab.spec import UserError
from vab.tasks import AlignTask, load_task
from vab.tasks.checkpoints import find_checkpoint

_OTHER = {"audio": "video", "video": "audio"}


@dataclass(frozen=True)
class Gallery:
    """What is searched: embeddings with their names, and where what they are of can be found."""

    names: tuple[str, ...]
    """N different ones."""
    audio: Tensor | None
    """(N, E) float32; None where only the other side was embedded."""
    video: Tensor | None
    """(N, E) float32."""
    dataset: ShardDataset | None = None
    """Whose records they are."""
    numbers: tuple[int, ...] = ()
    """Their numbers in it."""
    paths: tuple[Path, ...] = ()
    """Files, where they are no records."""
    left_out: tuple[str, ...] = ()
    """What is not in it, and why."""
    recordings: tuple[str, ...] | None = None
    """Of each the recording that it is cut from, where known."""


def retrieve(
    checkpoint: str | None = None,
    data: str | None = None,
    media: str | None = None,
    embeddings: str | None = None,
    query: str | None = None,
    query_by: Literal["auto", "audio", "video"] = "auto",
    top: int = 5,
    out: str | None = None,
    save_embeddings: str | None = None,
    page: str | None = None,
    keys: str | None = None,
    key_column: str | None = None,
    class_column: str | None = None,
    per_class: int | None = None,
    expected: int | None = None,
    on_missing: Literal["stop", "skip"] = "stop",
    by: By = "recording",
    batch_size: int = 64,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any] | list[Hit]:
    """Recall of an alignment on a data set, both ways; or, with a query, what is nearest to it.

    Without a query: recall at 1, 5 and 10, median rank and mean reciprocal rank, as ``vab recall`` has them. With one:
    a video finds sounds by its picture, a file of sound alone finds videos. A file longer than a segment is cut into
    segments one after the other; its embedding is the mean of theirs.

    Args:
        checkpoint: Of an alignment: a .ckpt file or a run's folder.
        data: Folder of shards: what is measured, or searched.
        media: Instead, for a query: a folder of media files, or a CSV with a column file.
        embeddings: Instead: a .npz with the arrays keys (N names), audio and video (N, E), of this or any other model;
            perhaps recordings (N names).
        query: A media file.
        query_by: What of the query is looked at. auto: its picture if it has one, else its sound.
        top: How many are found.
        out: A .json file for the figures, or for what was found.
        save_embeddings: A .npz file for the embeddings, as ``embeddings`` reads them.
        page: A .html file that shows what was found, with players.
        keys: A list of the ids that make the gallery, as in ``vab recall``.
        key_column: As in ``vab recall``.
        class_column: As in ``vab recall``.
        per_class: As in ``vab recall``.
        expected: As in ``vab recall``.
        on_missing: As in ``vab recall``.
        by: As in ``vab recall``: whether other segments of a query's recording count as found, too.
        batch_size: Records that are embedded together; has no effect on the result but for rounding.
        device: Where the networks run: auto, cpu, cuda, cuda:1, ...
        overwrite: Replace files that are there.

    Raises:
        UserError: If the checkpoint is of another task or of other data, nothing is to be searched, or the query cannot
            be read.
    """
    given = [name for name in (data, media, embeddings) if name is not None]
    if len(given) != 1:
        raise UserError("give what is searched: one of --data SHARDS, --media FOLDER and --embeddings FILE.npz")
    if top < 1 or batch_size < 1:
        raise UserError(f"--top and --batch_size must be 1 or more, got {top} and {batch_size}")
    if checkpoint is None and (embeddings is None or query is not None):
        raise UserError("give the model that embeds: --checkpoint FILE, or a run's folder")
    if query is None and media is not None:
        raise UserError("--media is searched with a --query; figures need shards: vab extract, then --data")
    if query is None and page is not None:
        raise UserError("--page shows what a query found: give --query FILE")
    check_list_flags(keys, key_column, class_column, per_class)
    outputs = {"out": (out, ".json"), "save_embeddings": (save_embeddings, ".npz"), "page": (page, ".html")}
    check_files(outputs, [name for name in (*given, query, keys) if name is not None], overwrite)
    wanted = None if keys is None else read_keys(keys, key_column, class_column, per_class)
    where = device_named(device)
    task = None if checkpoint is None else _alignment(checkpoint).to(where)

    if query is None:
        gallery = _read_gallery(embeddings) if data is None else _of_shards(task, data, wanted, batch_size, where)
        if save_embeddings is not None:
            _save(gallery, save_embeddings, checkpoint)
        place = embeddings or data or ""
        report = measure(_sides(gallery, place), wanted, keys, per_class, expected, on_missing, by)
        report |= {
            "checkpoint": checkpoint,
            "gallery": place,
            "data_sha256": None if gallery.dataset is None else gallery.dataset.manifest_hash,
            "without_video": len(gallery.left_out),
        }
        if out is not None:
            write_atomically(Path(out), (json.dumps(report, indent=2) + "\n").encode())
        show(report)
        if gallery.left_out:
            print(f"{len(gallery.left_out)} records without video are not in the gallery")
        return report
    assert task is not None
    path = Path(query)
    side = _query_side(path, query_by)
    encoders = load_encoders(task.spec, where, audio=side == "audio" or media is not None, video=True)
    asked = embed_file(task, encoders, path, side)
    if data is not None:
        gallery = _of_shards(task, data, wanted, batch_size, where)
    elif media is not None:
        gallery = _of_media(task, encoders, media, _OTHER[side])
    else:
        gallery = _read_gallery(embeddings)
    if save_embeddings is not None:
        _save(gallery, save_embeddings, checkpoint)
    hits = search(asked, gallery, _OTHER[side], top)
    if out is not None:
        found = {"query": query, "by": side, "among": len(gallery.names), "found": [asdict(hit) for hit in hits]}
        write_atomically(Path(out), (json.dumps(found, indent=2) + "\n").encode())
    if page is not None:
        sounds = _decoded(gallery, hits, where)
        write_atomically(Path(page), results_page(path, side, hits, len(gallery.names), Path(page).parent, sounds))
    _show(path, side, gallery, hits)
    return hits


def search(query: Tensor, gallery: Gallery, side: str, top: int) -> list[Hit]:
    """The ``top`` rows of a gallery's side that are nearest to a query (E,), by cosine; of equal ones the first.

    Raises:
        UserError: If the gallery was not embedded on that side, or in another width.
    """
    rows = gallery.audio if side == "audio" else gallery.video
    if rows is None:
        raise UserError(f"the gallery has no {side} embeddings")
    if rows.shape[1] != len(query):
        raise UserError(
            f"the gallery's embeddings have width {rows.shape[1]}, the checkpoint's {len(query)}: they are of another "
            "model, give its checkpoint"
        )
    rows = rows.double() / rows.double().norm(dim=1, keepdim=True)
    cosines = rows @ (query.double() / query.double().norm())
    order = torch.sort(cosines, descending=True, stable=True).indices[:top].tolist()
    hits = []
    for rank, place in enumerate(order, start=1):
        file, start = "", None
        labels: tuple[str, ...] = ()
        if gallery.dataset is not None:
            meta = gallery.dataset.record(gallery.numbers[place])
            file, start = str(meta.get("source", "")), meta.get("start_seconds")
            labels = tuple(gallery.dataset.label_names(gallery.numbers[place]))
        elif gallery.paths:
            file = str(gallery.paths[place])
        hits.append(Hit(rank, gallery.names[place], float(cosines[place]), file, start, labels))
    return hits


def _alignment(checkpoint: str) -> AlignTask:
    task = load_task(checkpoint)
    if not isinstance(task, AlignTask):
        raise UserError(
            f"{checkpoint} is a checkpoint of {type(task).__name__}: retrieve needs an AlignTask, made by "
            "vab fit --config configs/align.yaml"
        )
    return task


def _of_shards(
    task: AlignTask | None, folder: str, wanted: Sequence[str] | None, batch_size: int, where: torch.device
) -> Gallery:
    """The records of a data set that have a video, or those of them that a list names."""
    assert task is not None
    dataset = ShardDataset(folder)
    task.spec.require(dataset.spec, "checkpoint", "shards")
    if not len(dataset):
        raise UserError(f"{folder} has no record")
    names = [dataset.record_id(number) for number in range(len(dataset))]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if wanted is not None and twice and not set(twice).isdisjoint(wanted):
        repeated = sorted(set(twice) & set(wanted))
        raise UserError(
            f"{folder}: {len(repeated)} ids of the list have several records ({first_of(repeated)}): a gallery needs "
            "one of each, extract with --segments centre"
        )
    if twice:
        names = [dataset.key(number) for number in range(len(dataset))]
    chosen = set(names if wanted is None else wanted)
    numbers = [number for number, name in enumerate(names) if name in chosen]
    if not numbers:
        raise UserError(f"{folder} has none of the {len(chosen)} keys of the list, such as {first_of(sorted(chosen))}")
    frames = dataset.frames(numbers)
    silent = [names[number] for number, count in zip(numbers, frames, strict=True) if not count]
    numbers = [number for number, count in zip(numbers, frames, strict=True) if count]
    if not numbers:
        raise UserError(f"{folder}: no record has a video to retrieve")
    audio, video = embed_records(task, dataset, numbers, batch_size, where)
    left_out = tuple(f"{name}: no video" for name in silent)
    recordings = tuple(map(str, dataset.sources(numbers).tolist()))
    chosen_names = tuple(names[number] for number in numbers)
    return Gallery(chosen_names, audio, video, dataset, tuple(numbers), left_out=left_out, recordings=recordings)


def _of_media(task: AlignTask, encoders: MediaEncoders, media: str, side: str) -> Gallery:
    """The files of a folder or a CSV that have what is searched for."""
    sources = find_sources(media, "none")
    names, paths, rows, left_out = [], [], [], []
    with ProgressBar("embedding", len(sources), "files") as bar:
        for source in sources:
            try:
                rows.append(embed_file(task, encoders, source.path, side))
                names.append(source.name)
                paths.append(source.path)
            except MediaError as error:
                left_out.append(f"{source.name}: {error.detail}")
            bar.advance()
    if not rows:
        raise UserError(f"{media}: none of {len(sources)} files has {side} that can be read ({first_of(left_out)})")
    stacked = torch.stack(rows)
    audio, video = (stacked, None) if side == "audio" else (None, stacked)
    return Gallery(tuple(names), audio, video, paths=tuple(paths), left_out=tuple(left_out))


def _read_gallery(path: str | None) -> Gallery:
    assert path is not None
    audio, video = read_embeddings(path, "audio"), read_embeddings(path, "video")
    if audio.keys is None:
        raise UserError(f"{path} has no keys: save a .npz with the arrays keys, audio and video")
    rows = torch.from_numpy(audio.rows), torch.from_numpy(video.rows)
    return Gallery(audio.keys, *rows, recordings=audio.recordings)


def _save(gallery: Gallery, path: str, checkpoint: str | None) -> None:
    if gallery.audio is None or gallery.video is None:
        raise UserError("--save_embeddings keeps both sides: give --data SHARDS")
    about: dict[str, Any] = {"vab": __version__}
    if checkpoint is not None:
        about["checkpoint_sha256"] = sha256_of(find_checkpoint(checkpoint))
    if gallery.dataset is not None:
        about["data_sha256"] = gallery.dataset.manifest_hash
    content = io.BytesIO()
    recordings = {} if gallery.recordings is None else {"recordings": np.array(gallery.recordings)}
    np.savez(
        content,
        **recordings,
        keys=np.array(gallery.names),
        audio=gallery.audio.float().numpy(),
        video=gallery.video.float().numpy(),
        about=np.array(json.dumps(about)),
    )
    write_atomically(Path(path), content.getbuffer())


def _sides(gallery: Gallery, place: str) -> dict[str, Embeddings]:
    assert gallery.audio is not None
    assert gallery.video is not None
    return {
        "audio": Embeddings(place, gallery.audio.double().numpy(), gallery.names, gallery.recordings),
        "video": Embeddings(place, gallery.video.double().numpy(), gallery.names, gallery.recordings),
    }


def _query_side(path: Path, query_by: str) -> str:
    scan = scan_packets(path)
    if query_by == "auto":
        return "audio" if scan.video_end is None else "video"
    if (scan.video_end if query_by == "video" else scan.audio_end) is None:
        raise MediaError(f"no_{query_by}", path, f"has no {'picture' if query_by == 'video' else 'sound'} to search by")
    return query_by


def _decoded(gallery: Gallery, hits: Sequence[Hit], where: torch.device) -> dict[int, bytes]:
    """By rank the sound of what was found, as a .wav file, where there are codes to make it from."""
    if gallery.dataset is None:
        return {}
    codec = load_codec(gallery.dataset.spec.codec, where)
    places = dict(zip(gallery.names, gallery.numbers, strict=True))
    return {hit.rank: sound_of_codes(codec, gallery.dataset.read([places[hit.name]]), where) for hit in hits}


def _show(path: Path, by: str, gallery: Gallery, hits: Sequence[Hit]) -> None:
    console = Console(width=None if Console().is_terminal else 110)
    what = "sounds nearest to the picture of" if by == "video" else "videos nearest to the sound of"
    table = Table(title=f"{what} {path.name}, among {len(gallery.names)}", title_justify="left")
    for heading, justify in (("", "right"), ("cosine", "right"), ("", "left"), ("from", "left"), ("classes", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for hit in hits:
        at = "" if hit.start_seconds is None else f" at {hit.start_seconds:g} s"
        table.add_row(str(hit.rank), f"{hit.cosine:.3f}", hit.name, hit.file + at, ", ".join(hit.labels))
    console.print(table, markup=False)
    if gallery.left_out:
        print(f"{len(gallery.left_out)} not searched ({first_of(gallery.left_out)})")
