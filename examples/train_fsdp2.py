"""Train with FSDP2 on packed sequences, each sharded over a ring, with restarts from checkpoints.

    ring-attention launch -n 4 --max-restarts 3 examples/train_fsdp2.py --ring 2 --checkpoints run

Ranks form a mesh: ``ring`` neighbours share a sequence, and each such ring takes sequences of its
own. FSDP2 shards parameters, gradients and optimiser state over all of them. A rank that dies or
hangs ends the attempt on all ranks; the launcher starts them again, and they go on from the last
checkpoint. A job of another number of processes may go on from it, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from job import Settings, Step, mesh_of, over_ranks, run
from packed_text import PackedText, Shard
from ring_attention_distributed.checkpoints import Checkpoints
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ring_core import registry
from ring_core.demo.model import LanguageModel


def train(settings: Settings, device: torch.device) -> Iterator[Step]:
    """Train on the default process group; the steps as they are done."""
    world, mesh = dist.get_world_size(), mesh_of(settings, device)
    attention = registry.create(
        "distributed",
        causal=True,
        group=mesh["ring"],
        retries=2,
        check_finite=True,
        timeout=settings.timeout,
    )
    torch.manual_seed(settings.seed)  # the same weights on every rank
    model = LanguageModel(settings.size).to(device)
    everybody = init_device_mesh(device.type, (world,))
    computing = torch.bfloat16 if device.type == "cuda" else torch.float32
    precision = MixedPrecisionPolicy(param_dtype=computing, reduce_dtype=torch.float32)
    for layer in (*model.blocks, model):
        fully_shard(layer, mesh=everybody, mp_policy=precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    checkpoints, done = None, 0
    if settings.checkpoints is not None:
        checkpoints = Checkpoints(settings.checkpoints, model, optimizer)
        done = checkpoints.load()

    text = PackedText(settings.text, settings.tokens)
    rings, here = mesh["data"].size(), mesh.get_local_rank("data")
    for step in range(done + 1, settings.steps + 1):
        numbers = range(step * settings.sequences, (step + 1) * settings.sequences)
        shards = [Shard(text.sequence(n), attention, device) for n in numbers[here::rings]]
        # Ranks hold different numbers of labels, so a mean of the ranks' means is not the mean.
        # Each divides its sum by the number of everybody's labels; then losses and gradients of the
        # ranks add up.
        labels = over_ranks(sum(shard.labels for shard in shards), device)
        loss = torch.zeros((), device=device)
        for shard in shards:
            part = shard.loss(model, settings.size.head_dim) / labels
            (part * world).backward()  # FSDP2 divides the gradients' sum over the ranks by world
            loss += part.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        yield Step(step, over_ranks(float(loss), device), float(norm))
        if checkpoints is not None and step % settings.every == 0:
            checkpoints.save(step)
    if checkpoints is not None:
        checkpoints.finish()


if __name__ == "__main__":
    run(train, __doc__.splitlines()[0])
