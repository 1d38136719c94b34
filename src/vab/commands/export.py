"""A trained model as a folder to pass on: weights alone, a description that runs nothing, a model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import yaml
from torch import Tensor

from vab import __version__
from vab.evaluation.report import number, read_figures
from vab.files import fitting_name, sync_folder, write_atomically
from vab.frozen.weight_files.catalogue import PUBLISHED
from vab.metrics.card import Figure
from vab.spec import SegmentSpec, UserError
from vab.tasks import AlignTask, BaseTask, ClassifyTask, PretrainTask, load_task
from vab.tasks.checkpoints import find_checkpoint
from vab.tasks.exported import CARD, CONFIG, FORMAT, FORMAT_VERSION, WEIGHTS, is_exported

_USES = {
    PretrainTask: "vab generate --checkpoint {folder} --video VIDEO.mp4 --out VIDEO.wav",
    AlignTask: "vab retrieve --checkpoint {folder} --data SHARDS",
    ClassifyTask: "vab classify --checkpoint {folder} --media FILE --top 5",
}
_LICENCES = {
    name.partition(":")[0]: published.licence if published else "Apache 2.0, part of vab"
    for name, published in PUBLISHED["codec"].items()
}


def export(
    checkpoint: str,
    out: str,
    weights: Literal["ema", "live"] = "ema",
    report: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a trained model as a folder to pass on: model.safetensors, config.json and README.md, the model card.

    Every --checkpoint and --model.init_from takes the folder. Nothing in it can run code, and it holds neither
    optimizer nor data: a run cannot go on from it.

    Args:
        checkpoint: A .ckpt file, or a run's folder.
        out: Folder to write.
        weights: The averaged weights where the run kept an average, or the live ones.
        report: A report of vab evaluate, whose figures the card is to show with what they depend on.
        overwrite: Whether an exported model may give way.

    Raises:
        UserError: If there is no checkpoint, or the folder cannot be written.
    """
    folder = Path(out)
    _check(folder, overwrite)
    figures = {} if report is None else read_figures(Path(report))
    path = find_checkpoint(checkpoint)
    if path.suffix == Path(WEIGHTS).suffix:
        raise UserError(f"{path.parent} is an exported model already: copy it, or export the run's checkpoint")
    task = load_task(path, weights)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    config = describe(task, content, weights, _settings(path))
    card = model_card(task, config, figures, folder.name)
    write_model(folder, config, task.state_dict(), card)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{folder}: {type(task).__name__}, {config['weights']} weights of step {content['global_step']}, {size:,} bytes"
    )
    return folder


