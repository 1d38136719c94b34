"""``vab fit``, ``validate``, ``test`` and ``predict``: LightningCLI over our tasks and shards."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import torch.distributed
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from vab.callbacks import (
    BackgroundCheckpoints,
    Dashboard,
    FiniteCheck,
    Meters,
    NonFiniteError,
    PredictionWriter,
    StepProgress,
    StopOnSignal,
    StoppedError,
)
from vab.callbacks.stopping import folder_of_requeued_job
from vab.data.reading.datamodule import ShardDataModule
from vab.engines import FSDP
from vab.errors import OneLineErrors, cause_of, exit_now, explain
from vab.lightning_internals import CommandHooks, set_global_step
from vab.precision import allow_tf32
from vab.spec import UserError
from vab.tasks import BaseTask
from vab.tasks.checkpoints import find_checkpoint
from vab.training import recipes
from vab.training.run_folder import global_step_in, logger_version, name_of_run, refuse_folder_of_run


class PlanRequestedError(Exception):
    """``vab fit --print_plan``: instead of training, the settings are to be planned with."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config


def settings_of_fit(arguments: list[str]) -> dict[str, Any]:
    """The settings that ``vab fit`` would train with, parsed and checked; nothing is opened or made.

    Args:
        arguments: What follows ``vab fit``.
    """
    try:
        train(["fit", *arguments, "--print_plan"])
    except PlanRequestedError as request:
        return request.config
    raise UserError("plan: these arguments train nothing")


