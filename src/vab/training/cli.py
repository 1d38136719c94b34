"""``vab fit``, ``validate``, ``test`` and ``predict``: Lightning's own command line over our tasks and shards."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

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
from vab.callbacks.stopping import folder_of_returned_job
from vab.data.reading.datamodule import ShardDataModule
from vab.engines import FSDP
from vab.errors import OneLineErrors, cause_of, explain, leave
from vab.lightning_internals import CommandHooks, set_global_step
from vab.spec import UserError
from vab.tasks import BaseTask
from vab.tasks.checkpoints import find_checkpoint, reading
from vab.training.run_folder import name_of_run, place_of_run, refuse_folder_of_run

_SHOWN = 160  # characters of a library's complaint


def train(arguments: list[str]) -> None:
    """Hand over to LightningCLI; ``arguments`` start with the subcommand."""
    quiet()
    try:
        TrainerCommands(
            BaseTask,
            ShardDataModule,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_class=Parser,
            # Only for ${oc.env:...}; shared numbers are linked.
            parser_kwargs={"parser_mode": "omegaconf"},
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"use_distributed_sampler": False},  # our order gives each rank its share
            args=arguments,
        )
    except MisconfigurationException as error:  # what Lightning finds wrong with the trainer's settings
        raise UserError(" ".join(str(error).split())) from error
    except ValueError as error:
        # The one setting that Lightning can hold against the data only, and then calls by this name.
        if isinstance(error, UserError) or "`val_check_interval`" not in str(error):
            raise
        raise UserError(" ".join(str(error).split())) from error
    except (StoppedError, NonFiniteError) as stopped:
        if all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK")):
            diverged = isinstance(stopped, NonFiniteError)
            print(f"error: {stopped}" if diverged else how_to_go_on(arguments, stopped), file=sys.stderr)
        # A process that has started this one would be killed if this one failed.
        leave(0 if is_started_by_other() else stopped.exit_status)
    except SystemExit as ended:
        if cause_of(ended, KeyboardInterrupt) is None:
            raise
        raise KeyboardInterrupt from ended  # Lightning makes it status 1
    except RuntimeError as error:
        if not is_loss_of_a_rank(error):
            raise
        words = " ".join(str(error).split())
        raise UserError(
            f"rank {os.environ.get('RANK', os.environ.get('LOCAL_RANK', '0'))} has lost another rank, whose message, if"
            f" it could leave one, says why ({words[:_SHOWN]}): go on with --ckpt_path and the run's folder"
        ) from error


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, with our complaints."""

    def add_method_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the flags of ``Trainer.fit`` and its kin; Lightning describes values of --ckpt_path that vab refuses."""
        added: list[str] = super().add_method_arguments(*args, **kwargs)
        for action in self._actions:
            if action.dest == "ckpt_path":
                action.help = "A checkpoint, or a run's folder, which stands for its last.ckpt. fit resumes that run"
        return added


class TrainerCommands(CommandHooks):
    """Lightning's own command line over our tasks and shards."""

    _run = "run"  # of fit: its name by its settings
    _place: tuple[str, int] | None = None  # of a run that continues in its own folder: the logger's version, the step

    def add_command_arguments(self, parser: LightningArgumentParser, command: str) -> None:
        """Add the flags that say where to write, to the commands that write only on request."""
        if command in ("validate", "test"):
            words = (
                "folder in which TensorBoard logs the metrics, at the checkpoint's step; none: they are only printed"
            )
            parser.add_argument("--log_to", type=str | None, default=None, help=words)
        elif command == "predict":
            parser.add_argument("--out", type=str, required=True, help="folder for predictions: one .npz for each rank")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the shards say which network and which classes fit them."""
        # The manifest states the numbers and the network takes them from there. At instantiation, because only
        # such a link lands in the checkpoint, which then restores the network without the shards.
        parser.link_arguments(
            "data.spec",
            "model.init_args.backbone.init_args.spec",
            compute_fn=lambda spec: spec.to_dict(),
            apply_on="instantiate",
        )
        parser.link_arguments("data.labels", "model.init_args.labels", compute_fn=list, apply_on="instantiate")

    def instantiate_classes(self) -> None:
        """Make data, task and trainer; what a user's value cannot be is said in one line."""
        settings = self.config[self.config.subcommand].trainer
        try:
            if self._place is None:
                super().instantiate_classes()
            else:
                place = settings.logger.init_args
                given = place.get("version"), None
                place.version, place.purge_step = self._place  # steps after the checkpoint's are done and shown again
                super().instantiate_classes()
                # The run's saved config must not make other commands, or a later resume, purge what was logged.
                place.version, place.purge_step = given
        except ValueError as error:  # the parser's, about all that an argument might have been
            told = cause_of(error, UserError, MisconfigurationException)
            if told is not None:
                raise told from error
            if cause_of(error, TypeError, LookupError, AttributeError) is not None:
                raise  # no value that a user gave, but a mistake in a program
            raise UserError(explain(str(error).partition("\nGiven value")[0])) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with what every run of ours has."""
        settings = self.config_init[self.config.subcommand].trainer
        plugins = settings.get("plugins") or []
        plugins = [*plugins] if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(BackgroundCheckpoints())
        callbacks = settings.get("callbacks") or []
        callbacks = [*callbacks] if isinstance(callbacks, list) else [callbacks]
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if settings.get("enable_progress_bar") is not False and not has_bar:
            callbacks.append(StepProgress())
        if not any(isinstance(callback, Meters) for callback in callbacks):
            callbacks.append(Meters())  # a run cannot do without its meters
        command = self.config.subcommand
        if command == "fit":
            callbacks.append(Dashboard())
            if not any(isinstance(callback, FiniteCheck) for callback in callbacks):
                callbacks.append(FiniteCheck())
        else:
            self.save_config_callback = None  # only fit writes into a run
            own = self.config[command]
            if command == "predict":
                callbacks.append(PredictionWriter(own.out))
            elif own.log_to is not None:
                kwargs["logger"] = TensorBoardLogger(own.log_to, name="", version="", default_hp_metric=False)
        accumulated, interval = settings.get("accumulate_grad_batches"), settings.get("val_check_interval")
        if accumulated is not None and accumulated < 1:
            raise UserError(f"--trainer.accumulate_grad_batches must be 1 or more, got {accumulated}")
        clipped = settings.get("gradient_clip_val")
        if clipped is not None and not clipped >= 0:
            raise UserError(f"--trainer.gradient_clip_val must be 0 (no clipping) or more, got {clipped}")
        if isinstance(interval, (int, float)) and interval <= 0:  # else a time, as text
            raise UserError(
                f"--trainer.val_check_interval must be above 0, got {interval}; for no validation: "
                "--trainer.limit_val_batches 0"
            )
        if settings.get("check_val_every_n_epoch", 1) is None and isinstance(interval, int) and accumulated:
            kwargs["val_check_interval"] = interval * accumulated  # Lightning counts batches, a user steps
        if settings.get("strategy") == "fsdp":
            kwargs["strategy"] = FSDP()  # Lightning means by it torch's first one
        try:
            trainer = super().instantiate_trainer(plugins=plugins, callbacks=callbacks, **kwargs)
        except ValueError as error:  # Lightning's word for a value that no trainer takes
            raise UserError(" ".join(str(error).split())) from error
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if TorchElasticEnvironment.detect() and trainer.world_size != started:
            raise UserError(
                f"torchrun has started {started} processes, and the trainer wants {trainer.world_size}: with"
                " --trainer.devices and --trainer.num_nodes say what it was told by --nproc_per_node and --nnodes"
            )
        # A run ends well when it is told to. Last, and after Lightning has looked for callbacks that save where
        # none may: this one saves only what others keep.
        trainer.callbacks.append(StopOnSignal(self._run))  # type: ignore[attr-defined]
        return trainer

    def check_checkpoint_path(self) -> None:
        """A run is what its config says and a checkpoint is its state: neither changes the other."""
        settings = self.config[self.config.subcommand]
        path = settings.get("ckpt_path")
        if self.config.subcommand != "fit":
            if not path:
                raise UserError(f"{self.config.subcommand} needs a trained model: --ckpt_path FILE, or a run's folder")
            settings.trainer.logger = False  # the run's own: only fit writes into a run
            for flag in ("out", "log_to"):
                if (folder := settings.get(flag)) is not None:
                    refuse_folder_of_run(Path(folder), flag)
        else:
            config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))["fit"]
            self._run = name_of_run(config)
            if left := folder_of_returned_job(settings.trainer.default_root_dir or ".", self._run):
                path = left
                print(f"job {os.environ['SLURM_JOB_ID']} is back: going on with the run in {left}", file=sys.stderr)
        if path:  # Lightning's "best" and "last" mean a run of the same process, which there is none of
            settings.ckpt_path = str(find_checkpoint(path))
            if settings.ckpt_path.endswith(".safetensors"):
                remedy = (
                    "give a run's checkpoint, or begin a run with its weights: --model.init_from"
                    if self.config.subcommand == "fit"
                    else "give the run's checkpoint that it was made of"
                )
                raise UserError(f"--ckpt_path {path} is an exported model, not the state of a run: {remedy}")
            if self.config.subcommand == "fit":
                self._place = place_of_run(settings, Path(settings.ckpt_path), config)

    def before_validate(self) -> None:
        """Let the trainer know the checkpoint's step, if metrics are to be logged at it."""
        settings = self.config[self.config.subcommand]
        if settings.log_to is None:
            return
        with reading(settings.ckpt_path):
            step = torch.load(settings.ckpt_path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        set_global_step(self.trainer, step)

    before_test = before_validate


def is_started_by_other() -> bool:
    """Whether this is a rank that the first process of its machine has started, not torchrun or SLURM."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "RANK" not in os.environ


def is_loss_of_a_rank(error: RuntimeError) -> bool:
    """Whether this is what torch says when another rank does not answer."""
    in_gloo = re.search(r"gloo/|Connection (closed|reset) by peer|Timed out waiting", str(error))
    return isinstance(error, torch.distributed.DistError) or in_gloo is not None


def how_to_go_on(arguments: list[str], stopped: Any) -> str:
    """One line on a run that was told to end."""
    if stopped.requeued:
        return f"{stopped}; the job is in the queue again and goes on with {stopped.checkpoint}"
    if stopped.checkpoint is None:
        return f"{stopped}; nothing is saved, as the run has no vab.callbacks.Checkpoints"
    kept: list[str] = []
    for argument in arguments:
        if kept and kept[-1] == "--ckpt_path":
            kept.pop()
        elif not argument.startswith("--ckpt_path="):
            kept.append(argument)
    return f"{stopped}; go on with: {shlex.join(['vab', *kept, '--ckpt_path', str(stopped.checkpoint)])}"


def quiet() -> None:
    """Keep away the advice that does not concern a user of vab; our own warnings stay."""
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
