"""Metrics of generated sound during training: judges' metrics, and synchrony."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from vab.callbacks.judge_metrics import JudgedRecords
from vab.callbacks.pictures import Found, confusion_figure, nearest, retrieval_figure
from vab.callbacks.subset import KEPT, Settings, SharedSubset, Sounds
from vab.callbacks.tensorboard import tensorboards
from vab.data.reading.datamodule import ShardDataModule
from vab.spec import Batch, UserError
from vab.tasks import PretrainTask

GENERATED = re.compile(r"val/(fad_|kld_|agreement|onset_|recall_at_\d+_g2r)")
"""Names of the metrics that `GenerationEval` logs match this."""
_SHOWN = 5
"""Retrieved sounds in a picture."""

Result = TypeVar("Result")


class GenerationEval(Callback):
    """At validations, metrics of sound that is generated for a fixed subset of the validation set.

    The subset is evenly spread over the set and always the same, with the same seeds; the averaged weights are used if
    the run keeps an average. The reference is the codec round trip of a record's own codes, the best that the model
    could reach, and the names say so. Logged are:

    - ``val/fad_<judge>_to_codec`` and ``val/kld_<judge>_to_codec`` (nats), for each judge;
    - ``val/agreement`` with the labels, by the first judge that knows them all;
    - ``val/recall_at_1_g2r`` and so on: how often a generated sound is nearest to the round trip of its own record, by
      the same judge;
    - ``val/onset_recall_to_codec``, ``val/onset_precision_to_codec`` and ``val/onset_offset_to_codec`` (s), which need
      no judge.

    A metric without a value, such as an offset if nothing has an onset, is not logged. TensorBoard also gets a
    confusion matrix and examples of retrieval. Ranks share the records, each once. A checkpoint can be chosen by any of
    the metrics: ``Checkpoints(monitor=...)``.
    """

    def __init__(
        self,
        judges: Sequence[str] = ("tiny",),
        num_records: int = 64,
        every_n_steps: int = 1,
        seed: int = 0,
        device: str = "auto",
        batch_size: int | None = None,
        tolerance_seconds: float = 0.1,
    ) -> None:
        """Configure the evaluation.

        Args:
            judges: Names that ``load_judge`` takes. A judge that cannot be loaded is refused before training. With an
                empty list only synchrony is measured.
            num_records: How many records of the validation set, at least 2; all if it has fewer.
            every_n_steps: Smallest number of steps between two evaluations, which take place at validations. The last
                validation of a run always has one.
            seed: Of the decoding.
            device: Where codec and judges run; auto is where the model is.
            batch_size: Records at once on each rank; by default as in validation.
            tolerance_seconds: Onsets this near are of one event.

        Raises:
            UserError: If a number is out of range, or a judge is named twice.
        """
        sizes = (every_n_steps, 1 if batch_size is None else batch_size)
        if num_records < 2 or min(sizes) < 1 or not tolerance_seconds > 0:
            raise UserError(
                f"GenerationEval: num_records is 2 or more, every_n_steps and batch_size 1 or more, tolerance_seconds "
                f"above 0; got {num_records}, {every_n_steps}, {batch_size}, {tolerance_seconds}"
            )
        if len(set(judges)) < len(judges):
            raise UserError(f"GenerationEval: a judge is named twice in {list(judges)}")
        self.settings = Settings(tuple(judges), num_records, seed, device, batch_size, tolerance_seconds)
        self.every_n_steps = every_n_steps
        self.last_metrics: dict[str, float] = {}
        """The last metrics, in float64, by the names that they are logged under."""
        self._last_step = 0
        self._fresh = False  # whether they are of the validation that is running, or has just ended
        self._subset: SharedSubset | None = None

    @property
    def state_key(self) -> str:
        """Different for each evaluation in the run."""
        return self._generate_state_key(judges=self.settings.judges, seed=self.settings.seed)

    def state_dict(self) -> dict[str, Any]:
        """The step of the last evaluation."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the last evaluation."""
        self._last_step = state_dict["last_step"]

    @property
    def names(self) -> list[str]:
        """Names of the logged metrics; empty before training begins."""
        return [] if self._subset is None else [f"val/{name}" for name in self._subset.names]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load codec and judges, and run them on the round trips, so that a missing one is an error before training.

        Raises:
            UserError: If the codec or a judge cannot be loaded, or there are fewer than two records.
        """
        self._subset = None
        self._prepare(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Remove the metrics: the weights change now, and no checkpoint must be chosen by them."""
        if self._fresh:
            for name in self.last_metrics:
                trainer.callback_metrics.pop(name, None)
            self._fresh = False

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Generate and measure at the first batch, while the averaged weights are in place."""
        if batch_idx > 0 or not self._due(trainer):
            return
        subset = self._prepare(trainer, pl_module)
        if subset is None:
            return
        with isolate_rng():
            made = on_each_rank(trainer, lambda: subset.generate(trainer.precision_plugin.val_step_context()))
            metrics, records = subset.compute(on_each_rank(trainer, lambda: subset.add(made)))
            self.last_metrics, self._fresh = {f"val/{name}": value for name, value in metrics.items()}, True
            if records is not None:
                on_each_rank(trainer, lambda: log_pictures(trainer, subset, made, records))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log; all ranks have the same metrics."""
        if self._fresh and not trainer.sanity_checking:
            pl_module.log_dict(self.last_metrics, batch_size=1)
            if trainer.state.fn == TrainerFn.FITTING:
                self._last_step = trainer.global_step

    def _due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return not trainer.sanity_checking
        return trainer.global_step - self._last_step >= self.every_n_steps or is_last_validation(trainer)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> SharedSubset | None:
        """The subset, made once in a run; None for tasks and data that generate nothing."""
        data = getattr(trainer, "datamodule", None)
        if self._subset is None and isinstance(pl_module, PretrainTask) and isinstance(data, ShardDataModule):
            ranks = trainer.world_size, trainer.global_rank
            with isolate_rng():  # networks draw random numbers as they are made
                self._subset = on_each_rank(trainer, lambda: SharedSubset(pl_module, data, self.settings, *ranks))
        return self._subset


