"""What a training run needs, from its settings alone: memory, time, epochs, disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vab.callbacks import EMA
from vab.planning.cards import CARDS, CONTEXT_BYTES, FRAGMENTATION, GIB, usable_bytes
from vab.planning.fake_cuda import fake_cuda
from vab.planning.peaks import TRAINING, Peaks, find_peaks
from vab.planning.recipe import (
    batches,
    generated_at_once,
    make_task,
    precision_name,
    segments,
    steps_of_run,
    strategy_name,
)
from vab.planning.segments import record_bytes
from vab.spec import SegmentSpec, UserError
from vab.tasks.base import BaseTask

_FRACTION_OF_ALLOCATED = 1 - FRAGMENTATION


@dataclass(frozen=True)
class Row:
    """One number of a plan, and how it was got."""

    section: str
    name: str
    value: str
    source: str


@dataclass
class Plan:
    """A plan: its numbers as text for people, and as plain JSON."""

    rows: list[Row] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    fits: bool = True
    """Whether every kind of step, as the recipe sets it, fits into the memory of the card."""

    def add(self, section: str, name: str, value: str, source: str, number: Any = None) -> None:
        """Add a row, and its number under ``section.name`` if given."""
        self.rows.append(Row(section, name, value, source))
        if number is not None:
            self.numbers.setdefault(section, {})[name] = number

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return {"fits": self.fits, "numbers": self.numbers, "rows": [asdict(row) for row in self.rows]}


def plan_run(
    config: dict[str, Any],
    gpus: int,
    memory_gb: float,
    card: str | None = None,
    mfu: float = 0.4,
    extraction: dict[str, Any] | None = None,
    records: int | None = None,
    compare: bool = True,
) -> Plan:
    """Compute a plan.

    Args:
        config: Settings of ``vab fit``, parsed and not instantiated: trainer, data, model.
        gpus: On all nodes together.
        memory_gb: Memory of each, as its maker names it.
        card: Only this one is timed; all cards of `CARDS` by default.
        mfu: Assumed share of the card's rate of products that training reaches.
        extraction: Settings of ``vab extract``, if there are no shards yet; the paper's by default.
        records: In the training data, if there are no shards yet.
        compare: Plan for the other setting of activation checkpointing, too, which takes as long again.

    Raises:
        UserError: If a number is out of range, the precision or a setting is one that is not planned for.
    """
    if gpus < 1 or memory_gb <= 0 or not 0 < mfu <= 1:
        raise UserError(
            f"plan: gpus must be 1 or more, memory above 0, mfu in (0, 1]; got {gpus}, {memory_gb:g} and {mfu:g}"
        )
    plan, trainer, data, model = Plan(), config["trainer"], config["data"], config["model"]
    spec, found, spec_source = segments(data, extraction)
    records = records or found
    precision = precision_name(trainer.get("precision"))
    with fake_cuda(), torch.device("cuda"):
        task = make_task(model, spec)
    backbone = task.backbone.init_args
    batch, accumulated = batches(data, trainer, task, gpus)
    parallel = gpus > 1
    parts = data["batch_size"] if batch > data["batch_size"] else None
    has_average = any(one["class_path"] == "vab.callbacks.EMA" for one in trainer.get("callbacks") or ())
    generated = generated_at_once(trainer, data) if task.generates else 0

    trained = [p for p in task.parameters() if p.requires_grad]
    count, gradient_bytes = sum(p.numel() for p in task.parameters()), sum(p.nbytes for p in trained)
    add = plan.add
    add("network", "parameters", f"{count / 1e6:,.0f} million", "counted on the network, made of fake tensors", count)
    add("network", "segment", f"{spec.num_codebooks} x {spec.num_steps} codes, {spec.num_frames} frames", spec_source)
    step = f"{batch} a GPU x {gpus} GPUs" + (f" x {accumulated} batches" if accumulated > 1 else "")
    per_step = batch * gpus * accumulated
    add("network", "records in a step", f"{step} = {per_step}", "the recipe's data and trainer", per_step)

    room = _FRACTION_OF_ALLOCATED * (usable_bytes(memory_gb) - CONTEXT_BYTES)
    is_fsdp = strategy_name(trainer).endswith("FSDP")
    recomputes = bool(backbone["activation_checkpointing"])
    for checkpointing in (recomputes, not recomputes)[: 2 if compare else 1]:
        peaks = find_peaks(
            lambda: make_task(model, spec, checkpointing, parts),  # noqa: B023
            batch,
            precision,
            at_once=parts,
            val_batch_size=data.get("val_batch_size") or data["batch_size"],
            generated=generated if checkpointing == recomputes else 0,
            callbacks=(lambda: (EMA(0.999),)) if has_average else tuple,
            clip=trainer.get("gradient_clip_val") or 0.0,
        )
        largest = _largest_block(task)
        sharded = _Sharded(peaks.at_rest, gradient_bytes, largest, gpus)
        buckets = gradient_bytes if parallel else 0
        if checkpointing == recomputes:
            extra = sharded.change if is_fsdp and parallel else buckets
            _add_memory(plan, peaks, extra, room, memory_gb, batch, is_fsdp and parallel)
        name = "with" if checkpointing else "without"
        ways = {"DDP": buckets, "FSDP": sharded.change} if parallel else {"one GPU": 0}
        for way, change in ways.items():
            most = peaks.largest_batch(room - change)
            text = f"{most} records a GPU" if most else "none fits"
            source = "two batches measured on fake CUDA, and the line through them"
            add("largest batch", f"{way}, {name} activation checkpointing", text, source, most)
    _add_time(plan, task, batch, accumulated, gpus, precision, card, mfu, recomputes, trainer, records)
    _add_data(plan, spec, data, records, per_step, trainer)
    _add_files(plan, trainer, config, gradient_bytes, has_average)
    return plan


class _Sharded:
    """What FSDP changes on each rank: it keeps its share of the state, and gathers a block when the block runs."""

    def __init__(self, at_rest: float, gradients: int, largest_block: int, gpus: int) -> None:
        gathered = 2 * largest_block  # the block that runs, and the next one
        self.change = round(-at_rest * (1 - 1 / gpus) + gathered + gradients / gpus)


def _largest_block(task: BaseTask) -> int:
    return max(sum(p.nbytes for p in block.parameters()) for block in task.backbone.blocks)


def _add_memory(
    plan: Plan, peaks: Peaks, extra: float, room: float, memory_gb: float, batch: int, is_fsdp: bool
) -> None:
    measured = "live bytes of the trainer's steps on fake CUDA"
    plan.add("memory", "between steps, with gradients", _gib(peaks.at_rest), measured, round(peaks.at_rest))
    if extra:
        name = "FSDP: share of the state, gathered blocks" if is_fsdp else "DDP: gradient buckets, at most"
        source = "arithmetic: bytes of the weights" + (" and of the state" if is_fsdp else "")
        plan.add("memory", name, _gib(extra), source, round(extra))
    for name, value in peaks.at_batch.items():
        label = f"{name} step, {batch} records" if name in TRAINING else name
        total = value + extra
        line = name in TRAINING and batch not in peaks.rehearsed
        source = "{} and {} records on fake CUDA, extrapolated".format(*peaks.rehearsed) if line else measured
        source += ", with the row above" if extra else ""
        plan.add("memory", f"peak: {label}", _gib(total), source, round(total))
    worst = max(peaks.at_batch.values()) + extra
    needed = worst / _FRACTION_OF_ALLOCATED + CONTEXT_BYTES
    plan.fits = worst <= room
    plan.add("memory", "CUDA context, cuBLAS, NCCL", _gib(CONTEXT_BYTES), "allowance, not measured", CONTEXT_BYTES)
    plan.add("memory", "fragmentation", f"{FRAGMENTATION:.0%}", "allowance, not measured")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    usable = usable_bytes(memory_gb)
    text = f"{_gib(needed)} of {_gib(usable)}: {verdict}"
    source = "the largest peak and the allowances"
    plan.add("memory", f"needed of a card of {memory_gb:g} GB", text, source, round(needed))


def _add_time(
    plan: Plan,
    task: BaseTask,
    batch: int,
    accumulated: int,
    gpus: int,
    precision: str,
    card: str | None,
    mfu: float,
    recomputes: bool,
    trainer: dict[str, Any],
    records: int | None,
) -> None:
    flops = task.step_flops(batch) * accumulated
    note = "vab.flops: products and attention, forward and backward"
    plan.add("time", "operations of a step, each GPU", f"{flops / 1e12:,.1f} TFLOP", note, flops)
    computed = flops * 4 / 3 if recomputes else flops
    steps = steps_of_run(trainer, records, batch * gpus * accumulated)
    for name, properties in CARDS.items():
        if card not in (None, name):
            continue
        seconds = computed / (properties.tflops * 1e12 * mfu)
        if precision == "32-true":
            seconds *= 2  # TensorFloat-32
        text = f"{seconds:.2f} s a step" + ("" if steps is None else f", {steps * seconds / 3600:,.0f} h in all")
        source = f"assumed: MFU {mfu:.0%} of {properties.tflops:g} TFLOP/s"
        plan.add("time", name, text, source + (", 4/3 to recompute" if recomputes else ""), round(seconds, 4))


def _add_data(
    plan: Plan, spec: SegmentSpec, data: dict[str, Any], records: int | None, per_step: int, trainer: dict[str, Any]
) -> None:
    steps = steps_of_run(trainer, records, per_step)
    if steps is not None:
        plan.add("data", "steps", f"{steps:,}", "the trainer's max_steps, or max_epochs x steps of an epoch", steps)
        seen = steps * per_step
        plan.add("data", "records seen", f"{seen:,}", "steps x records in a step", seen)
        tokens = seen * spec.num_codebooks * spec.num_steps
        plan.add("data", "codes seen", f"{tokens / 1e9:,.1f} billion", "records x levels x codec steps", tokens)
    if records is None:
        plan.add("data", "epochs", "not known", "needs the shards, or --records")
        return
    if steps is not None:
        epochs = steps * per_step / records
        plan.add("data", "epochs", f"{epochs:,.1f}", f"records seen / {records:,} records", round(epochs, 2))
    size = records * record_bytes(spec)
    plan.add("data", "training shards", f"{size / 1e9:,.1f} GB", "records x bytes of a record, in tars", size)


def _add_files(
    plan: Plan, trainer: dict[str, Any], config: dict[str, Any], weight_bytes: int, has_average: bool
) -> None:
    logger = trainer.get("logger")
    settings = logger.get("init_args", {}) if isinstance(logger, dict) else {}
    folder = Path(str(settings.get("save_dir", "lightning_logs"))) / str(settings.get("name", ""))
    kept = 0
    for callback in trainer.get("callbacks") or ():
        if callback["class_path"] == "vab.callbacks.Checkpoints":
            own = callback.get("init_args", {})
            kept += max(0, own.get("save_top_k", 1)) + bool(own.get("save_last"))
    each = weight_bytes * (4 if has_average else 3)
    plan.add("files", "folder", f"{folder}/version_*", "the trainer's logger: config.yaml, TensorBoard's events")
    source = "weights and two states of Adam" + (", and the moving average" if has_average else "")
    plan.add("files", "checkpoints", f"{kept} x {each / 1e9:.1f} GB", source, kept * each)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
