"""Gradients of 16 bits, summed over ranks in float32 under DDP.

In: a bucket of gradients of this rank, from torch's reducer.  Here: :func:`mean_in_float32`.  Next: the
optimizer.  DeepSpeed does the same by itself (``communication_data_type``).

Annotations are no strings in this file: torch compares that of the bucket with the class.
"""

import torch
import torch.distributed as dist


def mean_in_float32(
    group: dist.ProcessGroup | None, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """DDP's hook for a bucket: its mean over ``group``, summed in float32 and rounded once."""
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    gradients = bucket.buffer()
    wide = gradients.float().div_(group.size())  # divided first, as DDP does it by itself
    work = dist.all_reduce(wide, group=group, async_op=True)
    assert work is not None

    def narrow(reduced: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        return gradients.copy_(reduced.value()[0])

    future: torch.futures.Future[torch.Tensor] = work.get_future().then(narrow)
    return future
