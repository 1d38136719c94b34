"""How a task is optimised: parameter groups, the learning-rate schedule, and a config's changes on resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from vab.spec import UserError

_HOW = ("fused", "foreach", "capturable", "differentiable")
"""Settings of optimizers that do not change the result of a step."""


def made_optimizer(make: Callable[[Iterable], Optimizer], parameters: Iterable) -> Optimizer:
    """Create an optimizer.

    Raises:
        UserError: If it refuses its arguments, by any of three kinds of error.
    """
    try:
        return make(parameters)
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"--model.optimizer cannot be made: {' '.join(str(error).split())}") from error


def decay_groups(module: nn.Module, lr_factor: Callable[[str], float] = lambda name: 1.0) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; norms, biases and learned vectors (stacked ones too) do not.

    Args:
        module: Whose parameters; frozen ones are left out.
        lr_factor: Name of a parameter to what its learning rate is multiplied by, ``lr_factor`` of its group.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim < 2 or name.rpartition(".")[2] in ("modality", "mask_code")
            groups.setdefault((lr_factor(name), is_vector), []).append(parameter)
    return [
        {"params": parameters, "lr_factor": factor} | ({"weight_decay": 0.0} if is_vector else {})
        for (factor, is_vector), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def steps_of_warmup(warmup: int | float, end: int) -> int:
    """The steps of a warm-up that is given in steps, or as a share of the schedule, below 1.

    Raises:
        UserError: If it does not end before the schedule.
    """
    steps = round(warmup * end) if warmup < 1 else int(warmup)
    if steps >= end:
        raise UserError(
            f"warmup_steps {warmup} must be below the schedule's {end} steps: lower --model.warmup_steps, give it as a"
            " share (0.05), or raise --trainer.max_steps"
        )
    return steps


def linear_warmup_decay(warmup: int, end: int, final: float) -> Callable[[int], float]:
    """Learning-rate factor: 0 to 1 over ``warmup`` steps, then down to ``final`` at step ``end``, and level after.

    A function, not an object: schedulers save objects, which would override a resumed run's config.

    Args:
        warmup: Steps of the rise.
        end: Step at which the fall ends.
        final: Factor from there on.

    Returns:
        Factor for the update after a number of updates; the first update is already above 0.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        left = max(0.0, (end - step) / max(1, end - warmup))
        return final + (1 - final) * left

    return factor


def take_settings(checkpoint: dict[str, Any], optimizer: Optimizer) -> list[str]:
    """Replace the settings of a checkpoint's optimizer by those of the config, which made ``optimizer``.

    torch restores settings with the state, and would silently ignore a new learning rate. Learning rates keep their
    place in the schedule.

    Returns:
        Descriptions of the changes.
    """

    def listed(value: Any) -> Any:
        return [*value] if isinstance(value, tuple) else value

    changes: dict[str, None] = {}
    for state in checkpoint.get("optimizer_states", [])[:1]:
        if len(state["param_groups"]) != len(optimizer.param_groups):
            return []  # another network: torch raises an error
        for saved, made in zip(state["param_groups"], optimizer.param_groups, strict=True):
            top = saved.get("initial_lr", saved["lr"])
            settings = {name: value for name, value in made.items() if name not in ("params", "lr")}
            lr = made["lr"] * made["lr_factor"]
            if lr != top:
                changes[f"lr: {top:g} -> {lr:g}"] = None
                settings |= {"lr": saved["lr"] * lr / top if top else lr, "initial_lr": lr}
            changes |= {
                f"{name}: {saved.get(name)} -> {value}": None
                for name, value in settings.items()
                if name not in ("lr", "initial_lr", "lr_factor", *_HOW) and listed(saved.get(name)) != listed(value)
            }
            saved |= settings
        for schedule in checkpoint.get("lr_schedulers", [])[:1]:
            schedule["base_lrs"] = [group.get("initial_lr", group["lr"]) for group in state["param_groups"]]
    return [*changes]
