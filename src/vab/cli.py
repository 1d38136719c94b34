"""The command line: ``vab fit`` and its kin are Lightning's, the other commands are functions of ``vab.commands``."""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import json
import logging
import multiprocessing
import os
import re
import shlex
import sys
import typing
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from vab import UserError, __version__

TRAINER_COMMANDS = {
    "fit": "train; --config FILE, then any --trainer.*, --data.*, --model.* flag",
    "folds": "cross-validation: fit for each of --folds 5, mean and deviation; flags as for fit",
    "validate": "score a checkpoint on the validation set",
    "test": "score a checkpoint on the test set",
    "predict": "codes, embeddings or probabilities for every record of a data set",
}
# Command -> (its one line, where its function is); a dict is a group of commands.
COMMANDS: dict[str, tuple[str, Any]] = {
    "extract": ("media files to shards of codec tokens and frame features", "vab.commands.extract:extract"),
    "shards": (
        "look after a folder of shards: verify, index, info; import ready features",
        {
            "import": "vab.commands.shards:import_shards",
            "verify": "vab.commands.shards:verify_shards",
            "index": "vab.commands.shards:index_shards",
            "info": "vab.commands.shards:show_shards",
        },
    ),
    "export": ("a trained model as a folder to pass on: weights, config, card", "vab.commands.export:export"),
    "generate": ("sound for a silent video or a still picture", "vab.commands.generate:generate"),
    "retrieve": (
        "recall on shards; with --query, what is nearest to a sound or a video",
        "vab.commands.retrieve:retrieve",
    ),
    "classify": ("the likeliest classes of media files", "vab.commands.classify:classify"),
    "sweep": ("try sampler settings on validation records; the best as a file", "vab.commands.sweep:sweep"),
    "evaluate": (
        "any system's sounds against real ones: FAD, KAD, KLD, IS, synchrony",
        "vab.commands.evaluate:evaluate",
    ),
    "compare": ("reports of evaluate side by side; unlike ones are refused", "vab.commands.compare:compare"),
    "recall": ("retrieval metrics of any system's paired embeddings", "vab.commands.recall:recall"),
    "listen": ("a page for a listening test, and the score of its answers", "vab.commands.listen:listen"),
    "lists": (
        "what to extract of a published data set: vggsound, audioset, esc50, speech_commands, msrvtt",
        {
            "vggsound": "vab.commands.lists:vggsound",
            "audioset": "vab.commands.lists:audioset",
            "esc50": "vab.commands.lists:esc50",
            "speech_commands": "vab.commands.lists:speech_commands",
            "msrvtt": "vab.commands.lists:msrvtt",
        },
    ),
    "weights": (
        "files of weights: list, fetch into a folder for machines without a network, verify",
        {
            "list": "vab.commands.weights:list_weights",
            "fetch": "vab.commands.weights:fetch_weights",
            "verify": "vab.commands.weights:verify_weights",
        },
    ),
    "doctor": ("what is installed and works, which weights are where, what to type", "vab.commands.doctor:doctor"),
    "demo": (
        "the synthetic world: world, score, report, two-stage",
        {
            "world": "vab.demo.world:write_world",
            "score": "vab.demo.score:score",
            "report": "vab.demo.report:report",
            "two-stage": "vab.demo.two_stage:two_stage",
        },
    ),
}


_SHOWN = 160  # characters of a library's complaint


def main(argv: list[str] | None = None) -> None:
    """Run ``vab`` on ``argv``, or on the process's own arguments.

    A user's mistake is one clear line on stderr and exit status 2; anything else that is raised is a bug of ours.
    """
    arguments = sys.argv[1:] if argv is None else argv
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        return print(overview())
    if command == "--version":
        return print(f"vab {__version__}")
    if command not in TRAINER_COMMANDS and command not in COMMANDS:
        hint = nearest(command, [*TRAINER_COMMANDS, *COMMANDS])
        fail(f"no command {command!r}{hint}; vab --help lists them")

    try:
        if command == "folds":
            run_folds(arguments[1:])
        elif command in TRAINER_COMMANDS:
            train(arguments)
        else:
            run_command(command, arguments[1:])
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left; say nothing more
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(
            f"no space left on the disk{f' of {error.filename}' if error.filename else ''}: free some and run it again"
        )
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        leave(130)


