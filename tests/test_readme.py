"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ring_core import reference
from ring_core.testing import RankPool, Worker

README = Path(__file__).parent.parent / "README.md"


def example(marker: str) -> str:
    """The README's Python block that holds ``marker``."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (found,) = [block for block in blocks if marker in block]
    return found


def run_example(worker: Worker | None, code: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    return names["x"].detach(), names["whole"].detach()


def test_the_usage_example(cpu_pool: RankPool) -> None:
    """In one process, and unchanged in every process of a group."""
    code = example("plan.unshard")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    x, alone = run_example(None, code)
    seen = reference.visible(x.shape[1], x.shape[1], causal=True)
    expected = reference.attention(x, x, x, seen)[0]
    assert (alone - expected).abs().max() < 1e-5
    for same, whole in cpu_pool.run(run_example, code):
        assert torch.equal(same, x)
        assert (whole - expected).abs().max() < 1e-5


def run_own_variant(worker: Worker, code: str) -> torch.Tensor:
    names: dict[str, Any] = {"__name__": __name__}
    exec(code, names)
    attention = names["NeighbourAttention"](group=worker.group)
    plan = attention.plan(23)
    torch.manual_seed(0)
    x = torch.randn(1, 23, 2, 8, dtype=torch.float64)
    return plan.unshard(attention(*3 * [plan.shard(x)], plan=plan))


def test_the_variant_of_your_own(cpu_pool: RankPool) -> None:
    """A planner and nothing else: exact where it says a query sees a key."""
    world = 3
    out = cpu_pool.run(run_own_variant, example("NeighbourPlan"), world=world)
    torch.manual_seed(0)
    x = torch.randn(1, 23, 2, 8, dtype=torch.float64)
    owner = torch.tensor([(3 * i + 2) // 23 for i in range(23)])
    seen = (owner[:, None] == owner) | (owner[:, None] == owner + 1)
    expected = reference.attention(x, x, x, seen)[0]
    assert all(torch.allclose(one, expected, atol=1e-10) for one in out)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
