"""Marks in a run's folder, by which someone outside knows what the run is doing."""

from pathlib import Path

from lightning.pytorch import Callback

VALIDATING = "validating.mark"


class Marks(Callback):
    """A file is there as long as a validation goes on."""

    def on_validation_start(self, trainer, pl_module):
        Path(VALIDATING).touch()

    def on_validation_end(self, trainer, pl_module):
        Path(VALIDATING).unlink()
