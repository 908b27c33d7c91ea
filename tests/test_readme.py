"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ring_core import reference
from ring_core.testing import RankPool, Worker

README = Path(__file__).parent.parent / "README.md"


def example() -> str:
    """The README's usage example."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (usage,) = [block for block in blocks if "plan.unshard" in block]
    return usage


def run_example(worker: Worker | None, code: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    return names["x"].detach(), names["whole"].detach()


def test_the_usage_example(cpu_pool: RankPool) -> None:
    """In one process, and unchanged in every process of a group."""
    code = example()
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    for x, whole in (run_example(None, code), *cpu_pool.run(run_example, code)):
        length = x.shape[1]
        seen = reference.visible(length, length, causal=True)
        expected = reference.attention(x, x, x, seen)[0]
        assert (whole - expected).abs().max() < 1e-5


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
