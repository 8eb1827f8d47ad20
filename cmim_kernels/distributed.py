"""One loss over the batches of all ranks: the rows are gathered, each rank's own rows carry the gradient.

With reductions over all rows the path through the centroids cancels in the gradient (docs/math.md), so that
the gradient of the global loss in a rank's own rows is exact although the other ranks' rows are constants to
it.
"""

from __future__ import annotations

import pickle
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .autograd import needs_reference
from .tensors import LOGIT_DTYPES


def gather_batch(
    logits: Tensor, target: Tensor, ignore_index: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The batches of all W ranks of `group`: logits (W n, C), target (W n,), n = the largest row count.

    They lie in the order of the ranks. Shorter batches are filled up with rows to ignore. Gradients reach
    this rank's own rows only, W times as large: DistributedDataParallel averages over the ranks, where the
    global loss needs the sum of every rank's share. Every rank has to call this; exchanging the shapes makes
    the host wait for the device.

    Args:
        logits: (n, C) of this rank, in one of `LOGIT_DTYPES`; ranks may differ in n.
        target: (n,) int64.
        ignore_index: the target of the rows that fill up.
        group: the ranks that share the batch.

    Raises:
        TypeError: `group` is no process group.
        ValueError: the ranks' logits differ in C or dtype; raised on all of them.
        RuntimeError: torch.distributed is not initialised, or this process is not in `group`; or a transform
            of `torch.func` or forward-mode differentiation is going on.
    """
    if needs_reference():
        raise RuntimeError("process_group works by backward() only, not under torch.func or forward-mode AD")
    if not dist.is_initialized():
        raise RuntimeError("process_group needs torch.distributed to be initialised in this process")
    rank, world = dist.get_rank(checked_group(group)), dist.get_world_size(group)
    if rank < 0:
        raise RuntimeError("process_group does not contain this process")
    rows, classes = logits.shape
    own = [rows, classes, LOGIT_DTYPES.index(logits.dtype)]
    all_own = [torch.zeros(3, dtype=torch.int64, device=logits.device) for _ in range(world)]
    dist.all_gather(all_own, all_own[0].new_tensor(own), group=group)
    each = [shape.tolist() for shape in all_own]
    if any(other[1:] != own[1:] for other in each):
        came = ", ".join(f"{LOGIT_DTYPES[dtype]} ({n}, {c})" for n, c, dtype in each)
        raise ValueError(
            f"logits must have the same classes and dtype on every rank of process_group, got {came}"
        )
    missing = max(n for n, _, _ in each) - rows
    own_logits = torch.nn.functional.pad(logits, (0, 0, 0, missing)).contiguous()
    own_target = torch.nn.functional.pad(target, (0, missing), value=ignore_index).contiguous()
    all_logits = [torch.empty_like(own_logits) for _ in range(world)]
    all_target = [torch.empty_like(own_target) for _ in range(world)]
    dist.all_gather(all_logits, own_logits.detach(), group=group)
    dist.all_gather(all_target, own_target, group=group)
    all_logits[rank] = _GradientTimes.apply(own_logits, float(world))
    return torch.cat(all_logits), torch.cat(all_target)


def checked_group(group: object) -> dist.ProcessGroup:
    """A process group, or what `torch.distributed.new_group` returns outside of it."""
    if not isinstance(group, dist.ProcessGroup) and group is not dist.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    return cast(dist.ProcessGroup, group)


class GroupHolder:
    """The process group of a module: its copies share it, and no pickle can hold it."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = None if group is None else checked_group(group)

    def __deepcopy__(self, memo: object) -> GroupHolder:
        return GroupHolder(self.group)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is not None:
            raise pickle.PicklingError(
                "a module with a process_group cannot be pickled: save its state_dict(), or set its "
                "process_group to None before"
            )
        return GroupHolder, (None,)

    @staticmethod
    def attribute() -> Any:
        """`process_group` of a module that has its holder in `_group`."""

        def read(module: Any) -> dist.ProcessGroup | None:
            holder: GroupHolder = module._group
            return holder.group

        def write(module: Any, group: dist.ProcessGroup | None) -> None:
            module._group = GroupHolder(group)

        return property(read, write)


class _GradientTimes(torch.autograd.Function):
    """The identity, with a gradient multiplied by a number, which cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Once.apply(grad * ctx.factor), None


class _Once(torch.autograd.Function):
    """The identity, without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "process_group: the gradient cannot be differentiated again, since it depends on the other "
            "ranks' rows, which are constants here"
        )
