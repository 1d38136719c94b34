"""The model card of an exported model: what it is, how it was trained, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vab.evaluation.report import number
from vab.frozen.weight_files.catalogue import PUBLISHED
from vab.metrics.card import Figure
from vab.pages import render_page
from vab.spec import SegmentSpec
from vab.tasks import AlignTask, BaseTask, ClassifyTask, PretrainTask

_USES = {
    PretrainTask: "vab generate --checkpoint {folder} --video VIDEO.mp4 --out VIDEO.wav",
    AlignTask: "vab retrieve --checkpoint {folder} --data SHARDS",
    ClassifyTask: "vab classify --checkpoint {folder} --media FILE --top 5",
}
_OURS = "Apache 2.0, part of vab"


def model_card(task: BaseTask, config: Mapping[str, Any], figures: Mapping[str, Figure], name: str) -> str:
    """The README of an exported model, as Markdown.

    Args:
        task: The model.
        config: As `vab.tasks.exported.describe` gives it.
        figures: Of ``vab evaluate``, by name; may be none.
        name: Of the folder.
    """
    trained, arguments = config["trained"], config["init_args"]
    optimizer = arguments.get("optimizer") or {}
    versions = {kind: trained[kind] for kind in ("vab", "torch", "lightning") if kind in trained}
    sizes = {f"backbone {key}": value for key, value in task.backbone.init_args.items() if key != "spec"}
    others = {key: arguments[key] for key in arguments if key not in ("backbone", "optimizer", "labels", "init_from")}
    text = render_page(
        __package__,
        "model_card.md",
        name=name,
        python_name=repr(name),
        kind=type(task).__name__,
        vab=config["vab"],
        summary=(type(task).__doc__ or "").strip().splitlines()[0],
        parameters=sum(parameter.numel() for parameter in task.parameters()),
        use=_USES.get(type(task), "# {folder}").format(folder=name),
        training={
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
            "versions": _words("", versions),
        },
        segment=_segment(task.spec),
        settings=sizes | others,
        labels=config["labels"],
        step=trained.get("validated_step"),
        validation={key: number(value) for key, value in sorted((trained.get("figures") or {}).items())},
        figures=[_figure(key, figure) for key, figure in figures.items()],
    )
    return text.rstrip() + "\n"


def _segment(spec: SegmentSpec) -> dict[str, Any]:
    codecs = {name.partition(":")[0]: published for name, published in PUBLISHED["codec"].items()}
    published = codecs.get(codec := spec.codec.partition(":")[0])
    licence = published.licence if published else _OURS if codec in codecs else "not known to vab"
    return {
        "segment": f"{spec.segment_seconds:g} s",
        "codec": f"{spec.codec}, {spec.sample_rate} Hz, {spec.code_rate:g} steps per second, "
        f"{spec.num_codebooks} levels of {spec.codebook_size}",
        "codec's weights, SHA-256": spec.codec_hash,
        "codec's licence": licence,
        "vision encoder": f"{spec.vision}, {spec.video_fps:g} frames per second, {spec.feature_dim} channels",
        "vision encoder's weights, SHA-256": spec.vision_hash,
        "vision encoder's licence": _OURS if spec.vision == "tiny" else "see its model card",
    }


def _figure(name: str, figure: Figure) -> dict[str, Any]:
    """A number and all that it depends on."""
    error = "" if figure.error is None else f" +- {number(figure.error)}"
    entries = {key: value for key, value in asdict(figure.card).items() if value is not None}
    card = {key: _words("", value) if isinstance(value, dict) else value for key, value in entries.items()}
    return {"name": name, "value": number(figure.value) + error, "better": figure.card.better, "card": card}


def _words(name: str, values: Mapping[str, Any]) -> str:
    return " ".join(filter(None, [name, ", ".join(f"{key} {value}" for key, value in values.items())]))
