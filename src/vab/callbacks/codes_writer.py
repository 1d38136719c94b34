"""What ``vab predict`` leaves behind."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from vab.data.format import write_atomically


class CodesWriter(BasePredictionWriter):
    """``vab predict`` leaves the codes of each rank in ``codes_rank_R.npz``: ``index`` (n,) and ``codes`` (n, K, T)."""

    def __init__(self) -> None:
        super().__init__("epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        """Write the records that count, each once over all ranks."""
        valid = torch.cat([batch["valid"] for batch in predictions]).cpu()
        arrays = {name: torch.cat([batch[name] for batch in predictions]).cpu()[valid] for name in ("index", "codes")}
        content = io.BytesIO()
        np.savez(content, index=arrays["index"].numpy(), codes=arrays["codes"].numpy().astype(np.uint16))
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"codes_rank_{trainer.global_rank}.npz"
        write_atomically(path, content.getbuffer())
        print(f"{path}: codes of {int(valid.sum())} records")
