"""A region of shared memory on the CPU: files that all processes map, and gloo's barrier."""

from __future__ import annotations

import tempfile
import uuid
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist


class Files:
    """Bytes of every rank, each in a file."""

    def __init__(self, name: str, rank: int, world: int) -> None:
        self.name, self.rank, self.world, self.size, self.times = name, rank, world, 0, 0
        self.memory: list[torch.Tensor] = []
        self.known: dict = {}

    def allocate(self, needed: int, group) -> None:
        self.times += 1
        self.known.clear()
        self.size = max(needed, 256)
        folder = Path(tempfile.gettempdir())
        paths = [folder / f"{self.name}-{self.times}-{rank}" for rank in range(self.world)]
        paths[self.rank].write_bytes(b"\xff" * self.size)  # as numbers NaN: unwritten rows show
        dist.barrier(group)
        self.memory = [
            torch.from_file(str(path), shared=True, size=self.size, dtype=torch.uint8)
            for path in paths
        ]
        dist.barrier(group)
        paths[self.rank].unlink()  # all have it mapped

    def at(self, rank: int, start: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        stop = start + numel * dtype.itemsize
        assert stop <= self.size
        return self.memory[rank][start:stop].view(dtype)


class FileRegion:
    """What :class:`ring_attention_standard.region.Region` is to GPUs; every transfer at once."""

    def __init__(self, group) -> None:
        self.group = group
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        unique = [uuid.uuid4().hex]
        dist.broadcast_object_list(unique, dist.get_global_rank(group, 0), group)
        self.keys, self.slots = (
            [Files(f"ring-{unique[0]}-{name}-{turn}", rank, world) for turn in range(2)]
            for name in ("keys", "slots")
        )
        self.barriers: list[str] = []

    def grow(self, memory: Files, needed: int, device, timeout: float) -> None:
        if memory.size < needed:
            memory.allocate(needed, self.group)

    def barrier(self, name: str, timeout: float) -> None:
        self.barriers.append(name)
        dist.barrier(self.group)

    def turn(self, device):
        return nullcontext()

    def mark(self):
        return None

    def wait(self, mark) -> None:
        pass

    def catch_up(self, device) -> None:
        pass

    def used(self) -> None:
        pass