def describe(
    task: BaseTask, content: Mapping[str, Any], weights: str, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ``config.json`` of a model.

    Args:
        task: As it was loaded.
        content: The checkpoint that it was loaded from.
        weights: ``ema`` or ``live``, as asked for; a run without an average has live ones only.
        settings: Of the run (its config.yaml), where they are known.
    """
    hyper_parameters = content["hyper_parameters"]
    init_args = {name: value for name, value in hyper_parameters.items() if not name.startswith("_")}
    data, run = content.get("ShardDataModule", {}), dict(content.get("run", {}))
    trainer = (settings or {}).get("trainer") or {}
    has_average = "live_state_dict" in content
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "class_path": hyper_parameters["_class_path"],
        "init_args": init_args | {"init_from": None},
        "spec": task.spec.to_dict(),
        "labels": list(getattr(task, "labels", ())),
        "weights": weights if has_average else "live",
        "state": {"audio_statistics": content.get("audio_statistics")},
        "trained": {
            "steps": content["global_step"],
            "epochs": content["epoch"],
            "began_with": init_args.get("init_from"),
            "data_sha256": data.get("manifest_hash"),
            "average_of_steps": content.get("ema_updates") if weights == "ema" else None,
            "gradient_clip_val": trainer.get("gradient_clip_val"),
            **run,
        },
        "vab": __version__,
    }


def model_card(task: BaseTask, config: Mapping[str, Any], figures: Mapping[str, Figure], name: str) -> str:
    """The README of an exported model, as Markdown.

    Args:
        task: The model.
        config: As `describe` gives it.
        figures: Of ``vab evaluate``, by name; may be none.
        name: Of the folder.
    """
    trained, spec = config["trained"], task.spec
    parameters = sum(parameter.numel() for parameter in task.parameters())
    summary = (type(task).__doc__ or "").strip().splitlines()[0]
    sizes = {key: value for key, value in task.backbone.init_args.items() if key != "spec"}
    optimizer = config["init_args"].get("optimizer") or {}
    training = {
        "steps": trained["steps"],
        "records per step": trained.get("records_per_step"),
        "records of the training set": trained.get("records"),
        "SHA-256 of the training set's manifest": trained["data_sha256"],
        "began with": trained["began_with"],
        "optimizer": _words(optimizer.get("class_path", "").rpartition(".")[2], optimizer.get("init_args", {})),
        "gradient clipping": trained["gradient_clip_val"],
        "precision": trained.get("precision"),
        "devices": trained.get("world_size"),
        "weights": config["weights"],
        "steps in the average": trained["average_of_steps"],
        "versions": _words("", {kind: trained[kind] for kind in ("vab", "torch", "lightning") if kind in trained}),
    }
    others = {
        key: value
        for key, value in config["init_args"].items()
        if key not in ("backbone", "optimizer", "labels", "init_from")
    }
    parts = [
        f"# {name}",
        f"`{type(task).__name__}` of vab {config['vab']}: {summary} {parameters:,} parameters.",
        "## Use\n\n```bash\n" + _USES.get(type(task), "# {folder}").format(folder=name) + "\n```\n\n"
        f"`--model.init_from {name}` begins a run with these weights; in Python: `vab.tasks.load_task({name!r})`.\n"
        "The folder holds weights and JSON, nothing that is run.",
        "## Trained\n\n" + _table(training),
        "## What it hears and sees\n\n" + _table(_segment(spec)),
        "## Sizes and settings\n\n" + _table({f"backbone {key}": value for key, value in sizes.items()} | others),
    ]
    if labels := config["labels"]:
        parts.append(f"## Labels\n\n{len(labels)}: {', '.join(labels[:20])}{' ...' if len(labels) > 20 else ''}")
    if logged := trained.get("figures"):
        rows = {key: number(value) for key, value in sorted(logged.items())}
        parts.append(f"## Validation in training, at step {trained['validated_step']}\n\n" + _table(rows))
    if figures:
        parts.append("## Evaluation\n\n" + "\n".join(_figure(key, figure) for key, figure in figures.items()))
    return "\n\n".join(parts) + "\n"


def write_model(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], card: str) -> None:
    """Write a folder whole or not at all; one that is there gives way at the end.

    Raises:
        UserError: If the disk is full.
    """
    whole, former = (
        folder.with_name(fitting_name(f".{folder.name}", f".{kind}-{os.getpid()}")) for kind in ("new", "former")
    )
    try:
        whole.mkdir(parents=True)
        stored = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        write_atomically(whole / WEIGHTS, safetensors.torch.save(stored, {"format": "pt"}))
        write_atomically(whole / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        write_atomically(whole / CARD, card)
        if folder.exists():
            folder.rename(former)
        whole.rename(folder)
        sync_folder(folder.absolute().parent)
    finally:
        shutil.rmtree(whole, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def _check(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot be written, before anything is read."""
    if folder.exists() and not (folder.is_dir() and is_exported(folder)):
        raise UserError(f"--out {folder} is there already, and is no exported model: give another name")
    if folder.exists() and not overwrite:
        raise UserError(f"--out {folder} is there already: give another name, or --overwrite true")
    parent = next(place for place in folder.absolute().parents if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder} cannot be written: {parent} is not a folder to write in")


def _settings(path: Path) -> dict[str, Any] | None:
    """The config of the run that a checkpoint lies in."""
    file = path.parent.parent / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None  # a checkpoint alone: the card has a line less
    return content if isinstance(content, dict) else None


def _segment(spec: SegmentSpec) -> dict[str, Any]:
    codec = spec.codec.partition(":")[0]
    vision = "Apache 2.0, part of vab" if spec.vision == "tiny" else "see its model card"
    return {
        "segment": f"{spec.segment_seconds:g} s",
        "codec": f"{spec.codec}, {spec.sample_rate} Hz, {spec.code_rate:g} steps per second, "
        f"{spec.num_codebooks} levels of {spec.codebook_size}",
        "codec's weights, SHA-256": spec.codec_hash,
        "codec's licence": _LICENCES.get(codec, "not known to vab"),
        "vision encoder": f"{spec.vision}, {spec.video_fps:g} frames per second, {spec.feature_dim} channels",
        "vision encoder's weights, SHA-256": spec.vision_hash,
        "vision encoder's licence": vision,
    }


def _figure(name: str, figure: Figure) -> str:
    """A number and all that it depends on."""
    error = "" if figure.error is None else f" +- {number(figure.error)}"
    title = f"- **{name}** {number(figure.value)}{error} ({figure.card.better} is better)"
    entries = {key: value for key, value in asdict(figure.card).items() if value is not None}
    words = {key: _words("", value) if isinstance(value, dict) else value for key, value in entries.items()}
    return "\n".join([title, *(f"  - {key}: {value}" for key, value in words.items())])


def _table(rows: Mapping[str, Any]) -> str:
    there = {key: value for key, value in rows.items() if value not in (None, "", {})}
    cells = {key: str(value).replace("|", "\\|") for key, value in there.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells.items())])


def _words(name: str, values: Mapping[str, Any]) -> str:
    return " ".join(filter(None, [name, ", ".join(f"{key} {value}" for key, value in values.items())]))
