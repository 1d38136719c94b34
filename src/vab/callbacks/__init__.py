"""Lightning callbacks: weight averaging, checkpoints, meters, progress, and the quality of generated sound."""

from vab.callbacks.averaging import EMA
from vab.callbacks.checkpoints import Checkpoints
from vab.callbacks.class_table import ClassTable
from vab.callbacks.dashboard import Dashboard
from vab.callbacks.finite import FiniteCheck, NonFiniteError
from vab.callbacks.generation_eval import GenerationEval
from vab.callbacks.media import MediaLog
from vab.callbacks.meters import Meters
from vab.callbacks.pictures import spectrogram_picture
from vab.callbacks.predictions import PredictionWriter
from vab.callbacks.progress import StepProgress
from vab.callbacks.stopping import StopOnSignal, StoppedError
from vab.callbacks.writing import AtomicCheckpoints, BackgroundCheckpoints

__all__ = [
    "EMA",
    "AtomicCheckpoints",
    "BackgroundCheckpoints",
    "Checkpoints",
    "ClassTable",
    "Dashboard",
    "FiniteCheck",
    "GenerationEval",
    "MediaLog",
    "Meters",
    "NonFiniteError",
    "PredictionWriter",
    "StepProgress",
    "StopOnSignal",
    "StoppedError",
    "spectrogram_picture",
]
