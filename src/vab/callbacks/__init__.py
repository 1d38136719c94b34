"""What watches a run: averaged weights, checkpoints, meters, the progress line, what generated sound is like."""

from vab.callbacks.averaging import EMA
from vab.callbacks.checkpoints import AtomicCheckpoints, Checkpoints
from vab.callbacks.codes_writer import CodesWriter
from vab.callbacks.dashboard import Dashboard
from vab.callbacks.generation_eval import GenerationEval
from vab.callbacks.media import MediaLog
from vab.callbacks.meters import Meters
from vab.callbacks.pictures import spectrogram_picture
from vab.callbacks.progress import StepProgress

__all__ = [
    "EMA",
    "AtomicCheckpoints",
    "Checkpoints",
    "CodesWriter",
    "Dashboard",
    "GenerationEval",
    "MediaLog",
    "Meters",
    "StepProgress",
    "spectrogram_picture",
]
