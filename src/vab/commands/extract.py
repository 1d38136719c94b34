"""``vab extract``: media files to shards, on one device or many."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from vab import UserError
from vab.cores import usable_cores

if TYPE_CHECKING:
    from vab.data.extract.report import ExtractionReport


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
    inputs_per_part: int = 256,
    file_timeout: float = 300.0,
    device: str = "auto",
    devices: int = 1,
    part: str | None = None,
    engine: Literal["local", "ray"] = "local",
    actors: int | None = None,
    retry: bool = True,
    strict: bool = False,
) -> ExtractionReport | None:
    """Turn media files into shards of codec tokens and frame features.

    Every input is either in the shards or listed in OUT/report.json with the reason. The report also counts files of a
    folder that are not media, by their suffix. If interrupted, type the same command again: it resumes, and the shards
    are the same, whatever the devices. It also tries again what was left out as missing, unreadable or error, in a
    finished folder too. The exit status is 0, with a summary of what is left out; 2 if nothing could be made or most
    inputs cannot be reached any more.

    Args:
        media: Folder of media files, or a CSV with a column file (relative to the CSV) and, if wanted, labels (joined
            by ;), start (s) and id; or a list as VGGSound has them, without a first line of names: file and one label.
            Folder, CSV and its files may be at addresses: s3://, gs://, az://, hf://, sftp://, https://.
        out: Folder to write, made if absent; or an address: s3://, gs://, az://, hf://.
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
            the encoders; 0 to decode in the process that encodes.
        batch_size: Segments that are encoded at once; has no effect on the result.
        inputs_per_part: Inputs per part. A part is written as one tar when it is whole; a kill costs the parts in the
            making.
        file_timeout: s without a segment after which a file is given up as unreadable.
        device: Where the frozen networks run: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        devices: Devices of this machine, each with a process of its own.
        part: I/N, counted from 1: do every N-th part, from the I-th on, such as one task of a SLURM array of N. Tasks
            do not communicate; the last one to end joins the parts.
        engine: local: this machine; ray: a Ray cluster (that of RAY_ADDRESS or of this machine, else a new one here).
        actors: With engine ray, its processes, each with one GPU where there are GPUs; one for each GPU if not given.
        retry: Try again what an earlier run has left out as missing, unreadable or error, in a finished folder too.
        strict: End with exit status 3 if anything is left out.

    Raises:
        UserError: If there is no input, a number is out of range, the folder was begun with other settings, the disk
            is full, or not one record could be made.
    """
    import torch

    from vab.data.extract.engines import DevicesEngine, LocalEngine, RayEngine, Recipe
    from vab.data.extract.parts import Settings
    from vab.data.extract.progress import files_progress
    from vab.data.extract.run import check_numbers, extract_parts
    from vab.data.inputs.listing import find_sources
    from vab.data.reading.labels import read_vocabulary
    from vab.data.shards.folder import OutFolder

    folder = OutFolder.at(out)
    sources = find_sources(media, labels_from, root=media_root)
    names = None if vocabulary is None else read_vocabulary(vocabulary)
    if names is not None:
        known = names
        sources.relabel(lambda label: known.names[known.number(label)])
    if devices < 1:
        raise UserError(f"--devices must be 1 or more, got {devices}")
    if engine == "ray" and devices > 1:
        raise UserError(f"--devices {devices} is for --engine local: with ray give --actors")
    share = (1, 1) if part is None else _share(part)
    cores = max(1, usable_cores() // devices)
    # One core is the encoders': on two cores two decoders came to 0.64 of pure decoding, one to 0.86.
    workers = max(1, cores - 1) if num_workers is None else num_workers
    settings = Settings(workers, batch_size, file_timeout, inputs_per_part, duplicates == "leave_out", retry)
    rules = {
        "segment_seconds": segment_seconds,
        "video_fps": video_fps,
        "segments": segments,
        "hop_seconds": segment_seconds if hop_seconds is None else hop_seconds,
        "min_seconds": min_seconds,
        "silence_db": silence_db,
        "still_pictures": still_pictures,
        "without_video": without_video,
    }
    check_numbers(rules, settings)
    threads = torch.get_num_threads()
    # Threads beyond the cores that the decoders leave would wait for each other: three times slower on two cores.
    encoding = max(1, min(threads, cores - workers))
    recipe = Recipe(codec, vision, codec_weights, vision_weights, rules, encoding)
    torch.set_num_threads(encoding)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        does: LocalEngine | DevicesEngine | RayEngine
        if engine == "ray":
            does = RayEngine(recipe, device, actors)
            stack.callback(does.close)
            settings = replace(settings, num_workers=does.cores - 1 if num_workers is None else num_workers)
        elif devices == 1:
            does = LocalEngine(*recipe.load(device))
        else:
            does = DevicesEngine(recipe, _devices(device, devices))
            stack.callback(does.close)
        watch = stack.enter_context(files_progress("extracting", len(sources)))
        vocabulary_names = None if names is None else names.names
        report = extract_parts(sources, folder, does, settings, vocabulary_names, watch, share)
    if report is not None:
        report = replace(report, strict=strict)
        print(report)
    return report


def _share(part: str) -> tuple[int, int]:
    """``I/N`` in numbers.

    Raises:
        UserError: If it is not that.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--part must be I/N, counted from 1, such as 1/4 to 4/4, got {part!r}")
    return int(found[1]), int(found[2])


def _devices(device: str, count: int) -> list[str]:
    """Names of this many devices of a kind.

    Raises:
        UserError: If there are not as many.
    """
    import torch

    from vab.frozen import device_named

    where = device_named(device)
    if where.index is not None:
        raise UserError(f"--device {device} is a single device, but --devices is {count}: give --device {where.type}")
    if where.type == "cpu":
        return ["cpu"] * count
    there = torch.accelerator.device_count()
    if there < count:
        raise UserError(f"--devices {count}: this machine has {there} of {where.type}")
    return [f"{where.type}:{number}" for number in range(count)]
