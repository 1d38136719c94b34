"""The datamodule: which records each rank reads at each step, and where a resumed run continues."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from vab.data.reading.augment import Augmentation
from vab.data.reading.dataset import ShardDataset
from vab.data.reading.labels import read_vocabulary
from vab.data.reading.loader import EvaluationLoader, Loader
from vab.data.reading.mixed import MixedDataset, Records
from vab.data.reading.opening import divide, open_training, refuse_tiny, require_alike, require_same_on_all_ranks
from vab.data.reading.order import Share, earlier_draws, mixed_order, steps_per_epoch, train_batches, weighted_draws
from vab.data.reading.resume import LoopCounters, Position
from vab.data.reading.step_size import accumulate, batches_of_step
from vab.data.remote import Cache
from vab.lightning_internals import processed_batches
from vab.spec import Batch, UserError

_LIMITS = ("limit_train_batches", "limit_val_batches", "overfit_batches")


class _TrainLoader(Loader):
    """The rest of the current epoch.

    Its length is that of a whole epoch even if less is left, because the trainer counts the finished steps as well.
    """

    def __init__(self, data: ShardDataModule, trainer: Trainer, pin_memory: bool) -> None:
        super().__init__(data.train_dataset, data.num_workers, pin_memory)
        self._data = data
        self._trainer = trainer

    def __len__(self) -> int:
        return self._data.steps_left(0)

    def __iter__(self) -> Iterator[Batch]:
        position = self._data.position
        position.start += position.handed * self._data.records_of_batches
        position.handed = 0
        return self._rest_of_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the datamodule holds the state. Without this the trainer warns that the loader cannot resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do: the datamodule holds the state."""

    def shares(self) -> Iterator[Share]:
        data, position = self._data, self._data.position
        epoch = 0 if self._trainer.overfit_batches else position.epoch  # type: ignore[attr-defined]
        order = data.epoch_order(epoch)
        draws = earlier_draws(order) if data.repeats else None
        rest = train_batches(
            np.arange(len(order)), data.batch_size, self._trainer.world_size, self._trainer.global_rank, position.start
        )
        for places, valid, *_ in itertools.islice(rest, data.steps_left(position.start)):
            yield Share(
                order[places],
                valid,
                None if draws is None else draws[places],
                data.augmentation.changes(epoch, places, order) if data.augmentation.on else None,
            )

    def _rest_of_epoch(self) -> Iterator[Batch]:
        # Runs at the first batch: until then a checkpoint belongs to the end of the last epoch.
        position = self._data.position
        if not self._data.steps_left(position.start):
            position.epoch, position.start = position.epoch + 1, 0
        position.processed = processed_batches(self._trainer)
        for batch in self.batches():
            position.handed += 1
            yield batch


