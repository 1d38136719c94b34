"""``vab retrieve``: retrieval metrics of a data set or of saved embeddings, and a search with one file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vab import UserError
from vab.files import check_files, sha256_of, write_atomically

if TYPE_CHECKING:
    from vab.evaluation.retrieval.results import Hit
    from vab.tasks import AlignTask


def retrieve(
    checkpoint: str | None = None,
    data: str | None = None,
    media: str | None = None,
    embeddings: str | None = None,
    audio: str | None = None,
    video: str | None = None,
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
    on_error: Literal["stop", "skip"] = "stop",
    by: Literal["recording", "segment"] = "recording",
    batch_size: int = 64,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any] | list[Hit]:
    """Measure retrieval between sound and video, both ways; or, with a query, find what is nearest to it.

    Without a query: recall at 1, 5 and 10, median rank and mean reciprocal rank, of an alignment on shards, or of
    embeddings of any system. Similarity is the cosine; ties count against. With a query: a video finds sounds by its
    picture, a file of sound alone finds videos. A file longer than a segment is cut into segments one after the other;
    its embedding is the mean of theirs.

    Args:
        checkpoint: An alignment that embeds --data, --media and the query: a .ckpt file or a run's folder.
        data: The gallery: a folder of shards.
        media: Instead, for a query: a folder of media files, or a CSV with a column file.
        embeddings: Instead: a .npz with the arrays keys (N names), audio and video (N, E), of this or any other model;
            perhaps recordings (N names): of each key the recording that it is a segment of.
        audio: Instead, with --video: a .npz with the arrays keys and one (N, E), perhaps recordings; sides are paired
            by key, in any order. Or a .npy with (N, E) alone; sides are paired row by row.
        video: The same with the video embeddings.
        query: A media file to search with.
        query_by: Which side of the query is embedded. auto: its picture if it has one, else its sound.
        top: How many are found.
        out: A .json file for the metrics, or for what was found.
        save_embeddings: A .npz file for the embeddings, as --embeddings reads them.
        page: A .html file that shows what was found, with players.
        keys: A list of the keys that make the gallery: text with one a line, .csv, or .json (a list, or {"data": list},
            of keys or of tables). Other keys are not used.
        key_column: Where the keys are in a .csv (a name from its first line, or a number from 0 for one without such a
            line) or in the tables of a .json. May be left out where one is called key or video_id, or the only one id
            or file.
        class_column: Where the classes are in the list.
        per_class: How many keys of each class the list must have.
        expected: How many keys the gallery must have.
        on_error: What to do with a key that one side lacks. stop: end with an error; skip: leave it out and count it.
        by: What counts as found. recording: any segment of the query's recording, where recordings are known; segment:
            the query's own segment alone. The same where each recording has one segment.
        batch_size: Records that are embedded together; has no effect on the result but for rounding.
        device: Where the networks run: auto, cpu, cuda, cuda:1, ...
        overwrite: Replace files that are there.

    Raises:
        UserError: If the checkpoint is of another task or of other data, an input cannot be read, or keys are missing.
    """
    given = [name for name in (data, media, embeddings, audio or video) if name is not None]
    if len(given) != 1 or (audio is None) != (video is None):
        raise UserError(
            "give what is searched or measured: one of --data SHARDS, --media FOLDER, --embeddings FILE.npz, and "
            "--audio FILE with --video FILE"
        )
    if top < 1 or batch_size < 1:
        raise UserError(f"--top and --batch_size must be 1 or more, got {top} and {batch_size}")
    if checkpoint is None and (data is not None or query is not None):
        raise UserError("give the model that embeds: --checkpoint FILE, or a run's folder")
    if query is None and media is not None:
        raise UserError("--media is searched with a --query; metrics need shards: vab extract, then --data")
    if query is None and (page is not None or query_by != "auto" or top != 5):
        raise UserError("--query_by, --top and --page are of a search: give --query FILE")
    if audio is not None and query is not None:
        raise UserError("--query does not go with --audio and --video: save both in one file, for --embeddings")
    if audio is not None and checkpoint is not None:
        raise UserError("--checkpoint does not go with --audio and --video, which are embeddings: leave it out")
    if save_embeddings is not None and (audio is not None or media is not None):
        raise UserError("--save_embeddings keeps both sides of a gallery: give --data SHARDS")
    if query is not None and (expected is not None or by != "recording" or on_error != "stop"):
        raise UserError("--expected, --by and --on_error are of metrics: leave them out, or --query")
    if query is not None and keys is not None and data is None:
        raise UserError("--keys with a --query chooses records of --data: leave it out, or give --data SHARDS")
    if per_class is not None and class_column is None:
        raise UserError("--per_class needs --class_column, which says where the list has its classes")
    if keys is None and (key_column is not None or class_column is not None):
        raise UserError("--key_column and --class_column are of the list of keys: give it as --keys FILE")
    outputs = {"out": (out, ".json"), "save_embeddings": (save_embeddings, ".npz"), "page": (page, ".html")}
    check_files(outputs, [name for name in (*given, video, query, keys) if name is not None], overwrite)

    from vab.data.reading.labels import first_of, read_keys
    from vab.evaluation.embedding import embed_file, load_encoders
    from vab.evaluation.retrieval.gallery import embed_media, embed_shards, read_embeddings, save_gallery
    from vab.evaluation.retrieval.recall import measure, print_recall
    from vab.evaluation.retrieval.results import print_hits, results_page
    from vab.evaluation.retrieval.search import OTHER_SIDE, decode_hits, query_side, search
    from vab.frozen import device_named
    from vab.precision import allow_tf32

    wanted = None if keys is None else read_keys(keys, key_column, class_column, per_class)
    where = device_named(device)
    allow_tf32(where)
    task = None if checkpoint is None else _load_alignment(checkpoint).to(where)
    side, asked, encoders = "", None, None
    if query is not None:
        assert task is not None
        side = query_side(Path(query), query_by)
        encoders = load_encoders(task.spec, where, audio=side == "audio" or media is not None, video=True)
        asked = embed_file(task, encoders, Path(query), side)

    if audio is not None and video is not None:
        galleries = [read_embeddings(audio, "audio"), read_embeddings(video, "video")]
    elif embeddings is not None:
        galleries = [read_embeddings(embeddings, "audio", "video")]
    elif data is not None:
        assert task is not None
        galleries = [embed_shards(task, data, wanted, batch_size, where)]
    else:
        assert task is not None
        assert media is not None
        assert encoders is not None
        galleries = [embed_media(task, encoders, media, OTHER_SIDE[side])]
    gallery = galleries[0]
    if save_embeddings is not None:
        save_gallery(gallery, save_embeddings, checkpoint)

    if query is None or asked is None:
        report = measure(gallery, galleries[-1], wanted, keys, per_class, expected, on_error, by)
        if audio is not None:
            report["embeddings"] = {
                name: {"file": one.path, "sha256": sha256_of(Path(one.path)), "width": one.embeddings[name].shape[1]}
                for name, one in zip(("audio", "video"), galleries, strict=True)
            }
        else:
            report |= {
                "checkpoint": checkpoint,
                "gallery": gallery.path,
                "data_sha256": None if gallery.dataset is None else gallery.dataset.manifest_hash,
                "without_video": len(gallery.left_out),
            }
        _write(out, report)
        print_recall(report)
        if gallery.left_out:
            print(f"{len(gallery.left_out)} records without video are not in the gallery")
        return report
    hits = search(asked, gallery, OTHER_SIDE[side], top)
    among = len(gallery.keys or ())
    _write(out, {"query": query, "by": side, "among": among, "found": [asdict(hit) for hit in hits]})
    if page is not None:
        sounds = decode_hits(gallery, hits, where)
        write_atomically(Path(page), results_page(Path(query), side, hits, among, Path(page).parent, sounds))
    print_hits(Path(query), side, hits, among)
    if gallery.left_out:
        print(f"{len(gallery.left_out)} not searched ({first_of(gallery.left_out)})")
    return hits


def _load_alignment(checkpoint: str) -> AlignTask:
    from vab.tasks import AlignTask, load_task

    task = load_task(checkpoint)
    if not isinstance(task, AlignTask):
        raise UserError(
            f"{checkpoint} is a checkpoint of {type(task).__name__}: retrieve needs an AlignTask, made by "
            "vab fit --config configs/align.yaml"
        )
    return task


def _write(out: str | None, content: dict[str, Any]) -> None:
    if out is not None:
        write_atomically(Path(out), (json.dumps(content, indent=2) + "\n").encode())
