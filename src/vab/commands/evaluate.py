"""``vab evaluate``: metrics of any system's sounds against real ones, each with a card that says what it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vab import UserError
from vab.cores import usable_cores
from vab.evaluation.report import Measured, describe, print_report, write_report
from vab.files import check_files

_FILES_PER_WORKER = 100
"""Files from which another worker process is worth the seconds that it takes to start."""


def evaluate(
    real: str,
    generated: str,
    out: str,
    judges: str | list[str] = "tiny",
    metrics: str | list[str] = "all",
    pair: Literal["auto", "name", "none"] = "auto",
    seconds: float | None = 10.0,
    short: Literal["keep", "pad", "refuse"] = "keep",
    remove_mean: bool = False,
    inception_splits: int = 1,
    labels: str | None = None,
    csv: str | None = None,
    plots: str | None = None,
    save_reference: str | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    num_workers: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> Measured:
    """Measure generated sounds, of any system, against real ones. Print a table, and write a report with metric cards.

    Files are wav, flac, ogg, mp3, mp4 or anything else that FFmpeg decodes. Subfolders are searched; hidden files are
    not used. Sounds are paired by their path in the folder without the suffix. vab compare shows reports side by side.

    Args:
        real: Folder of the real sounds; or a .npz that --save_reference wrote, which gives the same numbers.
        generated: Folder of the generated sounds.
        out: A .json file for the metrics, each with its card.
        judges: Frozen audio networks that compute embeddings and class probabilities: one, several with commas between,
            or a list.
        metrics: all, or some of fad, fad_infinity, fad_infinity_fadtk, kad, kad_kadtk, kld, kld_epsilon, kld_sigmoid,
            inception_score (of every judge; of one as fad_vggish) and synchrony. fad_infinity_fadtk, kad_kadtk and
            kld_epsilon compare with what other tools print.
        pair: How sounds are compared. name: in pairs, and a name without counterpart is refused; none: as two sets;
            auto: in pairs if any name is on both sides.
        seconds: How many seconds of each sound are used, from its start; null for all.
        short: What to do with shorter sounds. keep: use them as they are, each judge in its own way; pad: append
            silence; refuse: treat them as files that cannot be used.
        remove_mean: Subtract each file's mean over time, before it is resampled and cut, as av-benchmark does.
        inception_splits: Parts of which the inception score is the mean.
        labels: A CSV with the columns file and labels (joined by ;), for fad and kld by class in the report.
        csv: A .csv file for the metrics of each sound.
        plots: Folder for plots: distributions, and spectrograms of the best, middle and worst pairs.
        save_reference: A .npz file for what the judges computed from the real sounds.
        on_error: What to do with a file that cannot be used, or a name without counterpart. stop: refuse; skip: leave
            it out and count it.
        num_workers: Processes that decode; half as many as there are cores if not given, 0 for none.
        batch_size: Sounds that go through a judge together.
        device: Where the judges run: auto, cpu, cuda, ...
        seed: Of the parts of the inception score and the subsets of fad_infinity.
        overwrite: Replace files that are there.

    Raises:
        UserError: If an input cannot be used, an output is in the way, or a number is out of range.
    """
    from vab.data.extract.sounds import Listening
    from vab.evaluation import reference
    from vab.evaluation.details import by_class, read_labels, write_per_file
    from vab.evaluation.figures import METRICS, Comparison, check_metrics
    from vab.evaluation.plots import draw, plots_of
    from vab.evaluation.sides import Folder, Side, find_folder, is_paired, judge_folder
    from vab.frozen import device_named
    from vab.frozen.judges import load_judge

    names, chosen = _listed(judges), _listed(metrics)
    chosen = list(METRICS) if chosen == ["all"] else chosen
    _check_numbers(seconds, inception_splits, num_workers, batch_size, seed)
    if not names or len(set(names)) < len(names):
        raise UserError(f"--judges are one or more different names, got {judges}")
    check_metrics(chosen, names)
    outputs = {"out": (out, ".json"), "csv": (csv, ".csv"), "save_reference": (save_reference, ".npz")}
    check_files(outputs, [real, generated], overwrite)
    if plots is not None:
        there = [path for name in names for path in plots_of(Path(plots), name) if path.exists()]
        if there and not overwrite:
            raise UserError(f"--plots: {there[0]} is there already: give another folder, or --overwrite true")
        try:
            Path(plots).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--plots {plots}: no such folder can be made ({error.strerror})") from error
    classes = None if labels is None else read_labels(labels)
    made_folder = find_folder(generated)
    if inception_splits > len(made_folder.files):
        raise UserError(
            f"--inception_splits {inception_splits}: each part needs a sound, {generated} has {len(made_folder.files)}"
        )
    if classes is not None and not any(classes.get(key) for key in made_folder.keys):
        key = made_folder.keys[0]
        raise UserError(f"--labels has no class for any of these sounds: it must list them as {key!r}, or {key}.wav")
    real_folder = None if Path(real).suffix == ".npz" else find_folder(real)
    where = device_named(device)
    listeners = [load_judge(name, where) for name in names]
    listening = Listening(tuple(dict.fromkeys(j.sample_rate for j in listeners)), seconds, short, remove_mean)

    def judged(folder: Folder, title: str) -> Side:
        workers = _workers(num_workers, len(folder.files))
        return judge_folder(
            folder, listeners, listening, num_workers=workers, batch_size=batch_size, on_error=on_error, title=title
        )

    # What can be refused is refused before the work; keys are compared again after it, when files may have dropped out.
    real_side = None if real_folder is not None else reference.load_reference(Path(real), listeners, listening)
    known = real_side if real_folder is None else real_folder
    assert known is not None
    paired = is_paired(pair, known.keys, made_folder.keys, skip=on_error == "skip")
    if real_folder is not None:
        real_side = judged(real_folder, "real")
    assert real_side is not None
    if save_reference is not None:
        reference.save_reference(Path(save_reference), real_side, listeners, listening)
    made_side = judged(made_folder, "generated")
    counts = (len(real_side), len(made_side))
    if paired:
        common = set(real_side.keys) & set(made_side.keys)
        kept = [key for key in real_side.keys if key in common]
        real_side, made_side = real_side.take(kept), made_side.take(kept)
    if min(len(real_side), len(made_side)) < 2:
        raise UserError(
            f"{len(real_side)} real and {len(made_side)} generated sounds{' that pair' if paired else ''} are left: at "
            f"least 2 of each are needed"
        )
    comparison = Comparison(real_side, made_side, paired, listening, seed, inception_splits)
    measured = comparison.measure(listeners, chosen)
    sides = {
        "paired": paired,
        "real": describe(real_side, str(real), counts[0] - len(real_side)),
        "generated": describe(made_side, str(generated), counts[1] - len(made_side)),
    }
    more = {} if classes is None else {"by_class": by_class(comparison, listeners, classes)}
    write_report(Path(out), measured, sides, more)
    if csv is not None:
        write_per_file(Path(csv), comparison, listeners)
    if plots is not None:
        draw(Path(plots), comparison, listeners, real_folder, made_folder)
    note = (
        f"{'paired by name' if paired else 'not paired'}; length: {listening.length}; mono: {listening.mono}; "
        "resampled with soxr HQ; +- is the standard error over generated sounds"
    )
    print_report(measured, sides, [note])
    for words in measured.warnings:
        print(f"warning: {words}", file=sys.stderr)
    return measured


def _listed(names: str | Sequence[str]) -> list[str]:
    items = [names] if isinstance(names, str) else names
    return [name.strip() for item in items for name in item.split(",")]


def _workers(num_workers: int | None, files: int) -> int:
    if num_workers is not None:
        return num_workers
    # Half of the cores: the judges need theirs, and starting a process takes longer than decoding some hundred files.
    workers = min(usable_cores() // 2, files // _FILES_PER_WORKER)
    return workers if workers > 1 else 0


def _check_numbers(
    seconds: float | None, inception_splits: int, num_workers: int | None, batch_size: int, seed: int
) -> None:
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must be 0 or more and below 2**32, got {seed}")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UserError(f"--seconds must be above 0, or null for whole sounds, got {seconds}")
    numbers = (("inception_splits", inception_splits, 1), ("num_workers", num_workers or 0, 0))
    for name, value, least in (*numbers, ("batch_size", batch_size, 1)):
        if value < least:
            raise UserError(f"--{name} must be {least} or more, got {value}")