def is_last_validation(trainer: Trainer) -> bool:
    """Whether no other validation fits into the remaining steps."""
    if trainer.max_steps < 1:
        return False
    left = trainer.max_steps - trainer.global_step
    if trainer.check_val_every_n_epoch is not None or trainer.val_check_batch is None:
        return left <= 0
    return left * trainer.accumulate_grad_batches < trainer.val_check_batch


def on_each_rank(trainer: Trainer, work: Callable[[], Result]) -> Result:
    """Do this rank's part of what all ranks do. If one rank fails, all stop instead of waiting for it.

    Args:
        trainer: Of the run.
        work: It must not communicate with other ranks.

    Raises:
        Exception: What ``work`` raised here.
        RuntimeError: If it failed on another rank only.
    """
    error = None
    try:
        result = work()
    except Exception as problem:
        error = problem
    if trainer.strategy.reduce_boolean_decision(error is not None, all=False):
        raise error or RuntimeError("GenerationEval failed on another rank, which says why")
    return result


def log_pictures(trainer: Trainer, subset: SharedSubset, made: list[Sounds], records: JudgedRecords) -> None:
    """On the first rank, into TensorBoard: a confusion matrix, and the round trips nearest to some generated sounds."""
    loggers, lead = tensorboards(trainer), subset.lead
    if not (trainer.is_global_zero and loggers and lead is not None):
        return
    step, judge, index = trainer.global_step, lead.judge, records.index

    def log(name: str, picture: np.ndarray) -> None:
        for logger in loggers:
            logger.experiment.add_image(f"generation/{name}", picture, step, dataformats="HWC")

    if bool(records.truth.any()):
        title = f"{len(index)} generated sounds, judge {judge.name}, step {step}"
        log("confusion_matrix", confusion_figure(records.confusion(), judge.classes, title))
    ranks = records.ranks()
    if ranks is None:
        return
    given = [pair for sounds in made for pair in zip(sounds.index.tolist(), sounds.first, strict=False)]
    for query, (number, sound) in enumerate(given[:KEPT]):
        row = int((index == number).nonzero())
        numbers = index[nearest(records.generated[row : row + 1], records.real, min(_SHOWN, len(index)))[0]]
        batch = subset.dataset.read(numbers.numpy())
        found = [
            Found(_title(subset, other), waveform, right=other == number)
            for other, waveform in zip(numbers.tolist(), subset.decode(batch.codes, batch), strict=True)
        ]
        title = (
            f"round trips nearest to a generated sound: its own is number {int(ranks[row]) + 1} of {len(ranks)}\n"
            f"judge {judge.name}, step {step}"
        )
        asked = Found(f"GENERATED for {_title(subset, number)}", sound)
        log(f"retrieval_{query}", retrieval_figure(asked, found, subset.codec.sample_rate, title))


def _title(subset: SharedSubset, number: int) -> str:
    """A record's id and labels, in two lines."""
    return f"{subset.dataset.record(number)['id']}\n{', '.join(subset.dataset.label_names(number)) or 'no label'}"
