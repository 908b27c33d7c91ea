"""What the training scripts here have in common: their settings, their mesh, and what they tell."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ring_core.demo.model import ModelSize


@dataclass(frozen=True)
class Settings:
    """Of a training job; each is a flag of the scripts.

    Attributes:
        ring: ranks that share a sequence. sequences: in each step, over all rings.
        timeout: seconds that ranks may wait for each other.
        text: to train on; None: the help that comes with Python.
        checkpoints: their folder; None: none are written. every: steps between them.
        history: a file that gets a line of JSON for each step.
    """

    ring: int = 1
    tokens: int = 2048
    sequences: int = 4
    steps: int = 20
    learning_rate: float = 1e-3
    seed: int = 0
    width: int = 128
    layers: int = 2
    heads: int = 4
    timeout: float = 120.0
    text: Path | None = None
    checkpoints: Path | None = None
    every: int = 5
    history: Path | None = None

    @property
    def size(self) -> ModelSize:
        """Of the model."""
        return ModelSize(self.width, self.layers, self.heads)


@dataclass(frozen=True)
class Step:
    """What a step came to over all ranks: mean loss of a label, norm of the gradient."""

    step: int
    loss: float
    gradient_norm: float


def mesh_of(settings: Settings, device: torch.device) -> DeviceMesh:
    """Ranks as rings beside each other: dimensions ``data`` and ``ring``."""
    world = dist.get_world_size()
    if world % settings.ring or settings.sequences % (world // settings.ring):
        raise ValueError(
            f"--ring {settings.ring} must divide the {world} ranks, and the number of rings must "
            f"divide --sequences {settings.sequences}"
        )
    return init_device_mesh(
        device.type, (world // settings.ring, settings.ring), mesh_dim_names=("data", "ring")
    )


def over_ranks(number: float, device: torch.device) -> float:
    """The sum of a number over all ranks."""
    total = torch.tensor(float(number), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def run(train: Callable[[Settings, torch.device], Iterator[Step]], description: str) -> None:
    """Train as the command line says, in a process that torch's launcher started."""
    parser = argparse.ArgumentParser(description=description)
    kinds = {"str": str, "int": int, "float": float, "Path | None": Path}
    for field in fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=kinds[str(field.type)], default=field.default)
    settings = Settings(**vars(parser.parse_args()))
    told = os.environ.get
    if told("TORCHELASTIC_USE_AGENT_STORE") == "True" and told("TORCHELASTIC_MAX_RESTARTS") != "0":
        raise ValueError(
            "ranks that are started again would connect to those before them "
            "(https://github.com/pytorch/pytorch/issues/135712): use 'ring-attention launch "
            "--max-restarts ...', or set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and give torchrun "
            "--standalone"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=settings.timeout),
    )
    first = dist.get_rank() == 0
    started = time.perf_counter()
    for step in train(settings, device):
        if not first:
            continue
        seconds = time.perf_counter() - started
        print(f"step {step.step}: loss {step.loss:.4f}, {seconds:.1f} s", flush=True)
        if settings.history is not None:
            with settings.history.open("a") as history:
                history.write(json.dumps({**asdict(step), "time": time.time()}) + "\n")
    dist.destroy_process_group()
