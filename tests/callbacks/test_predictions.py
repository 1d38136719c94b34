import numpy as np
import torch
from lightning.pytorch import Trainer

from vab.callbacks.predictions import PredictionWriter


def test_records_that_only_fill_a_rank_up_are_not_written(tmp_path):
    batches = [
        {"codes": torch.full((2, 4, 3), 7 + first), "index": torch.tensor([first, first + 2]), "valid": valid}
        for first, valid in ((0, torch.tensor([True, True])), (4, torch.tensor([True, False])))
    ]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    PredictionWriter().write_on_epoch_end(trainer, None, batches, None)
    with np.load(tmp_path / "codes_rank_0.npz") as written:
        assert written["index"].tolist() == [0, 2, 4]
        assert written["codes"][:, 0, 0].tolist() == [7, 7, 11]
        assert sorted(written.files) == ["codes", "index"]
