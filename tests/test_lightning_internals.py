"""The private names of Lightning that vab relies on do in the installed release what their wrappers say."""

import ast
import csv
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import vab
from vab.lightning_internals import (
    CheckpointHooks,
    CommandHooks,
    add_to_logged_step,
    attached_trainer,
    begin_epoch,
    cluster_environment,
    is_accumulating,
    last_saved_step,
    log_numbers,
    loss_scale,
    processed_batches,
    progress_in,
    save_last,
    set_device,
    set_global_step,
    shard_over_all_ranks,
    unscales_gradients,
)

SOURCE = Path(vab.__file__).parent


class Model(BoringModel):
    """Its loss is logged, for loggers and checkpoints."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("train/loss", loss)
        return loss


class EachBatch(Callback):
    """Takes notes after each training batch."""

    def __init__(self, note):
        self.note, self.notes = note, []

    def on_train_batch_end(self, trainer, *_):
        self.notes.append(self.note(trainer))


@pytest.fixture
def fit(tmp_path):
    """Train for a few batches; the trainer."""

    def train(*callbacks, batches=4, resume=None, **flags):
        flags = {"logger": False, "max_epochs": 1, "limit_val_batches": 1} | flags
        trainer = Trainer(
            accelerator="cpu", default_root_dir=tmp_path, callbacks=[*callbacks], limit_train_batches=batches,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **flags,
        )  # fmt: skip
        trainer.fit(Model(), BoringDataModule(), ckpt_path=resume)
        return trainer

    return train


def test_a_module_without_a_trainer_is_told_from_one_that_has_one():
    module, trainer = Model(), Trainer(accelerator="cpu", logger=False)
    assert attached_trainer(module) is None
    module.trainer = trainer
    assert attached_trainer(module) is trainer


def test_a_module_says_the_device_that_it_is_told():
    module = LightningModule()
    set_device(module, torch.device("meta"))
    assert module.device.type == "meta"


def test_batches_that_only_accumulate_are_told_from_optimizer_steps(fit):
    seen = EachBatch(lambda trainer: (is_accumulating(trainer), trainer.global_step))
    fit(seen, batches=5, accumulate_grad_batches=2)
    assert seen.notes == [(True, 0), (False, 1), (True, 1), (False, 2), (False, 3)]  # the last batch always steps


def test_numbers_are_logged_at_the_step_of_the_batch(fit, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    seen = EachBatch(lambda trainer: log_numbers(trainer, {"number": trainer.global_step / 2}))
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = fit(seen, logger=logger, log_every_n_steps=100)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [(row["step"], row["number"]) for row in csv.DictReader(file)]
    assert rows == [("0", "0.5"), ("1", "1.0"), ("2", "1.5"), ("3", "2.0")]
    assert trainer.callback_metrics["number"] == 2.0


def test_the_loss_scale_is_that_of_the_scaler(fit):
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    seen = EachBatch(lambda trainer: float(loss_scale(trainer)))
    fit(seen, batches=2, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert seen.notes == [16.0, 16.0]
    assert loss_scale(Trainer(accelerator="cpu", logger=False)) is None


def test_a_trainer_that_only_validates_logs_at_the_given_step():
    trainer = Trainer(accelerator="cpu", logger=False)
    set_global_step(trainer, 7)
    assert (trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped) == (7, 7)


def test_finished_batches_of_an_epoch_are_counted(fit):
    seen = EachBatch(processed_batches)
    fit(seen, batches=3, max_epochs=2)
    assert seen.notes == [1, 2, 3] * 2


def test_the_counts_of_a_checkpoint_are_those_that_a_resumed_run_takes(fit, tmp_path):
    path = tmp_path / "two.ckpt"
    fit(batches=2).save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    batches, epochs = progress_in(checkpoint)
    assert batches["current"]["processed"] == batches["total"]["processed"] == 2
    assert (batches["is_last_batch"], epochs["current"]["started"]) == (True, 1)
    add_to_logged_step(checkpoint, 10)
    torch.save(checkpoint, path)
    seen = EachBatch(lambda trainer: trainer.fit_loop.epoch_loop._batches_that_stepped)
    fit(seen, batches=2, max_epochs=2, resume=path)
    assert seen.notes == [12, 13]


def test_an_epoch_begins_after_a_checkpoint_between_two_epochs(fit, tmp_path):
    class Begin(Callback):
        def on_train_start(self, trainer, module):
            assert trainer.fit_loop.epoch_loop.restarting
            begin_epoch(trainer)
            assert not trainer.fit_loop.epoch_loop.restarting

    saver = ModelCheckpoint(tmp_path / "own", filename="two", save_on_train_epoch_end=True)
    fit(saver, batches=2, limit_val_batches=0)
    longer = {"max_epochs": -1, "max_steps": 4, "limit_val_batches": 0}  # an end in steps, as in our recipes
    trainer = fit(Begin(), batches=2, resume=tmp_path / "own" / "two.ckpt", **longer)
    assert trainer.global_step == 4


def test_the_cluster_is_known_also_for_one_device(monkeypatch):
    assert isinstance(cluster_environment(Trainer(accelerator="cpu", logger=False)), LightningEnvironment | None)
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "run", "SLURM_JOB_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NODEID", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    trainer = Trainer(accelerator="cpu", devices=1, logger=False)
    assert isinstance(cluster_environment(trainer), SLURMEnvironment)


def test_the_step_of_the_newest_checkpoint(fit, tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    seen = EachBatch(last_saved_step)
    trainer = fit(seen, saver, batches=5)
    assert seen.notes == [0, 0, 2, 2, 4]  # checkpoints are saved after other callbacks
    assert last_saved_step(trainer) == 4


def test_a_fused_optimizer_takes_the_loss_scale_off_itself():
    weights = [torch.nn.Parameter(torch.zeros(2))]
    assert unscales_gradients(torch.optim.AdamW(weights, fused=True))
    assert not unscales_gradients(torch.optim.AdamW(weights))


def test_weights_are_divided_over_the_ranks_of_all_nodes():
    strategy = ModelParallelStrategy(tensor_parallel_size=1)
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 2, 3
    shard_over_all_ranks(strategy)
    assert strategy._data_parallel_size == 6  # setup_environment makes the device mesh of it


def test_the_steps_of_saving_go_through_public_names(fit, tmp_path):
    class Recorded(CheckpointHooks):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.calls = []

        def write_best(self, trainer, metrics):
            self.calls.append("best")
            super().write_best(trainer, metrics)

        def write_last(self, trainer, metrics):
            self.calls.append("last")
            super().write_last(trainer, metrics)

        def write(self, trainer, path):
            self.calls.append(f"write {Path(path).name}")
            super().write(trainer, path)

        def may_remove(self, trainer, previous, current):
            self.calls.append(f"remove {Path(previous).name}")
            return super().may_remove(trainer, previous, current)

    saver = Recorded(tmp_path / "own", filename="{step}", every_n_train_steps=1, save_top_k=1, save_last=True)
    trainer = fit(saver, batches=2)
    assert saver.calls == [
        *("best", "write step=1.ckpt", "last", "write last.ckpt"),
        *("best", "write step=2.ckpt", "remove step=1.ckpt", "last", "write last.ckpt", "remove last.ckpt"),
    ]
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["last.ckpt", "step=2.ckpt"]
    assert saver.has_nothing_to_save(trainer)  # the last step is saved

    (tmp_path / "own" / "last.ckpt").unlink()
    save_last(saver, trainer)
    assert (tmp_path / "own" / "last.ckpt").exists()
    saver.save_last, saver.calls = False, []
    save_last(saver, trainer)
    assert saver.calls == []


def test_a_metric_that_does_not_exist_is_an_error_of_lightning_after_a_validation(fit, tmp_path):
    saver = CheckpointHooks(tmp_path / "own", monitor="val/other", every_n_train_steps=1)
    with pytest.raises(MisconfigurationException, match="could not find the monitored key"):
        fit(saver, batches=4, val_check_interval=2)


def test_each_command_may_have_its_own_flags_and_a_checked_checkpoint_path(tmp_path):
    seen = []

    class Commands(CommandHooks):
        def add_command_arguments(self, parser, command):
            if command == "validate":
                parser.add_argument("--log_to", default="nowhere")

        def check_checkpoint_path(self):
            settings = self.config[self.config.subcommand]
            seen.append((settings.ckpt_path, settings.get("log_to")))
            settings.ckpt_path = None

    file = tmp_path / "model.ckpt"
    torch.save({"hyper_parameters": {"unknown": 1}}, file)  # Lightning's own would take them up, and fail
    trainer = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.limit_val_batches=1"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    arguments = ["validate", f"--ckpt_path={file}", *trainer, *quiet]
    Commands(BoringModel, BoringDataModule, save_config_callback=None, args=arguments)
    assert seen == [(str(file), "nowhere")]


def modules():
    """All modules of the package that import Lightning."""
    for found in pkgutil.walk_packages([str(SOURCE)], "vab."):
        source = importlib.util.find_spec(found.name).origin
        if "lightning" in Path(source).read_text() and found.name not in ("vab.__main__", "vab.lightning_internals"):
            yield pytest.param(found.name, Path(source), id=found.name)


DEFINED = re.compile(r"\b(?:def |self\.)_(?!_)(\w+)")
DOCUMENTED = {"_generate_state_key"}  # Lightning's guide to callbacks says to call it


def private_names(source):
    return {f"_{name}" for name in DEFINED.findall(source)} - DOCUMENTED


@pytest.fixture(scope="module")
def lightnings():
    """Every private attribute and method in Lightning's own sources."""
    folder = Path(lightning.__file__).parent
    files = [path for part in ("pytorch", "fabric") for path in (folder / part).rglob("*.py")]
    return set().union(*(private_names(path.read_text()) for path in files))


@pytest.mark.parametrize(("name", "path"), modules())
def test_no_other_file_uses_a_private_name_of_lightning(name, path, lightnings):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        # Of another object, or as text in getattr: any name that Lightning has.
        if isinstance(node, ast.Attribute) and node.attr in lightnings:
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Constant) and node.value in lightnings:
            found.append(f"line {node.lineno}: {node.value!r}")
    for kind in vars(importlib.import_module(name)).values():
        if not inspect.isclass(kind) or kind.__module__ != name:
            continue
        # Of itself: what a base class of Lightning's has.
        bases = [base for base in kind.__mro__ if base.__module__.startswith("lightning.")]
        inherited = set().union(*(private_names(inspect.getsource(base)) for base in bases))
        used = private_names(inspect.getsource(kind)) & inherited
        found += [f"{kind.__name__}: {used_name}" for used_name in sorted(used)]
    assert not found, f"{path.relative_to(SOURCE)} uses private names of Lightning, which belong into its own file"
