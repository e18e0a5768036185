"""A GPU that is not there: it computes on the CPU, refuses to mix devices, and counts tasks and waits.

Its device is called "meta", the only one besides the CPU that every build of torch has. What would wait for a GPU is
known by operation: those whose result has a size that only the values tell, those that give a number to Python, and
copies between CPU and GPU that were not asked to be non-blocking. What such a copy brings is there only after `finish`.
It cannot tell pinned memory from other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchvision  # noqa: F401  (its operations are known to torch then)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("meta")
aten = torch.ops.aten

ASKING = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    torch.ops.torchvision.nms.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
JOINING = {aten.cat.default, aten.stack.default}


class OnGPU(Tensor):
    """A tensor of the pretended GPU; `inner` is the one of the CPU that has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        tensor: OnGPU = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a tensor on the pretended GPU, outside of it")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()


class PretendGPU(TorchDispatchMode):
    """While it lasts, tensors can be moved to `GPU` and computed with there.

    Attributes:
        waits: the operations that would have waited, in order.
        tasks: operations that a GPU would have been given, all but views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.tasks = 0
        self._on_their_way: list[tuple[Tensor, Tensor]] = []

    def finish(self) -> None:
        """Wait for all copies that were asked not to."""
        self.waits.append("finish")
        for copy, values in self._on_their_way:
            copy.copy_(values)
        self._on_their_way.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = kwargs.get("device")
        here = any(isinstance(t, OnGPU) for t in tensors)
        goes_here = here if target is None else torch.device(target) == GPU
        if not here and not goes_here:
            return func(*args, **kwargs)
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        if _waits(func, tensors, args, kwargs, goes_here):
            self.waits.append(func.overloadpacket._qualified_op_name)
        if not func.is_view:
            self.tasks += 1
        if target is not None:
            kwargs["device"] = "cpu"
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if not goes_here:
            if kwargs.get("non_blocking"):
                self._on_their_way.append((result, result.clone()))
                result.zero_()
            return result
        own = {id(t.inner): t for t in tensors if isinstance(t, OnGPU)}  # what is written in place stays what it was
        return tree_map(lambda x: own.get(id(x), OnGPU(x)) if isinstance(x, Tensor) else x, result)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnGPU) else x


def _waits(func: Any, tensors: Sequence[Tensor], args: Any, kwargs: dict[str, Any], goes_here: bool) -> bool:
    crosses = len({isinstance(t, OnGPU) for t in tensors} | {goes_here}) > 1
    if func is aten._to_copy.default:
        return crosses and not kwargs.get("non_blocking")
    if func is aten.copy_.default:
        return crosses and not (len(args) > 2 and args[2])
    indices = [i for i in args[1] if i is not None] if func in INDEXING else []
    numbers = func not in JOINING  # of the CPU are taken by what works entry by entry
    for t in tensors:
        if not isinstance(t, OnGPU) and not any(t is i for i in indices) and not (numbers and t.ndim == 0):
            raise RuntimeError(f"{func} mixes devices, or has a tensor that new_tensor made: that waits for a GPU")
    if func in INDEXING:
        return any(i.dtype == torch.bool or not isinstance(i, OnGPU) for i in indices)
    return func in ASKING and kwargs.get("output_size") is None


def move(model: nn.Module) -> None:
    """Parameters and buffers onto the pretended GPU."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = OnGPU(tensor.detach())
