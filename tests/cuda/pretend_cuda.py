"""Pretend CUDA: tensors that say ``cuda:0`` and hold their values in main memory, so that GPU code runs without a GPU.

As on a GPU, mixing devices raises and ``.numpy()`` raises. Whatever makes the host wait for the device is counted by
kind and source line. Everything counted here is a count, never a time. ``pretend_runs.py`` runs ``vab`` on it.
"""

import sys
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOT = f"{Path(__file__).parents[2]}/"
waits: Counter[str] = Counter()
"""``KIND at FILE:LINE`` -> how often the host waited there."""
_sync_debug_mode = ["default"]

WAITING = {  # operators that read a value or the size of their result on the host
    "_local_scalar_dense": "item", "is_nonzero": "item", "equal": "item", "nonzero": "nonzero",
    "masked_select": "nonzero", "_unique2": "unique", "unique_dim": "unique", "unique_consecutive": "unique",
    "bincount": "bincount", "multinomial": "multinomial", "_linalg_eigh": "linalg", "_linalg_svd": "linalg",
    "_linalg_check_errors": "linalg",
}  # fmt: skip
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
FACTORIES = (
    aten.empty.memory_format, aten.empty_strided.default, aten.arange.default, aten.arange.start,
    aten.arange.start_step, aten.hann_window.default, aten.hann_window.periodic, aten.triu_indices.default,
)  # fmt: skip
UNDIVIDED = (aten.stft.default, aten.stft.center, aten.lstm.input)  # in parts they would need a GPU's own kernels


class PretendTensor(torch.Tensor):
    """A tensor on ``cuda:0`` whose values are in ``inner``, a tensor in main memory."""

    @staticmethod
    def __new__(cls, inner):
        if inner.is_conj():  # operators below autograd see the memory only
            inner = inner.conj().conj_physical()
        if inner.is_neg():
            inner = inner._neg_view().neg()
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=CUDA,
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"PretendTensor({self.inner})"

    def __deepcopy__(self, memo):
        with torch.no_grad():
            copy = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy)
        memo[id(self)] = copy
        return copy.requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol):  # a saved file holds the values as torch.load(map_location="cpu") reads them
        count("copy to host")
        return self.detach().inner.__reduce_ex__(protocol)

    def tolist(self):
        count("copy to host")
        return self.detach().inner.tolist()

    def untyped_storage(self):  # one for a tensor and its views
        return self.inner.untyped_storage()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy
    data = property(torch.Tensor.detach, lambda self, value: setattr(self, "inner", value.inner))


class PretendEvent:
    """A mark in time, as ``torch.cuda.Event(enable_timing=True)`` is one in a stream."""

    def __init__(self, **_):
        self.seconds = 0.0

    def record(self, *_):
        self.seconds = time.perf_counter()

    def elapsed_time(self, end):
        return 1000 * (end.seconds - self.seconds)


def count(kind):
    """Count a wait at the innermost line of vab or bench, and at that of another package if that asked for it."""
    if _sync_debug_mode == ["warn"] and kind != "synchronize":
        warnings.warn("called a synchronizing CUDA operation", stacklevel=3)
    frame, package = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith((f"{ROOT}src/", f"{ROOT}bench/")):
            waits[f"{kind} at {file.removeprefix(ROOT).removeprefix('src/')}:{frame.f_lineno}{package}"] += 1
            return
        if not package and "/site-packages/" in file and "/site-packages/torch/" not in file:
            package = f" through {file.partition('/site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    waits[f"{kind} elsewhere{package}"] += 1


def _dispatch(func, args, kwargs):
    name = func._schema.name.removeprefix("aten::")
    if func not in UNDIVIDED and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    ):
        return func.decompose(*args, **kwargs)  # only inference mode brings these here
    if name == "_to_copy":
        return _to_copy(*args, **kwargs)
    if name == "copy_":
        return _copy(*args, **kwargs)
    leaves, structure = tree_flatten((args, kwargs))
    pretended = [x for x in leaves if type(x) is PretendTensor]
    if sum(isinstance(x, torch.Tensor) for x in leaves) > len(pretended):
        _require_one_device(func, name, args, kwargs)
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
    if name in WAITING:
        count(WAITING[name])
    if name in INDEXING:
        _count_index(*args)
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        count("repeat_interleave")

    inner = [x.inner if type(x) is PretendTensor else CPU if isinstance(x, torch.device) else x for x in leaves]
    inner_args, inner_kwargs = tree_unflatten(inner, structure)
    made = func(*inner_args, **inner_kwargs)
    given = {id(x.inner): x for x in pretended}
    for x in pretended if func._schema.is_mutable else ():
        if x.shape != x.inner.shape:
            raise NotImplementedError(f"{func} resizes a tensor in place")
    # An operator that writes to an argument gives that very tensor back. A view is an inference tensor if its base is.
    with torch.inference_mode(torch.is_inference_mode_enabled() and all(x.is_inference() for x in pretended)):
        return tree_map_only(torch.Tensor, lambda x: given[id(x)] if id(x) in given else PretendTensor(x), made)


