"""How good the sounds of any system are, beside real ones: every figure with a card that says what it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vab.cores import usable_cores
from vab.data.extract.sounds import Listening, Short
from vab.evaluation import folders, references, reports
from vab.evaluation.figures import METRICS, Comparison, Measured, check_metrics
from vab.evaluation.plots import draw, plots_of
from vab.evaluation.sides import OnError, Side, hear
from vab.files import check_files
from vab.frozen import device_named
from vab.frozen.judges import load_judge
from vab.spec import UserError

_FILES_PER_WORKER = 100
"""A worker process takes seconds to start: worth it from this many files."""


def evaluate(
    real: str,
    generated: str,
    out: str,
    judges: str | list[str] = "tiny",
    metrics: str | list[str] = "all",
    pair: folders.Pair = "auto",
    seconds: float | None = 10.0,
    short: Short = "keep",
    remove_mean: bool = False,
    inception_splits: int = 1,
    labels: str | None = None,
    csv: str | None = None,
    plots: str | None = None,
    save_reference: str | None = None,
    on_error: OnError = "stop",
    num_workers: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> Measured:
    """Compare two folders of sound, of any system: a table here, and report.json with a metric card beside each number.

    Files are wav, flac, ogg, mp3, mp4 or anything else that FFmpeg decodes; subfolders count, hidden files do not.
    Sounds pair by their path in the folder without the suffix. vab compare puts reports side by side.

    Args:
        real: Folder of the real sounds, or a .npz that --save_reference wrote: same numbers, no audio needed.
        generated: Folder of the generated sounds.
        out: The .json file to write.
        judges: Networks that listen: one, several with commas between, or a list.
        metrics: all, or some of fad, fad_infinity, fad_infinity_fadtk, kad, kad_kadtk, kld, kld_epsilon, kld_sigmoid,
            inception_score (of every judge; of one as fad_vggish) and synchrony. fad_infinity_fadtk, kad_kadtk and
            kld_epsilon compare with what other tools print.
        pair: name: by name, a name without counterpart is refused; none: the sets as wholes; auto: by name if any name
            is on both sides.
        seconds: How much of each sound is heard; null for all.
        short: What becomes of shorter sounds. keep: they stay short, and each judge does what its field does; pad:
            silence follows; refuse.
        remove_mean: Subtract each file's mean over time, before it is resampled and cut, as av-benchmark does.
        inception_splits: Parts of which the inception score is the mean.
        labels: A CSV with the columns file and labels (joined by ;), for fad and kld by class in the report.
        csv: A .csv file for the figures of each sound.
        plots: Folder for pictures: distributions, and spectrograms of the best, middle and worst pairs.
        save_reference: A .npz file for all that was heard on the real side.
        on_error: stop at a file that cannot be used; or skip it, and names without counterpart, and count them.
        num_workers: Processes that decode; half as many as there are cores if not given, 0 for none.
        batch_size: Sounds that a judge hears at once.
        device: Where the judges run: auto, cpu, cuda, ...
        seed: Of what is drawn: the parts of the inception score and the subsets of fad_infinity.
        overwrite: Replace files that are there.

    Raises:
        UserError: If an input cannot be used, an output is in the way, or a number is out of range.
    """
    names, chosen = _listed(judges), _listed(metrics)
    chosen = list(METRICS) if chosen == ["all"] else chosen
    _check_numbers(seconds, inception_splits, num_workers, batch_size, seed)
    if not names or len(set(names)) < len(names):
        raise UserError(f"--judges are one or more different names, got {judges}")
    check_metrics(chosen, names)
    pictures = None if plots is None else Path(plots)
    outputs = {"out": (out, ".json"), "csv": (csv, ".csv"), "save_reference": (save_reference, ".npz")}
    check_files(outputs, [real, generated], overwrite)
    if pictures is not None:
        if not overwrite and (there := [path for name in names for path in plots_of(pictures, name) if path.exists()]):
            raise UserError(f"--plots: {there[0]} is there already: give another folder, or --overwrite true")
        try:
            pictures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--plots {plots}: no such folder can be made ({error.strerror})") from error
    class_labels = None if labels is None else folders.read_labels(labels)
    made_folder = folders.find_folder(generated)
    if inception_splits > len(made_folder.files):
        raise UserError(
            f"--inception_splits {inception_splits}: each part needs a sound, {generated} has {len(made_folder.files)}"
        )
    if class_labels is not None and not any(class_labels.get(key) for key in made_folder.keys):
        key = made_folder.keys[0]
        raise UserError(f"--labels has no class for any of these sounds: it must list them as {key!r}, or {key}.wav")
    reference = Path(real) if Path(real).suffix == ".npz" else None
    real_folder = folders.find_folder(real) if reference is None else None
    where = device_named(device)
    listeners = [load_judge(name, where) for name in names]
    listening = Listening(tuple(dict.fromkeys(j.sample_rate for j in listeners)), seconds, short, remove_mean)

    # What can be refused is, before anything is heard; names once more afterwards, when files may have dropped out.
    known = None if reference is None else references.load_reference(reference, listeners, listening)
    real_keys = real_folder.keys if real_folder is not None else known.keys if known is not None else ()
    skip = on_error == "skip"
    paired = folders.is_paired(pair, real_keys, made_folder.keys, skip)

    def side(folder: folders.Folder, title: str) -> Side:
        workers = _workers(num_workers, len(folder.files))
        return hear(
            folder, listeners, listening, num_workers=workers, batch_size=batch_size, on_error=on_error, title=title
        )

    heard = side(real_folder, "real") if real_folder is not None else known
    assert heard is not None
    if save_reference is not None:
        references.save_reference(Path(save_reference), heard, listeners, listening)
    made = side(made_folder, "generated")
    counts = (len(heard), len(made))
    if paired:
        common = set(heard.keys) & set(made.keys)
        heard, made = (one.take([key for key in heard.keys if key in common]) for one in (heard, made))
    if min(len(heard), len(made)) < 2:
        raise UserError(
            f"{len(heard)} real and {len(made)} generated sounds{' that pair' if paired else ''} are left: at least 2 "
            f"of each are needed"
        )
    comparison = Comparison(heard, made, paired, listening, seed, inception_splits)
    measured = comparison.measure(listeners, chosen)
    sides = {
        "paired": paired,
        "real": reports.describe(heard, str(real), counts[0] - len(heard)),
        "generated": reports.describe(made, str(generated), counts[1] - len(made)),
    }
    more = {} if class_labels is None else {"by_class": reports.by_class(comparison, listeners, class_labels)}
    reports.write_report(Path(out), measured, sides, more)
    if csv is not None:
        reports.write_per_file(Path(csv), comparison, listeners)
    if pictures is not None:
        real_files = {} if real_folder is None else dict(zip(real_folder.keys, real_folder.files, strict=True))
        made_files = dict(zip(made_folder.keys, made_folder.files, strict=True))
        draw(pictures, comparison, listeners, real_files, made_files)
    reports.print_table(measured, f"{generated} beside {real}", _notes(comparison, counts))
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


def _notes(comparison: Comparison, counts: tuple[int, int]) -> list[str]:
    """What a reader must know of the two sides."""
    notes = [
        f"{'paired by name' if comparison.paired else 'not paired'}; heard: {comparison.listening.length}; "
        f"mono: {comparison.listening.mono}; resampled with soxr HQ; +- is the standard error over generated sounds"
    ]
    sides = (("real", comparison.real, counts[0]), ("generated", comparison.generated, counts[1]))
    for name, side, count in sides:
        lacks = {
            "left out as unusable": len(side.lost),
            "without counterpart": count - len(side),
            "silent": int((side.level_db == float("-inf")).sum()),
            "other files ignored": len(side.ignored),
        }
        if words := ", ".join(f"{number} {what}" for what, number in lacks.items() if number):
            first = next(iter(side.lost), None)
            notes.append(
                f"{name}: {len(side)} sounds used; {words}" + (f" (the first unusable: {first})" if first else "")
            )
    return notes


def _check_numbers(
    seconds: float | None, inception_splits: int, num_workers: int | None, batch_size: int, seed: int
) -> None:
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must be 0 or more and below 2**32, got {seed}")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UserError(f"--seconds must be above 0, or null for whole sounds, got {seconds}")
    least = {
        "inception_splits": (inception_splits, 1),
        "num_workers": (num_workers or 0, 0),
        "batch_size": (batch_size, 1),
    }
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise UserError(f"--{name} must be {smallest} or more, got {value}")
