"""torch.distributed.tensor.experimental.context_parallel: torch's own, over its SDPA kernels."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from peers import CannotRunError, Contender, Problem


def contender(problem: Problem) -> Contender:
    """With its load balancing, over cuDNN; grouped heads are repeated, which it asks for."""
    if problem.documents is not None:
        raise CannotRunError("its ring has no packed documents")
    try:
        from torch.distributed.tensor.experimental import context_parallel
    except ImportError as error:
        raise CannotRunError(str(error)) from error
    world = dist.get_world_size(problem.group)
    mesh = init_device_mesh("cuda", (world,))
    repeat = problem.heads // problem.kv_heads
    rows = torch.arange(problem.tokens, device="cuda")[None, None, :, None].float()
    # The one way in is a context that shards buffers in place: it shows which rows are ours.
    inside = context_parallel(mesh, buffers=[rows], buffer_seq_dims=[2], no_restore_buffers={rows})
    inside.__enter__()
    mine = rows.flatten().long()

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def gather(x):
        shards = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(shards, x.contiguous(), group=problem.group)
        places = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(places, mine, group=problem.group)
        return torch.cat(shards, 1)[:, torch.cat(places).argsort()]

    return Contender(
        "torch context_parallel", "cudnn", lambda x: x[:, mine.to(x.device)], attend, gather
    )
