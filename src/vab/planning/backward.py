"""The backward pass in Python, for tensors on a device that has no driver on this machine.

Autograd's engine starts a thread for each device and asks its driver, which fails for fake or pretended CUDA tensors.
The graph that the forward pass records is complete all the same, and its nodes can be called from Python.
"""

from __future__ import annotations

import heapq
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_walks = itertools.count(1)


@contextmanager
def backward_in_python() -> Iterator[None]:
    """Let ``loss.backward()`` and ``torch.autograd.backward`` run `backward`, also where a trainer calls them."""

    def run(tensors: Any, grad_tensors: Any = None, *rest: Any, **options: Any) -> None:
        if any(value not in (None, False) for value in (*rest, *options.values())):
            raise NotImplementedError("the backward pass in Python takes a tensor and its gradient only")
        tensor, gradient = (x[0] if isinstance(x, (list, tuple)) else x for x in (tensors, grad_tensors))
        backward(tensor, gradient)

    with mock.patch.object(torch.autograd, "backward", run):
        yield


@torch.no_grad()
def backward(tensor: Tensor, gradient: Tensor | None = None) -> None:
    """Add the gradient of ``tensor`` to ``grad`` of every leaf, as ``tensor.backward()`` does, bit for bit.

    Nodes run in the engine's order. What a node saved is freed once it has run, so the live bytes are the engine's too;
    for that, ``tensor`` is detached from its graph. Hooks run for leaves only: other nodes hide theirs from Python.

    Args:
        tensor: The root of the graph, usually the loss.
        gradient: Its gradient. None: 1, for a scalar.

    Raises:
        RuntimeError: If ``tensor`` has no graph or not one element, a gradient has another device than its tensor, or
            the graph was used before.
    """
    root = tensor.grad_fn
    if root is None:
        raise RuntimeError("backward: the tensor has no graph")
    if gradient is None:
        if tensor.numel() != 1:
            raise RuntimeError(f"backward: a tensor of shape {tuple(tensor.shape)} needs a gradient")
        gradient = torch.ones_like(tensor)
    edges = _incoming_edges(root)
    gradients: dict[Any, list[Any]] = {root: [None] * len(root._input_metadata)}
    gradients[root][tensor.output_nr] = gradient
    del gradient
    # A node of a Python function is alive only as long as a node of C++ leads to it: one is kept for each.
    with torch.enable_grad():
        owners: dict[Any, Any] = {root: tensor.view_as(tensor).grad_fn}
    tensor.detach_()
    # The engine's order: the node that was recorded last first, and a leaf as soon as its gradient is complete.
    ready = [(-root._sequence_nr(), 0, root)]
    del root
    order = itertools.count(1)
    # Activation checkpointing recomputes a block once for each backward pass, which it tells apart by this number.
    this_walk = itertools.repeat(next(_walks))
    with mock.patch.object(torch._C, "_current_graph_task_id", this_walk.__next__):
        while ready:
            node = heapq.heappop(ready)[2]
            outputs = _run(node, gradients.pop(node))
            for number, (child, index) in enumerate(node.next_functions):
                if child is None:
                    continue
                gradients.setdefault(child, [None] * len(child._input_metadata))
                if (grad := outputs[number]) is not None:
                    outputs[number] = _as_expected(grad, child._input_metadata[index])
            grad = None
            _free_saved_tensors(node)
            owner = owners.pop(node) if _is_python(node) else node
            del edges[node]
            for number, (child, index) in enumerate(node.next_functions):
                if child is not None:
                    grad, outputs[number] = outputs[number], None
                    if grad is not None:
                        _add(gradients[child], index, grad)
                    grad = None
                    if _is_python(child):
                        owners[child] = owner
                    edges[child] -= 1
                    if not edges[child]:
                        heapq.heappush(ready, (-child._sequence_nr(), next(order), child))
            del node, owner
            child = None


def _is_python(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _incoming_edges(root: Any) -> Counter[Any]:
    """The number of edges into each node that can be reached from the root, which has none."""
    edges: Counter[Any] = Counter({root: 0})
    waiting = [root]
    while waiting:
        for child, _ in waiting.pop().next_functions:
            if child is not None:
                if child not in edges:
                    waiting.append(child)
                edges[child] += 1
    return edges


def _run(node: Any, grads: list[Any]) -> list[Any]:
    """Gradients of a node's inputs, given those of its outputs. ``grads`` is emptied."""
    if hasattr(node, "variable"):  # AccumulateGrad: a leaf
        if grads[0] is not None:
            _accumulate(node.variable, grads)
        return []
    if _is_python(node):  # written in Python: never gets None by default
        for number, meta in enumerate(node._input_metadata):
            if grads[number] is None:
                grads[number] = torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)
        outputs = node.apply(*grads)
    else:
        outputs = node(*grads)
    grads.clear()
    return list(outputs) if isinstance(outputs, Sequence) else [outputs]


def _free_saved_tensors(node: Any) -> None:
    """Free what a node saved for the backward pass. Using the node again raises an error, as after the engine."""

    def used_before(_: Any) -> Tensor:
        raise RuntimeError("backward: the graph was used before, and what it saved is freed")

    for name in dir(node):
        if name.startswith("_raw_saved_"):
            saved = getattr(node, name)
            for one in saved if isinstance(saved, (tuple, list)) else [saved]:
                with suppress(RuntimeError):  # nothing is saved, or activation checkpointing holds it, and frees it
                    one.register_hooks(lambda _: None, used_before)  # which replaces the tensor by None


def _as_expected(grad: Tensor, meta: Any) -> Tensor:
    """Reduce a gradient to the shape and cast it to the dtype of the tensor that it belongs to."""
    if grad.device != meta.device:
        raise RuntimeError(f"a gradient is on {grad.device}, its tensor on {meta.device}")
    if grad.shape != meta.shape:
        grad = grad.sum_to_size(meta.shape)
    return grad.to(meta.dtype)


def _add(held: list[Any], index: int, grad: Tensor) -> None:
    """Add a gradient to the sum of a node, in place if nothing else uses the sum's memory."""
    if held[index] is None:
        held[index] = grad
    elif _is_only_here(held, index) and _has_own_memory(held[index]):
        held[index].add_(grad)
    else:
        held[index] = held[index] + grad


def _has_own_memory(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    users = torch._C._storage_Use_Count(storage._cdata) - 1  # without the object `storage`
    return users == 1 and tensor.nbytes == storage.nbytes()


def _references(held: list[Any], index: int) -> int:
    return sys.getrefcount(held[index])


_ONE_REFERENCE = _references([object()], 0)  # it depends on the version of Python


def _is_only_here(held: list[Any], index: int) -> bool:
    """Whether nothing but this list refers to a tensor, in Python or in C++."""
    return _references(held, index) <= _ONE_REFERENCE and held[index]._use_count() == 1


def _accumulate(leaf: Tensor, grads: list[Any]) -> None:
    """Add the gradient in ``grads``, which is emptied, to that of a leaf."""
    for hook in (leaf._backward_hooks or {}).values():
        replaced = hook(grads[0])
        grads[0] = grads[0] if replaced is None else replaced
    # The engine keeps the tensor itself if nothing else refers to it and its memory has the leaf's layout.
    is_ours = _is_only_here(grads, 0)
    grad = grads.pop()
    if leaf.grad is not None:
        leaf.grad += grad
    else:
        leaf.grad = grad.detach() if is_ours and grad.stride() == leaf.stride() else torch.empty_like(leaf).copy_(grad)
    for hook in (leaf._post_accumulate_grad_hooks or {}).values():
        hook(leaf)