def train(arguments: list[str]) -> None:
    """Run LightningCLI on ``arguments``, which start with the subcommand.

    Raises:
        PlanRequestedError: If ``--print_plan`` is among them.
    """
    silence_irrelevant_warnings()
    jsonargparse.set_loader("recipe", recipes.load, exceptions=(yaml.YAMLError,))
    try:
        TrainerCommands(
            BaseTask,
            ShardDataModule,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_class=Parser,
            # For `base: FILE` and ${oc.env:...} only; numbers that several parts share are linked.
            parser_kwargs={"parser_mode": "recipe"},
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"use_distributed_sampler": False},  # our order of records gives each rank its share
            args=arguments,
        )
    except MisconfigurationException as error:  # wrong settings of the trainer
        raise UserError(explain(error)) from error
    except ValueError as error:
        # The one setting that Lightning can check against the data only.
        if isinstance(error, UserError) or "`val_check_interval`" not in str(error):
            raise
        raise UserError(explain(error)) from error
    except (StoppedError, NonFiniteError) as stopped:
        if all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK")):
            diverged = isinstance(stopped, NonFiniteError)
            print(f"error: {stopped}" if diverged else how_to_resume(arguments, stopped), file=sys.stderr)
        # Lightning's launcher would kill rank 0 if a rank that it started (not torchrun or SLURM) failed first.
        is_launched = os.environ.get("LOCAL_RANK", "0") != "0" and "RANK" not in os.environ
        exit_now(0 if is_launched else stopped.exit_status)
    except SystemExit as ended:
        if cause_of(ended, KeyboardInterrupt) is None:
            raise
        raise KeyboardInterrupt from ended  # Lightning turns it into exit status 1
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
        raise UserError(
            f"rank {rank} lost the connection to another rank, whose own message says why if it could print one"
            f" ({explain(error)[:160]}); resume with --ckpt_path and the run's folder"
        ) from error


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with one-line errors."""


class TrainerCommands(CommandHooks):
    """LightningCLI with our callbacks, checks of settings, and rules for the folders of runs."""

    _run = "run"  # of fit: the name of the run, made from its settings
    _logger: tuple[str, int] | None = None  # of a run that resumes in its folder: the logger's version and purge_step

    def add_command_arguments(self, parser: LightningArgumentParser, command: str) -> None:
        """Add the flags that say where a command writes, and correct the help of ``--ckpt_path``."""
        for action in parser._actions:
            if action.dest == "ckpt_path":
                action.help = "A checkpoint, or a run's folder, which stands for its last.ckpt. fit resumes that run"
        if command == "fit":
            words = "print memory, time, epochs and disk of this run, and do not train; vab plan has more flags"
            parser.add_argument("--print_plan", action="store_true", default=argparse.SUPPRESS, help=words)
        if command in ("validate", "test"):
            words = "folder in which TensorBoard logs the metrics, at the checkpoint's step; default: only print them"
            parser.add_argument("--log_to", type=str | None, default=None, help=words)
        elif command == "predict":
            parser.add_argument("--out", type=str, required=True, help="folder for predictions: one .npz for each rank")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the manifest of the shards set the network's spec and the task's labels."""
        # At instantiation, because only such a link is stored in the checkpoint, which then restores the network
        # without the shards.
        parser.link_arguments(
            "data.spec",
            "model.init_args.backbone.init_args.spec",
            compute_fn=lambda spec: spec.to_dict(),
            apply_on="instantiate",
        )
        parser.link_arguments("data.labels", "model.init_args.labels", compute_fn=list, apply_on="instantiate")

    def check_checkpoint_path(self) -> None:
        """Check ``--ckpt_path`` and decide in which folder a resumed run writes.

        A run is what its config says and a checkpoint is its state: neither changes the other.
        """
        command = self.config.subcommand
        settings = self.config[command]
        path, config = settings.get("ckpt_path"), {}
        if command == "fit":
            config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))["fit"]
            self._run = name_of_run(config)
            if folder := folder_of_requeued_job(settings.trainer.default_root_dir or ".", self._run):
                path = folder
                print(f"job {os.environ['SLURM_JOB_ID']} was requeued: resuming the run in {folder}", file=sys.stderr)
        elif not path:
            raise UserError(f"{command} needs a trained model: --ckpt_path FILE, or a run's folder")
        else:
            settings.trainer.logger = False  # the run's own: only fit writes into a run
            for flag in ("out", "log_to"):
                if (folder := settings.get(flag)) is not None:
                    refuse_folder_of_run(Path(folder), flag)
        if not path:
            return
        # Lightning's "best" and "last" mean a run of the same process, which does not exist here.
        settings.ckpt_path = str(find_checkpoint(path))
        if settings.ckpt_path.endswith(".safetensors"):
            remedy = (
                "give a run's checkpoint, or start a run with its weights: --model.init_from"
                if command == "fit"
                else "give the run's checkpoint that it was exported from"
            )
            raise UserError(f"--ckpt_path {path} is an exported model, not the state of a run: {remedy}")
        if command == "fit":
            self._logger = logger_version(settings, Path(settings.ckpt_path), config)

    def instantiate_classes(self) -> None:
        """Make data, task and trainer, and report a wrong value of the user in one line."""
        if self.config[self.config.subcommand].get("print_plan"):
            raise PlanRequestedError(yaml.safe_load(self.parser.dump(self.config, skip_unset=False))["fit"])
        logger = self.config[self.config.subcommand].trainer.logger
        try:
            if self._logger is None:
                super().instantiate_classes()
            else:
                place = logger.init_args
                given = place.get("version"), None
                place.version, place.purge_step = self._logger  # steps after the checkpoint's are logged again
                super().instantiate_classes()
                # The saved config must not make other commands, or a later resume, purge what was logged.
                place.version, place.purge_step = given
        except ValueError as error:  # the parser's, which lists every type that the argument might have been
            cause = cause_of(error, UserError, MisconfigurationException)
            if cause is not None:
                raise cause from error
            if cause_of(error, TypeError, LookupError, AttributeError) is not None:
                raise  # a mistake in a program, not in a value
            raise UserError(explain(str(error).partition("\nGiven value")[0])) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with the callbacks and plugins that every run has.

        Raises:
            UserError: If a setting is out of range, or torchrun has started another number of processes.
        """
        command = self.config.subcommand
        settings, own = self.config_init[command].trainer, self.config[command]
        check_trainer_settings(settings)
        plugins, callbacks = _as_list(settings.get("plugins")), _as_list(settings.get("callbacks"))
        if not _has(plugins, CheckpointIO):
            plugins.append(BackgroundCheckpoints())
        if settings.get("enable_progress_bar") is not False and not _has(callbacks, ProgressBar):
            callbacks.append(StepProgress())
        if not _has(callbacks, Meters):
            callbacks.append(Meters())
        if command == "fit":
            callbacks.append(Dashboard())
            if not _has(callbacks, FiniteCheck):
                callbacks.append(FiniteCheck())
        else:
            self.save_config_callback = None  # only fit writes into a run
            if command == "predict":
                callbacks.append(PredictionWriter(own.out))
            elif own.log_to is not None:
                kwargs["logger"] = TensorBoardLogger(own.log_to, name="", version="", default_hp_metric=False)
        interval, accumulated = settings.get("val_check_interval"), settings.get("accumulate_grad_batches")
        if settings.get("check_val_every_n_epoch", 1) is None and isinstance(interval, int) and accumulated:
            kwargs["val_check_interval"] = interval * accumulated  # Lightning counts batches; our unit is steps
        if settings.get("strategy") == "fsdp":
            kwargs["strategy"] = FSDP()  # Lightning's "fsdp" is torch's first version
        try:
            trainer = super().instantiate_trainer(plugins=plugins, callbacks=callbacks, **kwargs)
        except ValueError as error:  # Lightning's, for values that no trainer accepts
            raise UserError(explain(error)) from error
        allow_tf32(trainer.strategy.root_device)
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if TorchElasticEnvironment.detect() and trainer.world_size != started:
            raise UserError(
                f"torchrun has started {started} processes, but the trainer is set to {trainer.world_size}: set"
                " --trainer.devices and --trainer.num_nodes to torchrun's --nproc_per_node and --nnodes"
            )
        # Added here because Lightning refuses two callbacks that save into one folder; this one saves only through
        # the others.
        trainer.callbacks.append(StopOnSignal(self._run))  # type: ignore[attr-defined]
        return trainer

    def before_validate(self) -> None:
        """Set the trainer's step to the checkpoint's, if metrics are logged."""
        settings = self.config[self.config.subcommand]
        if settings.log_to is not None:
            set_global_step(self.trainer, global_step_in(settings.ckpt_path))

    before_test = before_validate


def check_trainer_settings(settings: Any) -> None:
    """Check settings of the trainer that Lightning accepts and then misunderstands.

    Raises:
        UserError: If one is out of range.
    """
    accumulated, interval = settings.get("accumulate_grad_batches"), settings.get("val_check_interval")
    if accumulated is not None and accumulated < 1:
        raise UserError(f"--trainer.accumulate_grad_batches must be 1 or more, got {accumulated}")
    clipped = settings.get("gradient_clip_val")
    if clipped is not None and not clipped >= 0:
        raise UserError(f"--trainer.gradient_clip_val must be 0 (no clipping) or more, got {clipped}")
    if isinstance(interval, (int, float)) and interval <= 0:  # it may also be a duration, as text
        raise UserError(
            f"--trainer.val_check_interval must be above 0, got {interval}; for no validation: "
            "--trainer.limit_val_batches 0"
        )


def _as_list(value: Any) -> list[Any]:
    return [*value] if isinstance(value, list) else [] if value is None else [value]


def _has(objects: list[Any], kind: type) -> bool:
    return any(isinstance(one, kind) for one in objects)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether torch raised this error because another rank does not answer."""
    in_gloo = re.search(r"gloo/|Connection (closed|reset) by peer|Timed out waiting", str(error))
    return isinstance(error, torch.distributed.DistError) or in_gloo is not None


