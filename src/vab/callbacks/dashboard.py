"""TensorBoard's pages for a run: a page of charts, and a row in the table of runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from vab.callbacks.averaging import EMA
from vab.callbacks.generation_eval import GenerationEval
from vab.callbacks.media import MediaLog
from vab.callbacks.meters import Meters
from vab.callbacks.tensorboard import tensorboards
from vab.data.reading.datamodule import ShardDataModule
from vab.tasks import BaseTask
from vab.tasks.base import Charts

_QUALITY: dict[str, list[str]] = {
    "Frechet distance of generated sound to codec round trips, by judge": [r"val/fad_\w+_to_codec$"],
    "KL divergence from codec round trips, by judge (nats)": [r"val/kld_\w+_to_codec$"],
    "agreement of the judge with the labels": [r"val/agreement$"],
    "recall of the record's own round trip": [r"val/recall_at_\d+_g2r$"],
}
_SYNCHRONY: dict[str, list[str]] = {
    "onsets met within the tolerance (share)": [r"val/onset_(recall|precision)_to_codec$"],
    "offset of onsets (s)": [r"val/onset_offset_to_codec$"],
}
_HEALTH: dict[str, list[str]] = {
    "entropy of generated codes by level (bits)": [r"health/entropy_level_\d+$"],
    "silence, and sounds with warnings (shares)": [r"health/(silence|share_with_warnings)$"],
    "loudness (dBFS)": [r"health/rms_db$"],
    "peak (1 is full scale)": [r"health/peak$"],
    "longest repetition (s)": [r"health/longest_repeat_seconds$"],
}
_THROUGHPUT: dict[str, list[str]] = {
    "codes and frames per second": [r"meters/positions_per_second$"],
    "records per second": [r"meters/records_per_second$"],
    "seconds per step": [r"meters/seconds_per_step$"],
    "share of time waiting for data": [r"meters/data_wait_share$"],
    "peak memory (GiB)": [r"meters/peak_memory_gib$"],
}
_UTILISATION: dict[str, list[str]] = {"model FLOPs utilisation, MFU": [r"meters/mfu$"]}
_OPTIMISATION: dict[str, list[str]] = {
    "norm of the gradient, before clipping": [r"train/gradient_norm$"],
    "learning rate": [r"meters/learning_rate$"],
}

_FIRST = ("backbone.dim", "data.batch_size", "optimizer.lr", "seed", "trainer.precision")
"""Columns of the table of runs that are shown at first."""


class Dashboard(Callback):
    """At the start of a run, write a page of custom scalars for the task and a row under HPARAMS to TensorBoard.

    The row has the hyper-parameters, and the last value of each of the run's main metrics.
    """

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both; by now the callbacks know what they will log."""
        loggers = tensorboards(trainer)
        if not (loggers and isinstance(pl_module, BaseTask)):
            return
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import custom_scalars, hparams

        charts = {
            category: {title: ["Multiline", tags] for title, tags in parts.items()}
            for category, parts in layout(trainer, pl_module).items()
        }
        opening, row, self._closing = hparams(
            hyper_parameters(trainer, pl_module), dict.fromkeys(main_metrics(trainer, pl_module))
        )
        stored = opening.value[0].metadata.plugin_data
        columns = HParamsPluginData.FromString(stored.content)
        for info in columns.experiment.hparam_infos:
            info.differs = info.name in _FIRST  # TensorBoard sorts these to the front
        stored.content = columns.SerializeToString()
        for logger in loggers:
            writer = logger.experiment._get_file_writer()
            for summary in (custom_scalars(charts), opening, row):
                writer.add_summary(summary)
            writer.flush()

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the row as that of a finished run."""
        for logger in tensorboards(trainer) if isinstance(pl_module, BaseTask) else ():
            logger.experiment._get_file_writer().add_summary(self._closing)


def layout(trainer: Trainer, task: BaseTask) -> Charts:
    """The charts of a task's page; without those for which no callback of the run logs anything."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    pages = {"Losses": {"loss": ["train/loss$", "val/loss$"], **task.loss_charts}, **task.charts}
    if task.generates:
        evaluations = [callback for callback in callbacks if isinstance(callback, GenerationEval)]
        if any(evaluation.settings.judges for evaluation in evaluations):
            pages["Quality of generated sound"] = _QUALITY
        if evaluations:
            pages["Synchrony of generated sound"] = _SYNCHRONY
        if any(isinstance(callback, MediaLog) for callback in callbacks):
            pages["Health of generated sound"] = _HEALTH
    has_ceiling = any(isinstance(callback, Meters) and callback.ceiling is not None for callback in callbacks)
    throughput = _THROUGHPUT | (_UTILISATION if has_ceiling else {})
    return pages | {"Throughput and memory": throughput, "Optimisation": _OPTIMISATION}


def main_metrics(trainer: Trainer, task: BaseTask) -> list[str]:
    """Tags of the metrics by which runs are compared."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    generated = [name for callback in callbacks if isinstance(callback, GenerationEval) for name in callback.names]
    return ["val/loss", *task.main_metrics, *dict.fromkeys(generated), "meters/positions_per_second"]


def hyper_parameters(trainer: Trainer, task: BaseTask) -> dict[str, bool | int | float | str]:
    """Hyper-parameters of the task, without the numbers that the data set, and those of trainer and data."""
    own = {name: value for name, value in task.hparams.items() if not name.startswith("_")}
    flat = _flatten(own)
    kept = {name: value for name, value in flat.items() if not name.startswith("backbone.spec.")}
    trained = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    kept |= {
        "task": type(task).__name__,
        "parameters": trained,
        "codec": task.spec.codec,
        "codebooks": task.spec.num_codebooks,
        "trainer.max_steps": trainer.max_steps,
        "trainer.precision": str(trainer.precision),
        "trainer.world_size": trainer.world_size,
        "trainer.gradient_clip_val": trainer.gradient_clip_val or 0.0,
    }
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, ShardDataModule):
        kept["data.batch_size"] = data.global_batch_size
        kept["data.records"] = len(data.train_dataset)
        kept["data.seed"] = data.seed
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            kept["ema.decay"] = callback.decay
    return kept


def _flatten(value: Any, prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested JSON as one level: ``backbone.init_args.dim`` is ``backbone.dim``, a class name has its place's name."""
    if isinstance(value, Mapping):
        flat: dict[str, bool | int | float | str] = {}
        for name, inner in value.items():
            if name == "class_path":
                flat[prefix.rstrip(".")] = str(inner).rpartition(".")[2]
            else:
                flat |= _flatten(inner, prefix if name == "init_args" else f"{prefix}{name}.")
        return flat
    plain = value if isinstance(value, (bool, int, float, str)) else "none" if value is None else str(value)
    return {prefix.rstrip("."): plain}
