"""Engines of training: sharded weights over many devices, compiled blocks on one.

Both change a task's network in place and keep the names and shapes of its weights, so a checkpoint of any engine loads
on any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
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
"""Methods of tasks that use weights, besides ``forward``: FSDP gathers the weights for each."""


class FSDP(ModelParallelStrategy):
    """Fully sharded data parallelism (torch's FSDP2): each rank keeps its share of weights, gradients and optimizer.

    Each rank gets the same records as under DDP. A checkpoint is gathered on rank 0 and written as one file with the
    same content, so a run may resume with another engine or another number of ranks.

    Args:
        process_group_backend: As for DDP. Default: nccl on GPUs, gloo on CPUs.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Connect to the other ranks and shard over all of them."""
        shard_over_all_ranks(self)
        super().setup_environment()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False: the weights are sharded when the model is configured, and hooks run as under any strategy."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: a checkpoint is one file, as under any strategy."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file, on each rank."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's share of the weights."""
        assert self.lightning_module is not None
        load_weights(self.lightning_module, checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's share of the optimizer's state."""
        assert self.lightning_module is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_optimizer(self.lightning_module, optimizer, state)


def shard(
    task: LightningModule, blocks: list[nn.Module], mesh: DeviceMesh, product_dtype: torch.dtype | None = None
) -> None:
    """Shard the weights of a task, if they are not sharded yet.

    A block is gathered when it runs and freed after that; other weights are gathered for a whole step.

    Args:
        task: The task.
        blocks: Its large parts, which run one after the other.
        mesh: The ranks, one axis.
        product_dtype: The dtype of autocast, if it is on: weights of blocks are cast to it before they are gathered.
            Autocast would cast the gathered weights, and keep a whole copy of the network for the backward pass.
            Gradients are summed in float32. All other weights are gathered in float32.
    """
    if is_sharded(task):
        return
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # as under DDP: autocast chooses the inputs' dtypes
    in_blocks = (
        policy if product_dtype is None else replace(policy, param_dtype=product_dtype, reduce_dtype=torch.float32)
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=in_blocks)
    # Frozen scalars cannot be sharded; the task refuses trained ones.
    scalars = {parameter for parameter in task.parameters() if parameter.ndim == 0}
    fully_shard(task, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=scalars)
    for name in _STEPS:
        if callable(getattr(task, name, None)):
            register_fsdp_forward_method(task, name)


def is_sharded(module: nn.Module) -> bool:
    """Whether this rank has only a share of the weights, so that all ranks must run the network together."""
    return isinstance(module, FSDPModule)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> None:
    """``load_state_dict`` of whole weights, which each rank has, into a network that may be sharded."""
    if not is_sharded(module):
        module.load_state_dict(weights, strict=strict)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # half a second

    set_model_state_dict(module, dict(weights), options=StateDictOptions(full_state_dict=True, strict=strict))


def load_optimizer(module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """``load_state_dict`` of a whole optimizer's state for sharded weights.

    The numbers of weights in a checkpoint differ between engines. As in torch, a weight is identified by its place in
    the parameter groups.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict  # half a second

    names = {parameter: name for name, parameter in module.named_parameters()}
    name_of = {
        number: names[parameter]
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
        for number, parameter in zip(saved["params"], own["params"], strict=True)
    }
    by_name: dict[str, Any] = {
        "state": {name_of[number]: values for number, values in state["state"].items()},
        "param_groups": [
            group | {"params": [name_of[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }
    set_optimizer_state_dict(module, optimizer, by_name, options=StateDictOptions(full_state_dict=True))


def whole(tensor: Tensor) -> Tensor:
    """The whole of a weight or gradient that may be sharded; all ranks must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a weight; it shares memory, so writing to it changes the weight."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_share(whole_tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a whole tensor, if it is divided as ``like`` is."""
    if not isinstance(like, DTensor):
        return whole_tensor
    moved = whole_tensor.to(like.device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None).to_local()


def compile_blocks(blocks: list[nn.Module], backend: str) -> None:
    """Compile a network's blocks in place, at their first use; blocks of a kind share the compiled code.

    Each form of inputs is compiled once: shape of the batch, mask or none, with or without gradient. After eight forms
    of a kind of block torch compiles no more, so give all batches one form; `uncompiled` is for the others.

    If compilation fails, all blocks run uncompiled, and one line says why.

    Args:
        blocks: Modules. The names of their weights do not change.
        backend: Of torch.compile: ``inductor`` for speed.

    Raises:
        UserError: If torch has no such backend.
    """
    failed: list[str] = []
    for block in blocks:
        if block._compiled_call_impl is None:
            block._compiled_call_impl = _compiled_or_eager(block, backend, failed)


def uncompiled(blocks: list[nn.Module]) -> AbstractContextManager[Any]:
    """Context in which blocks run as if `compile_blocks` had not compiled them."""
    if all(block._compiled_call_impl is None for block in blocks):
        return nullcontext()  # setting the compiler's mode would import the compiler, which takes a second
    return torch.compiler.set_stance("force_eager")


def _compiled_or_eager(block: nn.Module, backend: str, failed: list[str]) -> Callable[..., Any]:
    from torch._dynamo.exc import InvalidBackend, TorchDynamoException

    try:
        compiled = torch.compile(block._call_impl, backend=backend, dynamic=False)
    except InvalidBackend as error:
        known = ", ".join(torch._dynamo.list_backends())
        raise UserError(f"--model.compile: torch has no backend {backend!r}; true, or one of {known}") from error

    def call(*args: Any, **kwargs: Any) -> Any:
        if not failed:
            try:
                return compiled(*args, **kwargs)
            except TorchDynamoException as error:  # raised before anything is computed
                reason = " ".join(str(error).partition("\n\n")[0].split())  # the rest is advice
                failed.append(reason)
                rank_zero_info(f"torch.compile ({backend}) failed, training continues without it: {reason}")
        return block._call_impl(*args, **kwargs)

    return call
