"""``vab extract``: media files to shards, on one device or many."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from vab.commands.cores import cores_per_process
from vab.commands.progress import files_progress
from vab.data.extract.collector import Settings
from vab.data.extract.cutting import Cutting
from vab.data.extract.encode import Encoders
from vab.data.extract.report import ExtractionReport
from vab.data.extract.run import check_numbers, extract_sources
from vab.data.inputs.listing import find_sources
from vab.data.reading.labels import read_vocabulary
from vab.frozen import device_named
from vab.frozen.codec import load_codec
from vab.frozen.vision import load_vision
from vab.ranks import start_ranks
from vab.spec import UserError


def extract(
    media: str,
    out: str,
    codec: str = "tiny",
    vision: str = "tiny",
    segment_seconds: float = 10.0,
    video_fps: float = 4.0,
    segments: Literal["all", "centre"] = "all",
    hop_seconds: float | None = None,
    min_seconds: float = 1.0,
    silence_db: float = -60.0,
    still_pictures: Literal["keep", "leave_out"] = "keep",
    duplicates: Literal["keep", "leave_out"] = "keep",
    without_video: Literal["keep", "leave_out"] = "leave_out",
    labels_from: Literal["auto", "csv", "folder", "none"] = "auto",
    vocabulary: str | None = None,
    media_root: str | None = None,
    codec_weights: str | None = None,
    vision_weights: str | None = None,
    num_workers: int | None = None,
    batch_size: int = 16,
    records_per_shard: int = 4096,
    file_timeout: float = 300.0,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> ExtractionReport | None:
    """Turn media files into shards of codec tokens and frame features.

    Every input ends in the shards or, with its reason, in DIR/report.json, which also counts files of a folder that are
    no inputs, as their suffix is not one of media. Interrupted, the same command goes on; the shards are the same,
    whatever the devices. It tries again what is left out as missing, unreadable or error, in a finished folder too:
    what can be read then comes into further shards, and the others do not change. The exit status is 0 if every input
    is in the shards whole, 3 if something is left out, 2 if nothing could be made.

    Args:
        media: Folder of media files, or a CSV with a column file (relative to the CSV) and, if wanted, labels (joined
            by ;), start (s) and id; or a list as VGGSound has them, without a first line of names: file and one label.
        out: Folder to write; made if absent.
        codec: tiny, tiny8, audiogen_16khz (the paper's EnCodec), encodec_24khz:6 (or :1.5, :3, :12, :24, kbit/s),
            encodec_32khz, dac_16khz, dac_24khz or dac_44khz.
        vision: tiny, or a model of open_clip: MODEL/TAG such as EVA02-L-14-336/merged2b_s6b_b61k, hf-hub:OWNER/NAME or
            local-dir:FOLDER; then, after commas, pooled (before the last projection), normalised, float32, bf16 or fp16
            (default: bf16 on GPUs that compute in it, else float32; the manifest states it).
        segment_seconds: Length of a segment.
        video_fps: Frames per second that are encoded.
        segments: all: each file is cut from its start to its end; centre: one segment from the middle. A row of a CSV
            that has a start gives the one segment there.
        hop_seconds: From one segment's start to the next; segment_seconds if not given, so that they do not overlap.
        min_seconds: A file with less of sound or picture is left out as too_short, a shorter last segment is not
            taken. Between this and segment_seconds, silence and the last picture fill up, and the valid lengths are
            recorded.
        silence_db: Segments less loud than this are left out as silent, dBFS, 0 or less; at -200 digital silence alone.
        still_pictures: leave_out drops segments whose picture does not change.
        duplicates: leave_out drops an input with the very bytes, and the start, of one before it; keep reports them.
        without_video: keep takes files of sound alone, too: their records have no frame, and features of zeros.
        labels_from: csv; folder: the name of the folder a file is in; none; auto: csv if it has such a column.
        vocabulary: File with the names of all classes in their order, such as AudioSet's or VGGSound's
            class_labels_indices.csv; by default the labels that occur, sorted. Labels may be given by name or by id.
        media_root: Folder that the files of a CSV are in, if it is not the CSV's own.
        codec_weights: File or folder of the codec's weights, if they are neither in the folder VAB_WEIGHTS nor in the
            hub's cache.
        vision_weights: Likewise of the vision encoder's.
        num_workers: Processes that decode for each device; the cores are shared out if not given, less one of each for
            the encoders; 0 to decode in the main process.
        batch_size: Segments that are encoded at once; has no effect on the result.
        records_per_shard: Records per tar, or more: those of an input stay together.
        file_timeout: s without a segment after which a file is given up as unreadable.
        device: Where the frozen networks run: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        devices: Processes on each machine, each with a device of its own.
        num_nodes: Machines; start the command on each, with torchrun or SLURM.

    Raises:
        UserError: If there is no input, a number is out of range, the folder was begun with other settings, the disk
            is full, or not one record could be made.
    """
    sources = find_sources(media, labels_from, root=media_root)
    names = None if vocabulary is None else read_vocabulary(vocabulary)
    if names is not None:
        known = names
        sources.relabel(lambda label: known.names[known.number(label)])
    ranks = start_ranks(device, devices, num_nodes)
    with ranks.ending_together():
        cores = cores_per_process(ranks.gather)
        # A core of each rank is the encoders': on two cores two decoders came to 0.64 of pure decoding, one to 0.86.
        workers = max(1, cores - 1) if num_workers is None else num_workers
        where = device_named(ranks.device)
        error = None
        try:
            loaded = load_codec(codec, where, codec_weights), load_vision(vision, where, vision_weights)
            encoders = Encoders(*loaded, where)
            cutting = Cutting(
                segment_seconds=segment_seconds,
                sample_rate=encoders.codec.sample_rate,
                video_fps=video_fps,
                segments=segments,
                hop_seconds=segment_seconds if hop_seconds is None else hop_seconds,
                min_seconds=min_seconds,
                silence_db=silence_db,
                still_pictures=still_pictures,
                without_video=without_video,
                preprocess=encoders.vision.preprocessor(),
            )
            check_numbers(cutting, workers, batch_size, file_timeout)
        except UserError as problem:
            error = problem
        ranks.agree(error)
        settings = Settings(workers, batch_size, file_timeout, records_per_shard, duplicates == "leave_out")
        threads = torch.get_num_threads()
        # Threads beyond the cores that the decoders leave would wait for each other: three times slower on two cores.
        torch.set_num_threads(max(1, min(threads, cores - workers)))
        try:
            with files_progress("extracting", len(sources), show=ranks.rank == 0) as watch:
                vocabulary_names = None if names is None else names.names
                report = extract_sources(
                    sources, Path(out), encoders, cutting, settings, vocabulary_names, ranks, watch
                )
        finally:
            torch.set_num_threads(threads)
    if report is not None:
        print(report)
    return report