class ShardDataModule(LightningDataModule):
    """Reads data sets that ``vab extract`` wrote.

    Each epoch of training reads all records in a new order, which depends on the seed and not on the number of workers
    or ranks. A checkpoint holds the position in that order; a resumed run continues with the next record.
    Validation and testing score each record exactly once, on any number of ranks.

    Args:
        train: Folder of the training data set, or its address elsewhere: ``s3://bucket/train``,
            ``https://host/train``, ``gs://``, ``hf://datasets/owner/name/train``, ...; or several of these with
            weights, such as {A: 3, B: 1}. Each data set then gives exactly its share of the records of every epoch.
        val: Folder or address of the validation data set.
        test: Folder or address of the test data set; opened when needed.
        batch_size: Records in a batch on each device; with ``global_batch_size`` their maximum.
        global_batch_size: Records in an optimizer step, on all devices together. Each device reads its equal part in
            the fewest equal batches of at most ``batch_size`` records; this sets the trainer's
            ``accumulate_grad_batches``. A task that compares the records of a batch (``AlignTask``) gets the part as
            one batch, and embeds ``batch_size`` records at a time. Default: ``batch_size`` on each device, times the
            trainer's ``accumulate_grad_batches``.
        val_batch_size: Records in a batch on each device in validation and testing; default: ``batch_size``.
        num_workers: Processes that prefetch batches for each device; 0 reads in the training process.
        seed: Seed of the order of records.
        val_records: Validate on the first so many records only.
        check_crc: Compare everything read with its checksum.
        data_resume: What to do if a checkpoint was made with another training data set or seed: "error" stops;
            "restart" begins a new epoch on the new data.
        levels: Read only the first so many codebooks of each record, for a coarse model; default: all.
        order: "shuffled": each record once per epoch. "class_balanced": draws with replacement, as many as there are
            records; the weight of a record is the sum of 1 / (records with the label) over its labels, as in AST and
            CAV-MAE.
        vocabulary: File that lists the class names in order, such as class_labels_indices.csv of AudioSet or VGGSound;
            default: the labels in the shards.
        fold: For cross-validation on one data set, given as ``train`` and as ``val``: validate on this fold, train on
            the others.
        fold_pattern: Regular expression, searched in a record's id, whose group is the number of the fold; the default
            fits the file names of ESC-50, which begin with it.
        cache: Folder for copies of remote data sets; default: the environment variable VAB_CACHE, else ~/.cache/vab.
        cache_gb: Size limit of all copies together, in 10^9 bytes; the least recently used are deleted to make room.
            Default: nothing is deleted.
        cache_local: Copy local folders into the cache as well: from a shared disk to a disk of this machine, or with
            ``cache=/dev/shm/vab`` into memory.
        records_per_epoch: Records in an epoch; default: as many as the training data have. The next epoch continues
            each data set where this one stopped.
        splice: Probability that a training record changes to another one at a whole second, sound and picture together;
            0.5 in the authors' follow-up (VATT).
        roll: Probability that a training record is shifted by whole seconds, its end wrapping around to its start; 0.1
            in the authors' follow-up.
        allow_tiny: Train on shards of the codec or vision encoder "tiny", toy networks for the synthetic world. Recipes
            for real data set it to false.

    Raises:
        UserError: If a folder holds no data set, a data set cannot be downloaded, the data sets differ in a number or
            in their labels, their records have fewer than ``levels`` codebooks, a label is not in the vocabulary, a
            fold is empty, segments have no second at which they can be spliced, or shards of a toy network are not
            allowed.
    """

    def __init__(
        self,
        train: str | dict[str, float],
        val: str,
        test: str | None = None,
        batch_size: int = 32,
        global_batch_size: int | None = None,
        val_batch_size: int | None = None,
        num_workers: int = 2,
        seed: int = 0,
        val_records: int | None = None,
        check_crc: bool = False,
        data_resume: Literal["error", "restart"] = "error",
        levels: int | None = None,
        order: Literal["shuffled", "class_balanced"] = "shuffled",
        vocabulary: str | None = None,
        fold: int | None = None,
        fold_pattern: str = r"(?:^|/)(\d+)-[^/]*$",
        cache: str | None = None,
        cache_gb: float | None = None,
        cache_local: bool = False,
        records_per_epoch: int | None = None,
        splice: float = 0.0,
        roll: float = 0.0,
        allow_tiny: bool = True,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("global_batch_size", global_batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
            ("val_records", val_records, 1),
            ("levels", levels, 1),
            ("records_per_epoch", records_per_epoch, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"data.{name} must be {least} or more, got {value}")
        for name, choice, choices in (
            ("data_resume", data_resume, ("error", "restart")),
            ("order", order, ("shuffled", "class_balanced")),
        ):
            if choice not in choices:
                raise UserError(f'data.{name} must be "{choices[0]}" or "{choices[1]}", got {choice!r}')
        self.batch_size = self.max_batch_size = batch_size
        self._global_batch_size = global_batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.data_resume = data_resume
        self._open = partial(
            ShardDataset, check_crc=check_crc, levels=levels, cache=Cache(cache, cache_gb, cache_local)
        )
        self.train_dataset, self.train_parts, self.records_per_part = open_training(
            train, records_per_epoch, self._open
        )
        """The training data, the data sets that they consist of, and the records of each in an epoch."""
        if not allow_tiny:
            refuse_tiny(self.train_dataset)
        mixed = isinstance(self.train_dataset, MixedDataset)
        if mixed and (fold is not None or order != "shuffled"):
            setting = "data.fold" if fold is not None else "data.order class_balanced"
            raise UserError(f"{setting} is for one training data set; data.train has {len(self.train_parts)}")
        self._vocabulary = None if vocabulary is None else read_vocabulary(vocabulary)
        if self._vocabulary is not None:
            self.train_dataset.use_vocabulary(self._vocabulary)
        self._test = test
        self.val_dataset = self._open_evaluated(val)
        if fold is not None:
            divide(self.train_parts[0], self.val_dataset, fold, fold_pattern)
            self.records_per_part = (records_per_epoch or len(self.train_dataset),)
        self.order = order
        self._weights = self.train_parts[0].class_weights() if order == "class_balanced" else None
        self.spec = self.train_dataset.spec
        """The numbers of all the data sets."""
        self.labels = self.train_dataset.labels
        """Their vocabulary of labels."""
        self.num_val_records = min(val_records or len(self.val_dataset), len(self.val_dataset))
        self.splice = splice
        self.augmentation = Augmentation(self.spec, seed, splice, roll)
        self.position = Position()
        self._position_of: Trainer | None = None

    @cached_property
    def test_dataset(self) -> ShardDataset | None:
        """The test data, opened on first access because training does not need them. None if not given.

        Raises:
            UserError: As for the other data sets.
        """
        return None if self._test is None else self._open_evaluated(self._test)

    def _open_evaluated(self, folder: str) -> ShardDataset:
        """Open data to validate or test on, with labels numbered as in the training data."""
        dataset, train = self._open(folder), self.train_dataset
        if self._vocabulary is not None:
            dataset.use_vocabulary(self._vocabulary)
        elif isinstance(train, MixedDataset):
            try:
                dataset.use_vocabulary(train.vocabulary)
            except UserError as error:
                raise UserError(f"{error}: give the list of all classes with --data.vocabulary FILE") from error
        require_alike(train, dataset)
        return dataset

    @property
    def codebooks(self) -> torch.Tensor:
        """(K, S, code_dim) float32: codebooks of the codec that made the training data."""
        return self.train_dataset.codebooks

    @property
    def global_batch_size(self) -> int:
        """Records in an optimizer step, on all ranks together."""
        return self.records_of_batches * self._trainer().accumulate_grad_batches

    @property
    def records_of_batches(self) -> int:
        """Records in one training batch of each rank, on all ranks together."""
        return self.batch_size * self._trainer().world_size

    @property
    def records_per_epoch(self) -> int:
        """Records in an epoch of training."""
        return sum(self.records_per_part)

    @property
    def repeats(self) -> bool:
        """Whether a record may come more than once in an epoch."""
        return self._weights is not None or self.records_per_part != tuple(map(len, self.train_parts))

    def epoch_order(self, epoch: int) -> np.ndarray:
        """(records_per_epoch,) int64: record numbers in the order in which an epoch of training reads them."""
        if self._weights is not None:
            return weighted_draws(self.seed, epoch, self._weights, self.records_per_epoch)
        return mixed_order(self.seed, epoch, [len(part) for part in self.train_parts], self.records_per_part)

    def steps_left(self, consumed: int) -> int:
        """Batches left for each rank in an epoch, which the trainer's ``limit_train_batches`` may shorten.

        Args:
            consumed: Records of the epoch that all ranks together have read.
        """
        trainer = self._trainer()
        limit = self._limit_of_batches()
        # With another number of ranks, the records that a whole epoch leaves over may be enough for another step.
        records = self.records_per_epoch if limit is None else limit * self.records_of_batches
        left = steps_per_epoch(records, self.batch_size, trainer.world_size, consumed)
        return left - left % trainer.accumulate_grad_batches  # an epoch holds whole optimizer steps

    def _limit_of_batches(self) -> int | None:
        """Batches of each rank in an epoch that ``limit_train_batches`` shortens; None if it shortens nothing.

        A fraction is one of whole optimizer steps, so that it does not depend on the batches of a step.
        """
        trainer = self._trainer()
        whole = steps_per_epoch(self.records_per_epoch, self.batch_size, trainer.world_size)
        limit, accumulated = trainer.limit_train_batches, trainer.accumulate_grad_batches
        if isinstance(limit, float):
            limit = whole if limit == 1.0 else int(whole // accumulated * limit) * accumulated
        return None if limit >= whole else limit

    def forget_unfinished(self) -> None:
        """Repeat the batch whose step was stopped by an exception."""
        position = self.position
        if position.handed:
            position.handed = min(position.handed, processed_batches(self._trainer()) - position.processed)

    def setup(self, stage: str) -> None:
        """Check that all ranks have the same data and settings, so that none waits for the others forever."""
        trainer = self._trainer()
        require_same_on_all_ranks(trainer, self._what_all_ranks_share(trainer, stage))
        if stage != "fit":
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        counters = [callback for callback in callbacks if isinstance(callback, LoopCounters)]
        settings = counters[0].settings if counters else {}
        if self._position_of is not trainer:
            self.position, self._position_of = Position(), trainer
            for name, value in settings.items():
                setattr(trainer, name, value)
            records = self._global_batch_size
            settings = {} if records is None else self._divide_step(records, trainer)
        callbacks[:] = [*(callback for callback in callbacks if callback not in counters), LoopCounters(self, settings)]

    def _divide_step(self, records: int, trainer: Trainer) -> dict[str, Any]:
        """Set the batch of a rank, and how many batches the trainer accumulates, for so many records in a step.

        Returns:
            The trainer's settings before, by name.
        """
        one_batch = not getattr(trainer.lightning_module, "accumulates", True)
        batches = batches_of_step(records, trainer.world_size, records if one_batch else self.max_batch_size)
        self.batch_size = records // trainer.world_size // batches
        return accumulate(trainer, batches)

    def _what_all_ranks_share(self, trainer: Trainer, stage: str) -> dict[str, Any]:
        """Everything that decides the number and the content of steps, by the names of the flags."""
        folders: dict[str, Records] = {"train": self.train_dataset, "val": self.val_dataset}
        if stage in ("test", "predict") and self.test_dataset is not None:
            folders["test"] = self.test_dataset
        data = {
            f"data.{name}": (dataset.manifest_hash[:12], f"{len(dataset)} records") for name, dataset in folders.items()
        }
        names = ("batch_size", "val_batch_size", "seed", "order", "labels")
        limits = ("accumulate_grad_batches", "max_steps", "max_epochs", "val_check_interval")
        return {
            **data,
            **{f"data.{name}": getattr(self, name) for name in names},
            "data.val_records": self.num_val_records,
            "data.global_batch_size": self._global_batch_size,
            "data.records_per_epoch": self.records_per_part,
            "data.splice": self.augmentation.splice,
            "data.roll": self.augmentation.roll,
            "data.levels": self.spec.num_codebooks,
            # A trainer that validates at time intervals has no interval in steps.
            **{f"trainer.{name}": getattr(trainer, name, None) for name in (*limits, *_LIMITS)},
        }

    def train_dataloader(self) -> _TrainLoader:
        """The training records, from where training stands.

        Raises:
            UserError: If there are fewer records than one step takes.
        """
        trainer, num_records = self._trainer(), self.records_per_epoch
        accumulated = trainer.accumulate_grad_batches
        takes = f"{self.batch_size} x {trainer.world_size} ranks" + (f" x {accumulated}" if accumulated > 1 else "")
        per_step = self.global_batch_size
        steps = num_records // per_step
        if not steps:
            raise UserError(
                f"an epoch of {self.train_dataset.folder} has {num_records} records, fewer than one step takes"
                f" ({takes}): lower {self._flags_of_step}"
            )
        limit = trainer.limit_train_batches
        if limit and not self.steps_left(0):
            flag = "overfit_batches" if trainer.overfit_batches else "limit_train_batches"  # type: ignore[attr-defined]
            flag = "fast_dev_run" if trainer.fast_dev_run else flag  # type: ignore[attr-defined]
            raise UserError(
                f"--trainer.{flag} {limit} leaves no optimizer step of {accumulated} batches: raise it, or lower "
                f"{self._flags_of_step}"
            )
        if isinstance(limit, float) and (batches := self._limit_of_batches()) is not None:
            # The trainer would apply its fraction to the length of the loader, which is shortened already.
            trainer.limit_train_batches = batches
        if len(self.train_parts) > 1:
            given = zip(self.train_parts, self.records_per_part, strict=True)
            shares = (f"{count} of {len(part)} from {part.folder}" for part, count in given)
            rank_zero_info(f"records of an epoch: {', '.join(shares)}")
        rank_zero_info(
            f"an epoch: {num_records} records / ({takes}) = {steps} steps;"
            f" {num_records - steps * per_step} records are left over, different ones in each epoch"
        )
        return _TrainLoader(self, trainer, self._pin_memory())

    @property
    def _flags_of_step(self) -> str:
        """The flags that set how many records a step takes."""
        if self._global_batch_size is not None:
            return "--data.global_batch_size"
        accumulates = self._trainer().accumulate_grad_batches > 1
        return "--data.batch_size" + (" or --trainer.accumulate_grad_batches" if accumulates else "")

    def val_dataloader(self) -> EvaluationLoader:
        """The validation records, each once."""
        return self._evaluation_loader(self.val_dataset, self.num_val_records)

    def test_dataloader(self) -> EvaluationLoader:
        """The test records, each once.

        Raises:
            UserError: If there is no test data set.
        """
        if self.test_dataset is None:
            raise UserError("no test data: give --data.test DIR")
        return self._evaluation_loader(self.test_dataset, len(self.test_dataset))

    def predict_dataloader(self) -> EvaluationLoader:
        """The test records, each once; the validation records if there is no test data set."""
        return self.val_dataloader() if self.test_dataset is None else self.test_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy to the device in the stored types; copies from page-locked memory overlap with computation."""
        if isinstance(batch, Batch):
            return batch.to(device, non_blocking=device.type == "cuda").widened()
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """The position in the order for the checkpoint: plain numbers and strings.

        It counts the records of finished optimizer steps only, not prefetched records or those whose gradients are
        still being accumulated.
        """
        position, done, pending = self.position, self.position.handed, 0
        if done:
            processed = processed_batches(self._trainer())
            pending = processed % self._trainer().accumulate_grad_batches
            done = min(done, processed - position.processed) - pending
        consumed = position.start + done * self.records_of_batches
        return {
            **self._identity,
            "epoch": position.epoch,
            "records_consumed": consumed,
            "steps_left": self.steps_left(consumed),
            "pending_batches": pending,
            "accumulate_grad_batches": self._trainer().accumulate_grad_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of a checkpoint.

        Raises:
            UserError: If it was made with another data set or seed and ``data_resume`` is "error".
        """
        if self._trainer().state.fn != TrainerFn.FITTING:
            return
        if self.starts_anew(state_dict):
            differences = "; ".join(
                f"{name}: {theirs} != {mine}" for name, theirs, mine in self._differences(state_dict)
            )
            if self.data_resume == "error":
                raise UserError(
                    f"the checkpoint was trained on other data than {self.train_dataset.folder} (checkpoint != now:"
                    f" {differences}): give the same data, or --data.data_resume restart to begin a new epoch on this"
                )
            rank_zero_warn(f"a new epoch begins on {self.train_dataset.folder} (checkpoint != now: {differences})")
            self.position = Position(state_dict["epoch"] + 1)
        elif not state_dict["steps_left"]:
            # With fewer ranks the records left over may be enough for a step, but the trainer has ended the epoch.
            self.position = Position(state_dict["epoch"] + 1)
        else:
            self.position = Position(state_dict["epoch"], state_dict["records_consumed"])

    def starts_anew(self, state: dict[str, Any]) -> bool:
        """Whether a checkpoint belongs to other data or another seed, so that a new epoch must begin."""
        return bool(self._differences(state))

    @property
    def _identity(self) -> dict[str, Any]:
        """Everything that the order depends on."""
        return {
            "manifest_hash": self.train_dataset.manifest_hash,
            "seed": self.seed,
            "order": self.order,
            "records_per_epoch": list(self.records_per_part),
        }

    def _differences(self, state: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        """Name, value in the checkpoint and value here of each difference. Older checkpoints lack some names."""
        before = {"order": "shuffled", "records_per_epoch": [len(self.train_dataset)]}
        theirs = before | state
        return [(name, theirs.get(name), mine) for name, mine in self._identity.items() if theirs.get(name) != mine]

    def _evaluation_loader(self, dataset: ShardDataset, num_records: int) -> EvaluationLoader:
        trainer = self._trainer()
        plan = num_records, self.val_batch_size, trainer.world_size, trainer.global_rank
        return EvaluationLoader(dataset, self.num_workers, self._pin_memory(), *plan)

    def _pin_memory(self) -> bool:
        return self._trainer().strategy.root_device.type == "cuda"

    def _trainer(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError("a datamodule needs a trainer; without one, read from its data sets")
        return self.trainer
