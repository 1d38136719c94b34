"""What the settings of ``vab fit`` mean for a plan: the task, its batches and steps, the segments."""

from __future__ import annotations

import copy
from typing import Any

from vab.data.addresses import is_address
from vab.data.reading.step_size import batches_of_step
from vab.data.shards.format import is_complete, read_manifest
from vab.planning.segments import spec_of_extraction
from vab.spec import SegmentSpec, UserError
from vab.tasks.base import BaseTask
from vab.tasks.building import build, class_of

_CLASSES = 527
"""Classes assumed without shards: AudioSet's, the most of the recipes'."""


def steps_of_run(trainer: dict[str, Any], records: int | None, per_step: int) -> int | None:
    """Optimizer steps of the run; None if they depend on records that are not known."""
    limits = []
    if (steps := trainer.get("max_steps", -1)) is not None and steps >= 0:
        limits.append(steps)
    epochs = trainer.get("max_epochs")
    if epochs is not None and epochs >= 0:
        if records is None:
            return limits[0] if limits else None
        limits.append(epochs * (records // per_step))
    return min(limits) if limits else None


def segments(data: dict[str, Any], extraction: dict[str, Any] | None) -> tuple[SegmentSpec, int | None, str]:
    """The spec, the number of training records if there are shards, and where both are from."""
    train = data["train"]
    folders = list(train) if isinstance(train, dict) else [train]
    levels = data.get("levels")
    if extraction is None and not any(map(is_address, folders)) and all(map(is_complete, folders)):
        manifests = [read_manifest(folder)[0] for folder in folders]
        spec = SegmentSpec.from_dict(manifests[0]["spec"])
        if levels:
            spec = SegmentSpec.from_dict(spec.to_dict() | {"num_codebooks": min(levels, spec.num_codebooks)})
        count = data.get("records_per_epoch") or sum(manifest["counts"]["records"] for manifest in manifests)
        return spec, count, f"the manifest of {folders[0]}"
    spec = spec_of_extraction(extraction or {}, levels)
    given = "the extraction's settings" if extraction else "configs/extract/paper.yaml, as there are no shards yet"
    return spec, None, f"{given}: {spec.codec}, {spec.vision}"


def make_task(
    model: dict[str, Any],
    spec: SegmentSpec,
    checkpointing: bool | None = None,
    parts: int | None = None,
) -> BaseTask:
    """The recipe's task, eager and without weights from a file."""
    kind = class_of(model["class_path"], BaseTask)
    arguments = copy.deepcopy(model.get("init_args", {})) | {
        "init_from": None,
        "compile": False,
        "warmup_steps": 0,
        "schedule_steps": 1_000_000,
    }
    backbone = arguments.pop("backbone")
    sizes = backbone.setdefault("init_args", {})
    sizes["spec"] = spec
    if checkpointing is not None:
        sizes["activation_checkpointing"] = checkpointing
    if isinstance(sampler := arguments.get("sampler"), dict):
        sampler["decode_steps"] = 1  # each takes the same memory
    if "micro_batch_size" in arguments:
        arguments["micro_batch_size"] = arguments["micro_batch_size"] or parts
    if "inputs" in arguments:
        arguments["labels"] = [str(number) for number in range(_CLASSES)]
    task: BaseTask = kind(build(backbone), **arguments)
    return task


def batches(data: dict[str, Any], trainer: dict[str, Any], task: BaseTask, gpus: int) -> tuple[int, int]:
    """Records in a batch of a GPU, and batches in a step."""
    size, whole = data["batch_size"], data.get("global_batch_size")
    if whole is None:
        return size, trainer.get("accumulate_grad_batches") or 1
    count = batches_of_step(whole, gpus, size if task.accumulates else whole)
    return whole // gpus // count, count


def generated_at_once(trainer: dict[str, Any], data: dict[str, Any]) -> int:
    """The most records that a callback generates at once."""
    sizes = [0]
    for callback in trainer.get("callbacks") or ():
        own = callback.get("init_args", {})
        if callback["class_path"] == "vab.callbacks.GenerationEval":
            sizes.append(own.get("batch_size") or data.get("val_batch_size") or data["batch_size"])
        elif callback["class_path"] == "vab.callbacks.MediaLog":
            sizes.append(own.get("num_records", 4))
    return max(sizes)


def strategy_name(trainer: dict[str, Any]) -> str:
    """The class of the strategy, or its short name."""
    strategy = trainer.get("strategy")
    return str(strategy["class_path"] if isinstance(strategy, dict) else strategy)


def precision_name(name: Any) -> Any:
    """The precision, by its full name.

    Raises:
        UserError: If no rehearsal is made in it.
    """
    aliases = {None: "32-true", "32": "32-true", 32: "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    precision = aliases.get(name, name)
    if precision not in ("32-true", "bf16-mixed", "16-mixed", "bf16-true"):
        known = "32-true, bf16-mixed, 16-mixed or bf16-true"
        raise UserError(f"plan: --trainer.precision {name} is not planned for: give {known}")
    return precision
