"""The files that ``vab predict`` writes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from vab.files import write_atomically
from vab.spec import UserError


class PredictionWriter(BasePredictionWriter):
    """Write the predictions of each rank to ``codes_rank_R.npz``, for other tasks to ``predictions_rank_R.npz``.

    A file has ``index`` (n,), the records' numbers, and ``codes`` (n, K, T) of a pretraining, or embeddings ``audio``
    and ``video`` (n, E) of an alignment, or ``probabilities`` (n, L) of a classification.
    """

    def __init__(self, folder: str | None = None) -> None:
        """Configure the folder.

        Args:
            folder: Folder of the files; by default the logger's folder, else the trainer's ``default_root_dir``.
        """
        super().__init__("epoch")
        self.folder = folder

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder that holds predictions: with fewer ranks than before, some old files would stay.

        Raises:
            UserError: If it does.
        """
        found = [] if self.folder is None else sorted(Path(self.folder).glob("*_rank_*.npz"))
        if found and trainer.is_global_zero:
            raise UserError(f"{found[0]} is there already: give another --out, or remove the old predictions")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        """Write the valid records: each one is on one rank only."""
        valid = torch.cat([batch["valid"] for batch in predictions]).cpu()
        arrays = {
            name: torch.cat([batch[name] for batch in predictions]).cpu()[valid].numpy()
            for name in predictions[0]
            if name != "valid"
        }
        if "codes" in arrays:
            arrays["codes"] = arrays["codes"].astype(np.uint16)
        kind = "codes" if "codes" in arrays else "predictions"
        content = io.BytesIO()
        np.savez(content, **arrays)
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{kind}_rank_{trainer.global_rank}.npz"
        write_atomically(path, content.getbuffer())
        print(f"{path}: {kind} of {int(valid.sum())} records")