def how_to_resume(arguments: list[str], stopped: Any) -> str:
    """One line about a run that was stopped by a signal."""
    if stopped.requeued:
        return f"{stopped}; the job is requeued and resumes from {stopped.checkpoint}"
    if stopped.checkpoint is None:
        return f"{stopped}; nothing was saved, because the run has no vab.callbacks.Checkpoints"
    kept: list[str] = []
    for argument in arguments:
        if kept and kept[-1] == "--ckpt_path":
            kept.pop()
        elif not argument.startswith("--ckpt_path="):
            kept.append(argument)
    return f"{stopped}; resume with: {shlex.join(['vab', *kept, '--ckpt_path', str(stopped.checkpoint)])}"


def silence_irrelevant_warnings() -> None:
    """Hide warnings and tips of libraries that do not concern a user of vab; our own warnings stay."""
    for words in (
        r".*does not have many workers which may be a bottleneck.*",
        r".*is an instance of `nn.Module` and is already saved during checkpointing.*",
        r".*The `srun` command is available.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*Precision .* is not supported by the model summary.*",
        r".*LightningCLI's args parameter is intended.*",
        r".*your dataloader is not resumable.*",  # our order is resumable, by its own state
        r".*It is recommended to use `self.log\('(val|test)/.*sync_dist=True.*",  # the sums are synchronised already
        r".*therefore `best_model_score`.*won't be reloaded.*",
    ):
        warnings.filterwarnings("ignore", message=words)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage() and "Tip:" not in record.getMessage()
    )
