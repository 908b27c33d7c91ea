"""A region of shared memory on the CPU: files that all processes map, and gloo's barrier."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist


class Files:
    """Bytes of every rank, each in a file."""

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world, self.size, self.times = folder, rank, world, 0, 0
        self.memory: list[torch.Tensor] = []

    def allocate(self, needed: int, group) -> None:
        self.times += 1
        self.size = max(needed, 256)
        paths = [self.folder / f"{self.times}-{rank}" for rank in range(self.world)]
        paths[self.rank].write_bytes(b"\xff" * self.size)  # as numbers NaN: unwritten rows show
        dist.barrier(group)
        self.memory = [
            torch.from_file(str(path), shared=True, size=self.size, dtype=torch.uint8)
            for path in paths
        ]

    def at(self, rank: int, start: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        stop = start + numel * dtype.itemsize
        assert stop <= self.size
        return self.memory[rank][start:stop].view(dtype)


class FileRegion:
    """What :class:`ring_attention_standard.region.Region` is to GPUs; every transfer at once."""

    def __init__(self, group) -> None:
        self.group = group
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        folder = [tempfile.mkdtemp() if rank == 0 else ""]
        dist.broadcast_object_list(folder, dist.get_global_rank(group, 0), group)
        self.folder = Path(folder[0])
        self.keys, self.slots = (
            [Files(self._made(f"{name}-{turn}"), rank, world) for turn in range(2)]
            for name in ("keys", "slots")
        )
        self.barriers: list[str] = []

    def _made(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(exist_ok=True)
        return path

    def grow(self, memory: Files, needed: int, timeout: float) -> None:
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

    def catch_up(self) -> None:
        pass

    def used(self) -> None:
        pass
