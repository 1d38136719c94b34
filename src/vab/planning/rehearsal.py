"""A rehearsal of a training run on fake CUDA: the trainer's own loop, with tensors that have no values."""

from __future__ import annotations

import contextlib
import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vab.lightning_internals import set_device
from vab.planning.fake_cuda import fake_cuda
from vab.planning.memory import LiveMemory
from vab.spec import Batch, SegmentSpec
from vab.tasks import PretrainTask
from vab.tasks.base import BaseTask

PrecisionName = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"]
_STEPS = ("first", "whole", "ragged, logged")
"""Steps of a rehearsal. In a ragged batch a record may be short; only the last of these steps is logged."""


@dataclass
class Rehearsal:
    """What a rehearsal measured."""

    at_rest: int = 0
    """Bytes alive between steps: weights, gradients (until the next backward pass), optimizer's state, average."""
    peaks: dict[str, int] = field(default_factory=dict)
    """Peak bytes by situation: "whole", "ragged, logged", "validation" and "generation"."""
    operations: dict[str, str] = field(default_factory=dict)
    """The operation at which each situation's peak was reached."""
    reads: dict[str, list[str]] = field(default_factory=dict)
    """What each situation read from the device, for which the host waits: operation, dtype and shape."""


def rehearse(
    make: Callable[[], BaseTask],
    batch_size: int,
    precision: PrecisionName = "bf16-mixed",
    *,
    val_batch_size: int = 0,
    generated: int = 0,
    callbacks: Callable[[], Sequence[Callback]] = tuple,
    clip: float = 1.0,
) -> Rehearsal:
    """Train for a few steps on fake CUDA, validate and generate, and measure the live bytes of each.

    Args:
        make: Makes the task. It is called with ``cuda`` as the default device.
        batch_size: Records in a training batch.
        precision: The trainer's.
        val_batch_size: Records in a validation batch; 0 for no validation.
        generated: Records generated at once during validation; 0 for none.
        callbacks: Makes the trainer's, such as `EMA`.
        clip: The trainer's ``gradient_clip_val``.
    """
    result = Rehearsal()
    with _quiet(), fake_cuda(), LiveMemory() as memory, _HostReads() as reads:
        with torch.device("cuda"):
            task = make()
        task.backbone.has_codebooks = True
        watch = _Watch(result, memory, reads, generated)
        strategy = _OneFakeCard(torch.device("cuda", 0), _FakeCard(), precision_plugin=_plugin(precision))
        trainer = Trainer(
            strategy=strategy,
            max_steps=len(_STEPS),
            log_every_n_steps=len(_STEPS),
            gradient_clip_val=clip,
            limit_val_batches=1 if val_batch_size else 0,
            check_val_every_n_epoch=1,
            num_sanity_val_steps=0,
            callbacks=[watch, *callbacks()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        spec, labels = task.spec, len(getattr(task, "labels", ()))
        training = _Batches([fake_batch(spec, batch_size, labels, name.startswith("ragged")) for name in _STEPS])
        validation = _Batches([fake_batch(spec, val_batch_size, labels, True)]) if val_batch_size else None
        on_ctrl_c = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(task, training, validation)
        except _Rehearsed:
            pass
        except SystemExit as error:  # the trainer's answer to Ctrl-C, which it ignores from then on
            signal.signal(signal.SIGINT, on_ctrl_c)
            raise KeyboardInterrupt from error
    return result


def fake_batch(spec: SegmentSpec, size: int, num_labels: int = 0, ragged: bool = False) -> Batch:
    """Records on the CPU; their values are only real outside of `fake_cuda`."""
    return Batch(
        codes=torch.randint(0, spec.codebook_size, (size, spec.num_codebooks, spec.num_steps)),
        features=torch.randn(size, spec.num_frames, spec.feature_dim),
        steps=torch.full((size,), spec.num_steps),
        frames=torch.full((size,), spec.num_frames),
        labels=torch.zeros(size, num_labels),
        index=torch.arange(size),
        valid=torch.ones(size, dtype=torch.bool),
        source=torch.arange(size),
        draw=torch.zeros(size, dtype=torch.int64),
        ragged=ragged,
    )


class _Rehearsed(Exception):  # noqa: N818 not an error
    """Everything is measured."""


class _Batches:
    """A loader of given batches."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


class _Watch(Callback):
    """Notes the peak and the reads of each situation. It is the first of the callbacks."""

    def __init__(self, result: Rehearsal, memory: LiveMemory, reads: _HostReads, generated: int) -> None:
        self._result, self._memory, self._reads, self._generated = result, memory, reads, generated

    def _begin(self) -> None:
        self._memory.reset_peak()
        self._reads.seen = []

    def _end(self, name: str) -> None:
        self._result.peaks[name], self._result.reads[name] = self._memory.peak, [*self._reads.seen]
        self._result.operations[name] = self._memory.peak_operation

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx:  # what the loop does after a batch, such as logging, belongs to it
            self._end(_STEPS[batch_idx - 1])
        self._result.at_rest = self._memory.live
        self._begin()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *unused: Any) -> None:
        if trainer.global_step == len(_STEPS):
            self._end(_STEPS[-1])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(_STEPS[-1])
        self._begin()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end("validation")
        if self._generated:  # here, because the moving average is still in the network
            self._begin()
            assert isinstance(pl_module, PretrainTask)
            pl_module.generate_for(fake_batch(pl_module.spec, self._generated, ragged=True), 0)
            self._end("generation")
        raise _Rehearsed  # metrics at the end of a validation depend on values


class _HostReads(TorchDispatchMode):
    """Answers whatever needs values of the fake device, and notes it: the host of a real one would wait.

    A single value is 1. A mask that selects rows selects all of them, which takes the most memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if func is aten._local_scalar_dense.default:
            self._note(func, source)
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self._note(func, source)
            args = (args[0], [x if x is None or x.dtype != torch.bool else _all_of(x) for x in args[1]])
        elif func is aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            self._note(func, source)
        return func(*args, **kwargs)

    def _note(self, func: Any, source: Tensor | None) -> None:
        if source is not None and source.device.type != "cpu":
            self.seen.append(f"{func} of {source.dtype} {tuple(source.shape)}")


def _all_of(mask: Tensor) -> Tensor:
    return torch.arange(len(mask), device=mask.device)


class _FakeCard(Accelerator):
    """A device that needs no setup."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """None."""
        return {}

    def teardown(self) -> None:
        """Nothing."""

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        """As given."""
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """One."""
        return [torch.device("cuda", 0)]

    @staticmethod
    def auto_device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Yes."""
        return True

    @staticmethod
    def name() -> str:
        """For messages."""
        return "fake cuda"


class _OneFakeCard(SingleDeviceStrategy):
    """One device, on which the task was made: fake weights cannot be moved in place."""

    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        set_device(self.lightning_module, self.root_device)

    def teardown(self) -> None:
        """Nothing: the weights stay where they are."""


class _Narrow(HalfPrecision):
    """With fake weights, which cannot be converted in place."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Replace the parameters."""
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                narrow = nn.Parameter(parameter.detach().to(torch.bfloat16), parameter.requires_grad)
                setattr(part, name, narrow)
        return module


def _plugin(precision: PrecisionName) -> Precision:
    if precision == "bf16-true":
        return _Narrow("bf16-true")
    if precision == "32-true":
        return Precision()
    plugin = MixedPrecision(precision, "cuda")
    plugin.scaler = None  # it costs no memory, and its step reads whether a gradient overflowed
    return plugin


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No message or warning of the trainer: they would be about a run that does not take place."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
