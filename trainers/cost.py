"""What a computation costs, counted on tensors that have no memory: operations, bytes, seconds on this machine."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# A call through modules, autocast and autograd, in calls of the tiny addition that `measure_speed` times.
CALL_OVERHEAD = 8.0


@dataclass(frozen=True)
class Cost:
    """What a computation needs.

    Attributes:
        flops: multiplications and additions of matrix products, convolutions and attention.
        operations: calls into kernels.
        moved_bytes: read and written by all operations together.
        peak_bytes: most memory that its results held at once, beyond what was there before.
    """

    flops: float
    operations: int
    moved_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Speed:
    """What this machine does in a second, and how long it takes to call a kernel at all."""

    flops: float
    bytes: float
    seconds_per_operation: float

    def seconds(self, cost: Cost) -> float:
        """Estimate how long a computation takes on a machine that does nothing else.

        The slower of arithmetic and memory (the roofline of Williams et al. 2009, doi:10.1145/1498765.1498785), and
        `CALL_OVERHEAD` for each operation.
        """
        work = max(cost.flops / self.flops, cost.moved_bytes / self.bytes)
        return work + CALL_OVERHEAD * cost.operations * self.seconds_per_operation


def count(compute: Callable[[], object]) -> Cost:
    """Count what a computation needs without doing it.

    It runs on fake tensors: shapes, types and lifetimes are true, there are no numbers. Models may be real.
    Inputs must be made within `compute`; it must not look at values (`item`).
    """
    # Entered last, the ledger sees every call before it becomes fake.
    with FakeTensorMode(allow_non_fake_inputs=True), _Ledger() as ledger:
        compute()
    return Cost(ledger.flops, ledger.operations, ledger.moved, ledger.peak)


def measure_speed(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Speed:
    """Time a matrix product of 1024 x 1024, a large copy and a tiny addition, for so many seconds together."""
    left, right = torch.randn(2, 1024, 1024, device=device).to(dtype).unbind()
    large = torch.zeros(2**24, device=device)
    other = torch.empty_like(large)
    small = torch.zeros(8, device=device, requires_grad=True)
    product = _repeat(lambda: left @ right, device, seconds / 2)
    copy = _repeat(lambda: other.copy_(large), device, seconds / 4)
    addition = _repeat(lambda: small + 1, device, seconds / 4)
    return Speed(2 * 1024**3 / product, 2 * large.nbytes / copy, addition)


class _Ledger(TorchDispatchMode):
    """Counts operations, their arithmetic, and the bytes that live at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.operations = self.moved = self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Questions about a tensor's device and kin come by here too; a view computes nothing.
        returned = func._schema.returns
        if func.namespace != "aten" or any(
            r.alias_info is not None and not r.alias_info.is_write for r in returned
        ):
            return result
        packet = func._overloadpacket
        if packet in _ATTENTION:
            self.flops += _ATTENTION[packet](args)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.operations += 1
        self.moved += sum(tensor.nbytes for tensor in (*results, *inputs))
        changed = {id(tensor) for tensor in inputs}  # by operations in place
        for tensor in results:
            if id(tensor) not in changed:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size


def _attention_flops(args: Any) -> int:
    return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))


def _attention_backward_flops(args: Any) -> int:
    return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))


# torch's registry knows the attention kernels of GPUs alone. Queries, keys and values come first, after the gradient.
_ATTENTION: dict[Any, Callable[[Any], int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _repeat(compute: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Give the time of one call: the fastest, since what else runs on the machine only adds."""
    compute()
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
