"""How one network is trained on many devices or faster on one: sharded weights, compiled blocks.

Both work in place on a task's network and leave the names and shapes of its weights as they are, so a checkpoint of any
engine loads on any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from vab.lightning_internals import shard_over_all_ranks
from vab.spec import UserError

_STEPS = ("training_step", "validation_step", "test_step", "predict_step", "generate", "embed_audio", "embed_video")
"""Methods of tasks that use weights, besides ``forward``: each must find them whole."""


class FSDP(ModelParallelStrategy):
    """Fully sharded data parallelism (torch's FSDP2): each rank keeps its share of weights, gradients and optimizer.

    Ranks see the records that they would see under DDP. A checkpoint is one file, gathered on rank 0 and written as any
    other is, with the same content: a run may go on with another engine or another number of ranks.

    Args:
        process_group_backend: As for DDP: nccl on GPUs, gloo on CPUs where not given.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Meet the other ranks; all of them share the data."""
        shard_over_all_ranks(self)
        super().setup_environment()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """No: the weights are sharded as soon as the model is configured, and hooks run as under any strategy."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes: what is loaded is a whole file, as under any strategy."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the whole file, on each rank."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's share of the weights."""
        assert self.lightning_module is not None
        load_weights(self.lightning_module, checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's share of the optimizer's state."""
        assert self.lightning_module is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_optimizer(self.lightning_module, optimizer, state)


def shard(task: LightningModule, blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """Leave this rank its share of each weight; once.

    A block is gathered for its turn and let go after it; what belongs to no block is gathered for a whole step.

    Args:
        task: Whose weights.
        blocks: Its large parts, used one after the other.
        mesh: The ranks, one axis.
    """
    if is_sharded(task):
        return
    # Weights and inputs keep their types: autocast sees what it sees under DDP, and the results are the same.
    as_they_are = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=as_they_are)
    scalars = {parameter for parameter in task.parameters() if parameter.ndim == 0}  # frozen ones: others are refused
    fully_shard(task, mesh=mesh, mp_policy=as_they_are, reshard_after_forward=True, ignored_params=scalars)
    for name in _STEPS:
        if callable(getattr(task, name, None)):
            register_fsdp_forward_method(task, name)


def is_sharded(module: nn.Module) -> bool:
    """Whether a rank has only a share of the weights, so that all ranks must use the network at once."""
    return isinstance(module, FSDPModule)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> None:
    """``load_state_dict`` of whole weights into a network that may be sharded, from what each rank has itself."""
    if not is_sharded(module):
        module.load_state_dict(weights, strict=strict)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # half a second

    set_model_state_dict(module, dict(weights), options=StateDictOptions(full_state_dict=True, strict=strict))


def load_optimizer(module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """``load_state_dict`` of a whole optimizer's state for sharded weights.

    The numbers by which a file calls weights are no more than labels, others under each engine: what counts is their
    place in the parameter groups, as it does for torch.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict  # half a second

    names = {parameter: name for name, parameter in module.named_parameters()}
    called = {
        number: names[parameter]
        for theirs, mine in zip(state["param_groups"], optimizer.param_groups, strict=True)
        for number, parameter in zip(theirs["params"], mine["params"], strict=True)
    }
    by_name: dict[str, Any] = {
        "state": {called[number]: values for number, values in state["state"].items()},
        "param_groups": [
            group | {"params": [called[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }
    set_optimizer_state_dict(module, optimizer, by_name, options=StateDictOptions(full_state_dict=True))


def whole(tensor: Tensor) -> Tensor:
    """A weight or gradient as every rank together has it; all ranks must ask for it at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a weight: memory shared, so writing to it changes the weight."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_share(whole_tensor: Tensor, like: Tensor) -> Tensor:
    """What this rank would keep of a whole tensor if it were divided as ``like`` is."""
    if not isinstance(like, DTensor):
        return whole_tensor
    where = whole_tensor.to(like.device)
    return distribute_tensor(where, like.device_mesh, like.placements, src_data_rank=None).to_local()


def compile_blocks(blocks: list[nn.Module], backend: str) -> None:
    """Compile a network's blocks in place, at their first use; blocks of a kind share what was compiled.

    Where that fails, all of them go on as they are, and one line says why.

    Args:
        blocks: Modules. Names of their weights stay.
        backend: torch.compile's, ``inductor`` for speed.

    Raises:
        UserError: If torch knows no such backend.
    """
    failed: list[str] = []
    for block in blocks:
        if block._compiled_call_impl is None:
            block._compiled_call_impl = _compiled_or_eager(block, backend, failed)


def _compiled_or_eager(block: nn.Module, backend: str, failed: list[str]) -> Callable[..., Any]:
    from torch._dynamo.exc import InvalidBackend, TorchDynamoException

    try:
        compiled = torch.compile(block._call_impl, backend=backend)
    except InvalidBackend as error:
        known = ", ".join(torch._dynamo.list_backends())
        raise UserError(f"--model.compile: torch has no backend {backend!r}; true, or one of {known}") from error

    def call(*args: Any, **kwargs: Any) -> Any:
        if not failed:
            try:
                return compiled(*args, **kwargs)
            except TorchDynamoException as error:  # raised while compiling: nothing has been computed
                reason = " ".join(str(error).partition("\n\n")[0].split())  # what comes after is advice
                failed.append(reason)
                rank_zero_info(f"torch.compile ({backend}) failed, training goes on without it: {reason}")
        return block._call_impl(*args, **kwargs)

    return call