def _to_copy(source, *, device=None, non_blocking=False, pin_memory=None, **kwargs):
    """Copy a pretended tensor. Others are copied to the device by ``empty_strided`` and ``copy_``."""
    copy = aten._to_copy.default(source.inner, **kwargs)
    if device is None or torch.device(device).type == "cuda":
        return PretendTensor(copy)
    if not non_blocking:  # else torch copies to pinned memory
        count("copy to host")
    return copy


def _copy(target, source, non_blocking=False):
    to_cuda, from_cuda = (type(x) is PretendTensor for x in (target, source))
    (target.inner if to_cuda else target).copy_(source.inner if from_cuda else source)
    if not from_cuda:
        pinned = getattr(source.untyped_storage(), "is_pretended_pinned", False)
        if not (non_blocking and pinned):
            count("copy from host" if pinned else "copy from pageable memory")
    elif not to_cuda and not non_blocking:
        count("copy to host")
    return target


def _require_one_device(func, name, args, kwargs):
    """Raise as CUDA does: a tensor in main memory is refused unless it is a single number or an index."""
    arguments = [*args, *kwargs.values()]
    if name in INDEXING:
        arguments.pop(1)
    is_written = func._schema.is_mutable and isinstance(args[0], torch.Tensor) and type(args[0]) is not PretendTensor
    for argument in arguments:
        for x in tree_leaves(argument):
            on_host = isinstance(x, torch.Tensor) and type(x) is not PretendTensor
            if on_host and (x.dim() or is_written or isinstance(argument, (list, tuple))):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    f"({func})"
                )


def _count_index(tensor, indices, value=None, *_):
    indices = [x for x in indices if x is not None]
    by_mask = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
    if by_mask and not (value is not None and value.numel() == 1 and len(indices) == 1):  # that is masked_fill
        count("boolean index")
    if any(type(x) is not PretendTensor for x in indices):
        count("copy from pageable memory")


def _make(factory, *args, device=None, pin_memory=None, **kwargs):
    return PretendTensor(factory(*args, device=CPU, **kwargs))


def _run_undivided(func, *args, **kwargs):
    if torch.is_grad_enabled() and any(x.requires_grad for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)):
        raise NotImplementedError(f"{func} has no gradient on pretended CUDA")
    return _dispatch(func, args, kwargs)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """Attention as matrix products: the choice of a kernel would ask the driver."""
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        raise RuntimeError(f"Expected attn_mask dtype to be bool or {query.dtype}, got {attn_mask.dtype}")
    return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, **options)[0]


def _pin_memory(tensor, *_):
    if type(tensor) is PretendTensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    copy = tensor.clone()
    copy.untyped_storage().is_pretended_pinned = True
    return copy


def install():
    """Give this process its pretended GPU, for good. A GPU of this machine must be hidden from torch."""
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects, as on a GPU
    torch.backends.cudnn.enabled = False
    library = install.library = torch.library.Library("aten", "IMPL")  # what it registers ends with it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for factory in FACTORIES:
            library.impl(factory, partial(_make, factory), "CUDA", allow_override=True)
        for operator in UNDIVIDED:
            library.impl(operator, partial(_run_undivided, operator), "AutogradCUDA", allow_override=True)
        library.impl("scaled_dot_product_attention", _attention, "AutogradCUDA", allow_override=True)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "Pretend GPU",
        "get_device_capability": (9, 0), "is_bf16_supported": True, "max_memory_allocated": 0, "memory_allocated": 0,
        "max_memory_reserved": 0, "memory_stats": {}, "get_rng_state_all": [], "mem_get_info": (80 << 30, 80 << 30),
        "is_current_stream_capturing": False,
    }  # fmt: skip
    nothing = (
        "_lazy_init init set_device empty_cache reset_peak_memory_stats manual_seed manual_seed_all set_rng_state_all"
    )
    for name, answer in (answers | dict.fromkeys(nothing.split())).items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    torch.cuda.set_sync_debug_mode = lambda mode: _sync_debug_mode.__setitem__(0, mode)
    torch.cuda.Event = PretendEvent
    torch.cuda.synchronize = lambda *_: count("synchronize")
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda *_: CUDA
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.set_device_index = lambda *_: None
    torch.Tensor.pin_memory = _pin_memory
    from vab.planning.backward import backward_in_python

    install.backward = backward_in_python()
    install.backward.__enter__()
