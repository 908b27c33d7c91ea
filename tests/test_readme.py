"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ring_core import BaseRingAttention, reference
from ring_core.errors import ConfigError, InputError
from ring_core.sequences import Sequences
from ring_core.testing import RankPool, Worker, check_pairs

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


def own_variant(**options: Any) -> BaseRingAttention:
    names: dict[str, Any] = {"__name__": __name__}
    exec(example("NeighbourPlan"), names)
    attention: BaseRingAttention = names["NeighbourAttention"](**options)
    return attention


def run_own_variant(worker: Worker) -> torch.Tensor:
    attention = own_variant(group=worker.group, block=5)
    plan = attention.plan(23)
    torch.manual_seed(0)
    x = torch.randn(1, 23, 2, 8, dtype=torch.float64)
    return plan.unshard(attention(*3 * [plan.shard(x)], plan=plan))


def seen_by_own_variant(length: int) -> torch.Tensor:
    block = torch.arange(length) // 5
    return (block[:, None] == block) | (block[:, None] == block + 1)


def test_the_variant_of_your_own(cpu_pool: RankPool) -> None:
    """A planner and little else: exact where it says a query sees a key, on any number of ranks."""
    torch.manual_seed(0)
    x = torch.randn(1, 23, 2, 8, dtype=torch.float64)
    expected = reference.attention(x, x, x, seen_by_own_variant(23))[0]
    out = cpu_pool.run(run_own_variant, world=3)
    assert all(torch.allclose(one, expected, atol=1e-10) for one in out)
    for length, world in product((1, 5, 37), (1, 2, 8)):
        plan = own_variant(block=5).make_plan(Sequences.build(length), world)
        check_pairs(plan, seen_by_own_variant(length)[None, None])


@pytest.mark.parametrize(
    "fields", [{"causal": True}, {"window": (1, 1)}, {"layout": "zigzag"}, {"inexistent": 1}]
)
def test_the_variant_of_your_own_ignores_no_field(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        own_variant(**fields)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"cu_seqlens": [0, 7, 23]}, "cu_seqlens"),
        ({"seq_len": 9, "lengths": [9, 3]}, "lengths"),
        ({"seq_len": 9, "kv_len": 12}, "kv_len"),
        ({"cu_seqlens": [0, 9], "kv_cu_seqlens": [0, 12]}, "kv_cu_seqlens"),
    ],
)
def test_the_variant_of_your_own_ignores_no_sequence(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=f"{named}.*: blocks are cut from one sequence"):
        own_variant().plan(**asked)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