def fail(message: str) -> NoReturn:
    """One line, or a few, on stderr; exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def leave(status: int) -> NoReturn:
    """End the process where it stands, for one that was stopped in the middle of its work.

    What was to be closed has been, on the way here. Threads may still be at work inside a library, and one that is
    there while the interpreter takes itself apart can crash it.
    """
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def overview() -> str:
    """What ``vab --help`` prints; importing nothing heavy."""
    lines = ["usage: vab COMMAND ...     vab COMMAND --help tells more", ""]
    described = {**TRAINER_COMMANDS, **{name: words for name, (words, _) in COMMANDS.items()}}
    return "\n".join(lines + [f"  {name:<10}{words}" for name, words in described.items()])


def nearest(word: str, known: list[str]) -> str:
    """``; did you mean ...?`` where something known is close to ``word``, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def run_folds(arguments: list[str]) -> None:
    """``vab folds``: what is not its own goes to ``vab fit``."""
    import argparse

    from vab.commands.folds import cross_validate

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"folds: {message}")

    description = inspect.cleandoc(cross_validate.__doc__ or "").partition("\n\nArgs:")[0]
    parser = Parser(
        prog="vab folds", description=description, epilog="All other flags are vab fit's.", allow_abbrev=False
    )
    parser.add_argument("--folds", type=int, default=5, help="how many there are, numbered from 1 (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="train again what was done before")
    own, others = parser.parse_known_args(arguments)
    if not others:
        raise UserError("folds needs a recipe: vab folds --config configs/classify/esc50.yaml")
    cross_validate(others, own.folds, own.overwrite)


def run_command(name: str, arguments: list[str]) -> None:
    """Run a typed function as a command: its parameters are the flags, its docstring the help."""
    import jsonargparse

    place = COMMANDS[name][1]
    if isinstance(place, dict):
        if arguments and arguments[0] in place:
            prog, place, arguments = f"vab {name} {arguments[0]}", place[arguments[0]], arguments[1:]
        elif not arguments or arguments[0] in ("-h", "--help"):
            print(f"usage: vab {name} {{{','.join(place)}}} ...")
            return
        else:
            fail(f"no command {arguments[0]!r} in vab {name}: it has {', '.join(place)}")
    else:
        prog = f"vab {name}"
    module, _, function = place.partition(":")
    component = getattr(importlib.import_module(module), function)

    class Parser(OneLineErrors, jsonargparse.ArgumentParser):
        pass

    outcome = jsonargparse.auto_cli(
        component,
        args=_lists_as_items(component, _files_as_keys(component, arguments), name == "compare"),
        as_positional=prog in ("vab shards verify", "vab shards index", "vab shards info"),  # vab shards verify DIR
        fail_untyped=True,
        parser_class=Parser,
        prog=prog,
    )
    if status := getattr(outcome, "exit_status", 0):
        raise SystemExit(status)


def _files_as_keys(component: Any, arguments: list[str]) -> list[str]:
    """``--sampler FILE`` as ``--sampler.file FILE``, for parameters that take a file or a mapping.

    jsonargparse takes either, but a later ``--sampler.decode_steps 8`` would silently displace the file.
    """
    for name, hint in typing.get_type_hints(component).items():
        if {str, dict} <= {typing.get_origin(kind) or kind for kind in typing.get_args(hint)}:
            arguments = [re.sub(rf"^--{name}(?==|$)", f"--{name}.file", argument) for argument in arguments]
    return arguments


def _lists_as_items(component: Any, arguments: list[str], bare: bool) -> list[str]:
    """``--judges a b`` as ``--judges=["a", "b"]``, for parameters that take a list.

    With ``bare`` the values before any flag are the first parameter's: ``vab compare A.json B.json``.
    """
    hints = typing.get_type_hints(component)
    alternatives = {name: (hint, *typing.get_args(hint)) for name, hint in hints.items()}
    lists = [name for name, kinds in alternatives.items() if any(typing.get_origin(kind) is list for kind in kinds)]
    if bare and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{lists[0]}", *arguments]
    changed: list[str] = []
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        changed.append(argument)
        values = []
        while argument.removeprefix("--") in lists and rest and not rest[0].startswith("-"):
            values.append(rest.popleft())
        if len(values) == 1 and values[0].startswith("["):
            changed.append(values[0])
        elif values:
            changed[-1] += f"={json.dumps(values)}"
    return changed


_UNKNOWN_NAME = re.compile(
    r"(?:does not accept (?:nested key|option|argument)|[Uu]nrecognized arguments?:|No action for key) ['\"]?-*([\w.]+)"
)
_UNKNOWN_ARGUMENT = re.compile(r"Parser key ['\"]([\w.]+)['\"].*Option ['\"](\w+)['\"] is not accepted", re.DOTALL)


class OneLineErrors:
    """A parser whose complaint is one line, with the nearest name that it knows."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the complaint as a UserError instead of printing the usage."""
        text = explain(ex if ex is not None else message)
        deep = _UNKNOWN_ARGUMENT.search(text)
        if deep:
            hint = nearest(deep.group(2), _argument_names())
            raise UserError(f"{deep.group(1)}: there is no option {deep.group(2)!r}{hint}")
        known = list(_option_names(self))
        unknown = _UNKNOWN_NAME.search(text)
        hint = ""
        if unknown:
            word = unknown.group(1)
            names = set(known) if "." in word else {name.rsplit(".", 1)[-1] for name in known}
            in_sampler = "sampler" in known and word in _sampler_settings()
            hint = f"; type --sampler.{word}" if in_sampler else nearest(word, sorted(names))
        elif text.endswith("expected one argument"):
            hint = "; one that begins with '-' is joined with '=', as in --keep=-2"
        raise UserError(text + hint)


def _option_names(parser: Any) -> Iterator[str]:
    """Names of a parser's options, those of its subcommands included."""
    for action in parser._actions:
        yield from (name.lstrip("-") for name in action.option_strings)
        if isinstance(action.choices, dict):
            for inner in action.choices.values():
                yield from _option_names(inner)


def _sampler_settings() -> set[str]:
    from vab.tokens.sampler import Sampler

    return set(Sampler.__dataclass_fields__)


def _argument_names() -> list[str]:
    """Names of what tasks and backbones take, for hints."""
    from vab import tasks
    from vab.backbone import Backbone
    from vab.tokens.decoding import Sampler
    from vab.tokens.masking import Masking

    classes = [getattr(tasks, name) for name in tasks.__all__ if inspect.isclass(getattr(tasks, name))]
    known = (*classes, Backbone, Sampler, Masking)
    return sorted({name for kind in known for name in inspect.signature(kind).parameters})


def explain(problem: Exception | str) -> str:
    """The innermost words of a parser's complaint, in one line."""
    lines = [line.strip(" -") for line in str(problem).strip().splitlines()]
    return " ".join(line for line in lines if line)


def train(arguments: list[str]) -> None:
    """Hand over to LightningCLI; ``arguments`` start with the subcommand."""
    quiet()
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ProgressBar
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.plugins.io import CheckpointIO
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from vab.callbacks import (
        BackgroundCheckpoints,
        Dashboard,
        Meters,
        PredictionWriter,
        StepProgress,
        StopOnSignal,
        StoppedError,
    )
    from vab.callbacks.stopping import folder_of_returned_job
    from vab.data.datamodule import ShardDataModule
    from vab.engines import FSDP
    from vab.tasks import BaseTask
    from vab.tasks.base import find_checkpoint

    class Parser(OneLineErrors, LightningArgumentParser):
        """Lightning's parser, with our complaints."""

    class TrainerCommands(LightningCLI):
        """Lightning's own command line over our tasks and shards."""

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
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
            try:
                super().instantiate_classes()
            except ValueError as error:  # the parser's, about all that an argument might have been
                told = cause_of(error, UserError, MisconfigurationException)
                if told is not None:
                    raise told from error
                if cause_of(error, TypeError, LookupError, AttributeError) is not None:
                    raise  # no value that a user gave, but a mistake in a program
                raise UserError(explain(str(error).partition("\nGiven value")[0])) from error

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            settings = self._get(self.config_init, "trainer")
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
            callbacks += [Dashboard(), PredictionWriter()]
            accumulated, interval = settings.get("accumulate_grad_batches"), settings.get("val_check_interval")
            if accumulated is not None and accumulated < 1:
                raise UserError(f"--trainer.accumulate_grad_batches must be 1 or more, got {accumulated}")
            clipped = settings.get("gradient_clip_val")
            if clipped is not None and not clipped >= 0:
                raise UserError(f"--trainer.gradient_clip_val must be 0 (no clipping) or more, got {clipped}")
            if settings.get("check_val_every_n_epoch", 1) is None and isinstance(interval, int) and accumulated:
                kwargs["val_check_interval"] = interval * accumulated  # Lightning counts batches, a user steps
            if settings.get("strategy") == "fsdp":
                kwargs["strategy"] = FSDP()  # Lightning means by it torch's first one
            try:
                trainer = super().instantiate_trainer(plugins=plugins, callbacks=callbacks, **kwargs)
            except ValueError as error:  # Lightning's word for a value that no trainer takes
                raise UserError(" ".join(str(error).split())) from error
            # A run ends well when it is told to. Last, and after Lightning has looked for callbacks that save where
            # none may: this one saves only what others keep.
            trainer.callbacks.append(StopOnSignal())  # type: ignore[attr-defined]
            return trainer

        def _parse_ckpt_path(self) -> None:
            """A run is what its config says and a checkpoint is its state: neither changes the other."""
            settings = self.config[self.config.subcommand]
            path = settings.get("ckpt_path")
            if not path and self.config.subcommand != "fit":
                raise UserError(f"{self.config.subcommand} needs a trained model: --ckpt_path FILE, or a run's folder")
            if self.config.subcommand == "fit" and (
                left := folder_of_returned_job(settings.trainer.default_root_dir or ".")
            ):
                path = left
                print(f"job {os.environ['SLURM_JOB_ID']} is back: going on with the run in {left}", file=sys.stderr)
            if path:  # Lightning's "best" and "last" mean a run of the same process, which there is none of
                settings.ckpt_path = str(find_checkpoint(path))
                if settings.ckpt_path.endswith(".safetensors"):
                    raise UserError(
                        f"--ckpt_path {path} is an exported model, which has no state to go on with: give a run's "
                        "checkpoint, or begin a run with its weights: --model.init_from"
                    )
                if self.config.subcommand == "fit":
                    words = self._parser("fit").dump(settings, skip_none=False)
                    go_on_in_place(settings, Path(settings.ckpt_path), words)

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
    except StoppedError as stopped:
        if all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK")):
            print(how_to_go_on(arguments, stopped), file=sys.stderr)
        # A process that has started this one would be killed if this one failed.
        leave(0 if is_started_by_other() else stopped.exit_status)
    except RuntimeError as error:
        if not is_loss_of_a_rank(error):
            raise
        words = " ".join(str(error).split())
        raise UserError(
            f"rank {os.environ.get('RANK', os.environ.get('LOCAL_RANK', '0'))} has lost another rank, whose message, if"
            f" it could leave one, says why ({words[:_SHOWN]}): go on with --ckpt_path and the run's folder"
        ) from error


def cause_of(error: BaseException, *kinds: type[BaseException]) -> BaseException | None:
    """The first of these kinds among an error, what it was raised from, and so on; None where there is none."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, kinds):
        found = found.__cause__ or found.__context__
    return found


def go_on_in_place(settings: Any, checkpoint: Path, words: str) -> None:
    """Let a run that goes on as it began write where it did, and so be one run: one line of TensorBoard, one best.

    That is so with the config that lies beside the checkpoint, but for its end, and from where the run has come to.
    Whoever changes a setting, or goes back to an earlier checkpoint, gets a folder of its own, and nothing is lost.

    Args:
        settings: Of ``fit``; the logger's version is changed.
        checkpoint: That the run goes on with.
        words: The same settings, as they would be saved.
    """
    import torch
    from lightning.pytorch.utilities import rank_zero_info

    from vab.tasks.base import find_checkpoint, reading

    logger, folder = settings.trainer.get("logger"), checkpoint.absolute().parent.parent
    if getattr(logger, "class_path", None) != "lightning.pytorch.loggers.TensorBoardLogger":
        return
    place = logger.init_args
    home = Path(place.save_dir, place.get("name") or "", place.get("sub_dir") or "").absolute()
    saved = folder / "config.yaml"
    if place.get("version") is not None or folder.parent != home or not saved.is_file():
        return
    if find_checkpoint(folder).absolute() == checkpoint.absolute() and _but_for_its_end(words) == _but_for_its_end(
        saved.read_text()
    ):
        with reading(checkpoint):
            step = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        place.version, place.purge_step = folder.name, step  # what was logged after it is done, and shown, again
        rank_zero_info(f"going on in {folder}")


def _but_for_its_end(config: str) -> dict[str, Any]:
    """A saved config without what says where it goes on and ends."""
    import yaml

    settings: dict[str, Any] = yaml.safe_load(config)
    for name in ("max_steps", "max_epochs"):
        settings["trainer"].pop(name, None)
    logger = settings["trainer"].get("logger")
    if isinstance(logger, dict):
        for name in ("version", "purge_step"):
            logger["init_args"].pop(name, None)
    return {name: value for name, value in settings.items() if name not in ("ckpt_path", "config")}


def is_started_by_other() -> bool:
    """Whether this is a rank that the first process of its machine has started, not torchrun or SLURM."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "RANK" not in os.environ


def is_loss_of_a_rank(error: RuntimeError) -> bool:
    """Whether this is what torch says when another rank does not answer."""
    import torch.distributed

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


if __name__ == "__main__":
    main()
