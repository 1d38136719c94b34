"""Looking after folders of shards: ``vab shards verify``, ``index``, ``info``, ``merge`` and ``import``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vab import UserError

if TYPE_CHECKING:
    from vab.data.extract.report import ExtractionReport
    from vab.data.shards.arrays import CodecInfo
    from vab.data.shards.importing import VisionInfo


def verify_shards(folder: str) -> None:
    """Read every record of a folder of shards again and compare it with the manifest, hash by hash.

    Args:
        folder: The folder of shards; one at an address is fetched into the cache.
    """
    from vab.data.reading.dataset import ShardDataset
    from vab.data.shards.verify import verify

    problems = verify(folder)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError("\n".join([f"{folder}: {count}", *problems]))
    print(f"{folder}: {len(ShardDataset(folder))} records, all as the manifest says")


def index_shards(folder: str, spec: str | None = None) -> None:
    """Index a folder of WebDataset tars made elsewhere, so that vab can read them.

    Args:
        folder: Holds the tars; their records have the fields codes.npy, features.npy and json.
        spec: A JSON file with the segment spec, or the manifest.json of another data set of the same settings,
            where the folder has no manifest.json, or a damaged one.
    """
    from vab.data.shards.format import MANIFEST
    from vab.data.shards.verify import index_folder

    manifest = index_folder(folder, spec)
    files = ", ".join([*manifest["files"], MANIFEST])
    print(f"{folder}: {manifest['counts']['records']} records in {len(manifest['shards'])} tars; wrote {files}")


def show_shards(folder: str) -> None:
    """Print what a folder of shards holds.

    Args:
        folder: The folder of shards.
    """
    from vab.data.shards.verify import info

    json.dump(info(folder), sys.stdout, indent=2)
    print()


def merge_shards(folders: list[str], out: str) -> None:
    """Join finished data sets into a new one, without decoding or encoding anything again.

    They must have one spec and one set of rules. Tars are linked where the file system allows it, else copied.

    Args:
        folders: Folders of shards, or their addresses, two or more.
        out: Folder to write, made if absent; or an address: s3://, gs://, az://, hf://.
    """
    from vab.data.shards.merge import merge

    counts = merge(folders, out)["counts"]
    print(f"{out}: {counts['records']} records of {len(folders)} data sets; {counts['left_out']} entries left out")


def import_shards(
    codes: str,
    out: str,
    codec: str,
    vision: str,
    video_fps: float,
    features: str | None = None,
    target_video_fps: float | None = None,
    segment_seconds: float = 10.0,
    segments: Literal["all", "centre"] = "all",
    hop_seconds: float | None = None,
    min_seconds: float = 1.0,
    max_difference_seconds: float | None = None,
    without_video: Literal["keep", "leave_out"] = "leave_out",
    labels: str | None = None,
    vocabulary: str | None = None,
    codes_key: str | None = None,
    features_key: str | None = None,
    feature_dim: int | None = None,
    codec_weights: str | None = None,
    codebooks: str | None = None,
    codec_hash: str | None = None,
    vision_weights: str | None = None,
    vision_hash: str | None = None,
    records_per_shard: int = 4096,
    strict: bool = False,
) -> ExtractionReport:
    """Turn codec tokens and frame features that others have extracted into shards.

    For each recording there is one array of codes and one of features, in files of one name, or in datasets of one
    name. Every recording is either in the shards or listed in OUT/report.json with the reason. The exit status is 0,
    with a summary of what is left out; 2 if nothing could be made. If interrupted, type the same command again.

    Args:
        codes: Folder with NAME.npy, .npz, .h5 or .hdf5, subfolders included; or one .h5 file with a dataset for each
            recording. Integers, (levels, steps) or (steps, levels), further axes of length 1 allowed.
        out: Folder to write; made if absent.
        codec: What made the codes, as vab extract calls it: audiogen_16khz, encodec_32khz, dac_44khz, tiny, ...
        vision: What made the features: where vab shall encode media for the model later, as vab extract calls it; else
            any name, and only features of one name go together.
        video_fps: Frames per second that the features have.
        features: As codes: floats, (frames, channels) or (channels, frames). Not needed with without_video keep.
        target_video_fps: Frames per second to keep, not more than there are: of these, the one that is shown in the
            middle of each frame wanted.
        segment_seconds: Length of a segment. Longer recordings are cut; shorter ones are padded, and their valid
            lengths noted.
        segments: all: each recording is cut from its start to its end; centre: one segment from the middle.
        hop_seconds: From one segment's start to the next; segment_seconds if not given, so that they do not overlap.
        min_seconds: A recording with less is left out as too_short, a shorter last segment is not taken.
        max_difference_seconds: By which codes and features of a recording may differ in length; what differs by more is
            left out as lengths_differ. By default two frames, at least 0.5 s.
        without_video: keep takes recordings without features, too: they have no frame, and features of zeros.
        labels: CSV with a column id (or file, without whose suffix it is the id) and, if wanted, labels (joined by ;):
            only what it names is imported.
        vocabulary: File with the names of all classes in their order, such as class_labels_indices.csv; by default the
            labels that occur, sorted.
        codes_key: Name of the codes' array in each .npz or .h5 file, or in each recording's group of the one .h5 file;
            needed where there are others.
        features_key: Likewise of the features'.
        feature_dim: Channels, where the shapes do not tell them from frames.
        codec_weights: File or folder of the codec's weights, if they are neither in the folder VAB_WEIGHTS nor in the
            hub's cache.
        codebooks: Instead of the weights: codebooks.safetensors of another data set of this codec, or any .npy or
            .safetensors with (levels, codes, width).
        codec_hash: SHA-256 of the codec's weights file, where it is known but not here.
        vision_weights: File or folder of the vision encoder's weights, from which their hash is taken.
        vision_hash: SHA-256 of the vision encoder's weights file, where it is known but not here.
        records_per_shard: Records per tar, or more: those of a recording stay together.
        strict: End with exit status 3 if anything is left out.

    Raises:
        UserError: If there is nothing to import, something that was said contradicts something else, the folder was
            begun with other settings, the disk is full, or not one record could be made.
    """
    from vab.data.extract.progress import files_progress
    from vab.data.inputs.listing import find_ids
    from vab.data.reading.labels import read_vocabulary
    from vab.data.shards.arrays import ArrayReader, Arrays, Cut
    from vab.data.shards.importing import codec_info, import_arrays, sources_of, vision_info

    listed = None if labels is None else find_ids(labels)
    names = None if vocabulary is None else read_vocabulary(vocabulary)
    if names is not None and listed is not None:
        known = names
        listed.relabel(lambda label: known.names[known.number(label)])
    if features is None and without_video != "keep":
        raise UserError("--features is missing; for sound alone: --without_video keep")
    if max_difference_seconds is None:
        max_difference_seconds = max(0.5, 2 / video_fps) if video_fps > 0 else 0.5
    cut = Cut(
        segment_seconds=segment_seconds,
        source_fps=video_fps,
        video_fps=video_fps if target_video_fps is None else target_video_fps,
        segments=segments,
        hop_seconds=segment_seconds if hop_seconds is None else hop_seconds,
        min_seconds=min_seconds,
        max_difference_seconds=max_difference_seconds,
        without_video=without_video,
    )
    cut.check(float("inf"))
    vision_encoder = vision_info(vision, vision_weights, vision_hash, feature_dim)
    if features is None and vision_encoder.feature_dim is None:
        raise UserError("without --features nothing says how wide they would be: give --feature_dim")
    audio_codec = codec_info(codec, codec_weights, codebooks, codec_hash)
    code_arrays = Arrays(codes, "codes", codes_key)
    feature_arrays = None if features is None else Arrays(features, "features", features_key)
    sources = sources_of(code_arrays, feature_arrays, listed)
    reader = ArrayReader(code_arrays, feature_arrays, audio_codec, vision_encoder.feature_dim, cut)
    with files_progress("importing", len(sources)) as watch:
        vocabulary_names = None if names is None else names.names
        report = import_arrays(sources, reader, Path(out), vision_encoder, vocabulary_names, records_per_shard, watch)
    report = replace(report, strict=strict)
    print(report)
    _warn_of_unstated_weights("codec", audio_codec)
    _warn_of_unstated_weights("vision", vision_encoder)
    return report


def _warn_of_unstated_weights(kind: str, info: CodecInfo | VisionInfo) -> None:
    """Warn before anybody trains for days that the model will accept no media later."""
    from vab.spec import NOT_STATED

    if info.weight_hash == NOT_STATED:
        print(
            f"{kind} {info.name}: weights {NOT_STATED}, so that vab generate and its like will refuse a model of these"
            f" shards; where they are known, say --{kind}_weights FILE or --{kind}_hash SHA256 before training",
            file=sys.stderr,
        )
