"""Figures of generated sound during training: what judges hear in it, and whether it is in time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from vab.callbacks.heard import Rows
from vab.callbacks.pictures import Found, confusion_figure, nearest, retrieval_figure
from vab.callbacks.subset import KEPT, Settings, SharedSubset, Sounds
from vab.callbacks.tensorboard import tensorboards
from vab.data.reading.datamodule import ShardDataModule
from vab.spec import Batch, UserError
from vab.tasks import PretrainTask

GENERATED = re.compile(r"val/(fad_|kld_|agreement|onset_|recall_at_\d+_g2r)")
"""So begin the names of the figures that `GenerationEval` logs."""
_SHOWN = 5
"""Sounds in a picture of what was found."""

Result = TypeVar("Result")


class GenerationEval(Callback):
    """At validations, sound for a fixed subset of the validation set, and figures of it.

    The same records with the same seeds at any time, evenly spread over the set, with the averaged weights where the
    run keeps an average. Real is the codec's round trip of a record's own codes, the best that the model could do, and
    the names say so: ``val/fad_<judge>_to_codec`` and ``val/kld_<judge>_to_codec`` (nats) of each judge;
    ``val/agreement`` with the labels, by the first judge that knows them all; ``val/recall_at_1_g2r`` and so on, how
    often a generated sound is nearest to the round trip of its own record, by the same judge; and, with any judge or
    none, ``val/onset_recall_to_codec``, ``val/onset_precision_to_codec`` and ``val/onset_offset_to_codec`` (s). What
    has no value, such as an offset where nothing has an onset, is not logged. TensorBoard also gets a confusion matrix
    and examples of what is found.

    Ranks share the records, each once. A checkpoint can be chosen by any of the figures: ``Checkpoints(monitor=...)``.
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
            judges: Names that ``load_judge`` takes. One that cannot be loaded is refused before training. An empty list
                leaves synchrony, which needs no judge.
            num_records: How many records of the validation set, at least 2; all if it has no more.
            every_n_steps: Steps from one evaluation to the next at least; it takes place at a validation. At the last
                validation of a run there always is one.
            seed: Of the decoding.
            device: Where codec and judges run; auto is where the model is.
            batch_size: Records at once on each rank; as in validation where not given.
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
        self.figures: dict[str, float] = {}
        """The last figures, in float64, by the names that they are logged under."""
        self._last_step = 0
        self._fresh = False  # whether the figures are of the validation that is running, or has just been
        self._subset: SharedSubset | None = None

    @property
    def state_key(self) -> str:
        """Apart from that of other evaluations in the run."""
        return self._generate_state_key(judges=self.settings.judges, seed=self.settings.seed)

    def state_dict(self) -> dict[str, Any]:
        """When the last evaluation was; nothing of codec and judges."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the rhythm."""
        self._last_step = state_dict["last_step"]

    @property
    def names(self) -> list[str]:
        """What is logged, once training has begun."""
        return [] if self._subset is None else [f"val/{name}" for name in self._subset.names]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get codec and judges, and listen to the round trips: what is missing is missed now.

        Raises:
            UserError: If the codec or a judge cannot be had, or there are fewer than two records.
        """
        self._subset = None
        self._prepare(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """From here on the figures are of weights that are gone: no checkpoint is to be chosen by them."""
        if self._fresh:
            for name in self.figures:
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
        """Generate and listen while the averaged weights are in place, which is until the end of validation's epoch."""
        if batch_idx > 0 or not self._due(trainer):
            return
        subset = self._prepare(trainer, pl_module)
        if subset is None:
            return
        with isolate_rng():
            made = together(trainer, lambda: subset.make(trainer.precision_plugin.val_step_context()))
            figures, rows = subset.compute(together(trainer, lambda: subset.add(made)))
            self.figures, self._fresh = {f"val/{name}": value for name, value in figures.items()}, True
            if rows is not None:
                together(trainer, lambda: draw(trainer, subset, made, rows))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log; all ranks have the same figures."""
        if self._fresh and not trainer.sanity_checking:
            pl_module.log_dict(self.figures, batch_size=1)
            if trainer.state.fn == TrainerFn.FITTING:
                self._last_step = trainer.global_step

    def _due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return not trainer.sanity_checking
        return trainer.global_step - self._last_step >= self.every_n_steps or is_last_validation(trainer)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> SharedSubset | None:
        """The subset, made once in a run; None where there is nothing to generate, with other tasks and data."""
        data = getattr(trainer, "datamodule", None)
        if self._subset is None and isinstance(pl_module, PretrainTask) and isinstance(data, ShardDataModule):
            ranks = trainer.world_size, trainer.global_rank
            with isolate_rng():  # networks draw random numbers as they are made
                self._subset = together(trainer, lambda: SharedSubset(pl_module, data, self.settings, *ranks))
        return self._subset


def is_last_validation(trainer: Trainer) -> bool:
    """Whether no other validation fits into the steps that are left."""
    if trainer.max_steps < 1:
        return False
    left = trainer.max_steps - trainer.global_step
    if trainer.check_val_every_n_epoch is not None or trainer.val_check_batch is None:
        return left <= 0
    return left * trainer.accumulate_grad_batches < trainer.val_check_batch


def together(trainer: Trainer, work: Callable[[], Result]) -> Result:
    """Do a rank's part of what all ranks do; if it fails on one, all stop, and none waits for it in vain.

    Args:
        trainer: Of the run.
        work: It must not communicate.

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


def draw(trainer: Trainer, subset: SharedSubset, made: list[Sounds], rows: Rows) -> None:
    """On the first rank, into TensorBoard: what was taken for what, and what some generated sounds are most like."""
    loggers, lead = tensorboards(trainer), subset.lead
    if not (trainer.is_global_zero and loggers and lead is not None):
        return
    step, judge = trainer.global_step, lead.judge
    if bool(rows.truth.any()):
        title = f"{len(rows.index)} generated sounds, judge {judge.name}, step {step}"
        picture = confusion_figure(rows.confusion(), judge.classes, title)
        for logger in loggers:
            logger.experiment.add_image("generation/confusion_matrix", picture, step, dataformats="HWC")
    ranks = rows.ranks()
    if ranks is None:
        return
    place = {number: row for row, number in enumerate(rows.index.tolist())}
    given = [pair for sounds in made for pair in zip(sounds.index.tolist(), sounds.first, strict=False)]
    for query, (number, sound) in enumerate(given[:KEPT]):
        row = place[number]
        numbers = rows.index[nearest(rows.generated[row : row + 1], rows.real, min(_SHOWN, len(rows.index)))[0]]
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
        picture = retrieval_figure(asked, found, subset.codec.sample_rate, title)
        for logger in loggers:
            logger.experiment.add_image(f"generation/retrieval_{query}", picture, step, dataformats="HWC")


def _title(subset: SharedSubset, number: int) -> str:
    """A record's id and labels, in two lines."""
    return f"{subset.dataset.record(number)['id']}\n{', '.join(subset.dataset.label_names(number)) or 'no label'}"
