"""Train with DeepSpeed's ZeRO-2 on packed sequences, each sharded over a ring.

    ring-attention launch -n 4 examples/train_deepspeed.py --ring 2

Ranks form a mesh: ``ring`` neighbours share a sequence, and each such ring takes sequences of its
own. To DeepSpeed all ranks are data-parallel ones: it shards gradients and optimiser state over
them. On a machine without GPUs set DS_ACCELERATOR=cpu.
"""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed as dist
from job import Settings, Step, mesh_of, over_ranks, run
from packed_text import PackedText, Shard

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
    rings, here = mesh["data"].size(), mesh.get_local_rank("data")
    parts = settings.sequences // rings
    torch.manual_seed(settings.seed)  # the same weights on every rank
    model = LanguageModel(settings.size).to(device)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=settings.learning_rate),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": parts,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": device.type == "cuda"},
        },
        dist_init_required=False,
    )

    text = PackedText(settings.text, settings.tokens)
    for step in range(1, settings.steps + 1):
        numbers = range(step * settings.sequences, (step + 1) * settings.sequences)
        shards = [Shard(text.sequence(n), attention, device) for n in numbers[here::rings]]
        # Ranks hold different numbers of labels, so a mean of the ranks' means is not the mean.
        # Each divides its sum by the number of everybody's labels; then losses and gradients of the
        # ranks add up.
        labels = over_ranks(sum(shard.labels for shard in shards), device)
        loss = torch.zeros((), device=device)
        for shard in shards:
            part = shard.loss(engine, settings.size.head_dim) / labels
            # DeepSpeed divides gradients by the number of ranks, and of backwards in a step.
            engine.backward(part * world * parts)
            engine.step()
            loss += part.detach()
        yield Step(step, over_ranks(float(loss), device), float(engine.get_global_grad_norm()))


if __name__ == "__main__":
    run(train, __doc__.splitlines()[0])
