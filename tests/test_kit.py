"""The conformance kit finds what a first variant gets wrong, and names it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_core import BaseRingAttention, RingAttentionConfig, Variant, hookimpl, registry
from ring_core.config import PLANNED
from ring_core.errors import DisagreementError, PlanError
from ring_core.layout import contiguous
from ring_core.masks import CAUSAL, FULL
from ring_core.plan import Plan, Rows, Tile
from ring_core.sequences import Sequences
from ring_core.testing import Case, Conformance, RankPool, Worker, check_pairs, times_computed
from ring_core.testing.conformance import _TRIED, cases_of


@dataclass(frozen=True)
class OwnPlan(Plan):
    """Each query sees all keys of its own rank, as in the README; ``wrong`` in one way."""

    wrong: str = ""

    def tiles(self, rank: int, owner: int) -> Sequence[Tile]:
        if rank != owner:
            return ()
        held = self.queries.owned(rank)
        if self.wrong == "padding":
            held = self.queries.size
        rows = Rows(0, held)
        if self.wrong == "twice" and rank == 1:
            return [Tile(rows, rows, FULL), Tile(Rows(2, 1), Rows(0, 2), FULL)]
        if self.wrong == "left out" and rank == 1:
            return [Tile(rows, rows, CAUSAL)]
        return [Tile(rows, rows, FULL)]


class OwnConfig(RingAttentionConfig):
    variant: str = "own"

    wrong: str = ""
    """In which way the planner is."""


class Own(BaseRingAttention):
    config_class = OwnConfig
    config: OwnConfig

    def make_plan(self, sequences: Sequences, world: int) -> OwnPlan:
        layout = contiguous(sequences.q_len, world)
        return OwnPlan(layout, layout, self.config.wrong)


class Bringing:
    """A plugin of this process, which brings the variant."""

    RING_HOOK_API = 1

    @hookimpl
    def ring_variant(self) -> Variant:
        return Variant(OwnConfig, f"{__name__}:Own")


@pytest.fixture(autouse=True)
def own() -> Iterator[None]:
    registry.register(Bringing(), name="own")
    yield
    registry.unregister("own")


class Suite(Conformance):
    """Not collected by itself: what its tests find is what the tests below are about."""

    __test__ = False
    variant = "own"
    fields = ({},)

    def visible(self, case: Case) -> Tensor:
        return torch.ones(case.q_len, case.k_len, dtype=torch.bool)


def seen(length: int, world: int) -> Tensor:
    """By definition: [1, 1, length, length]."""
    owner = torch.tensor(
        [rank for rank, (run,) in enumerate(contiguous(length, world).rows) for _ in run]
    )
    return (owner[:, None] == owner)[None, None]


# Pairs


def test_a_right_plan_has_each_pair_once() -> None:
    layout = contiguous(11, 3)
    check_pairs(OwnPlan(layout, layout), seen(11, 3))
    assert times_computed(OwnPlan(layout, layout)).sum() == 3**2 + 4**2 + 4**2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("twice", ["query 5 (of rank 1) and key 3 (of rank 1)", "counted 2 times, not 1"]),
        ("left out", ["query 3 (of rank 1) and key 4 (of rank 1)", "counted 0 times, not 1"]),
    ],
)
def test_wrong_pairs_are_named(wrong: str, said: list[str]) -> None:
    layout = contiguous(11, 3)
    with pytest.raises(AssertionError) as caught:
        check_pairs(OwnPlan(layout, layout, wrong), seen(11, 3))
    assert "OwnPlan over 3 ranks" in str(caught.value)
    assert all(text in str(caught.value) for text in said), caught.value


def test_the_kit_names_the_pairs_that_a_variant_forgot() -> None:
    case = Case("own", {}, seq_len=7, heads=1, kv_heads=1)
    with pytest.raises(AssertionError, match=r"query 0 \(of rank 0\) and key 2 \(of rank 1\)"):
        Suite().test_every_pair_is_planned(case)


# Fields and sequences


def test_every_field_that_a_planner_reads_is_tried() -> None:
    assert {name for given, _ in _TRIED.values() for name in given} == set(PLANNED)


@pytest.mark.parametrize("field", _TRIED)
def test_an_ignored_field_is_found(field: str) -> None:
    with pytest.raises(AssertionError, match="neither refused nor does it change who sees"):
        Suite().test_no_common_field_is_ignored(field)


def test_ignored_sequences_are_found() -> None:
    class Without(Suite):
        without = ("packed",)

    assert not any("packed" in name for name in Without.kept())
    assert len(cases_of(Without)) == len(Without.kept()) == len(Suite.sequences) - 3
    with pytest.raises(pytest.fail.Exception, match="packed is planned: OwnPlan"):
        Without().test_sequences_that_it_is_without_are_refused()


def test_a_plugin_that_imports_torch_is_found(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "heavy.py").write_text(
        "import torch\nfrom test_kit import Bringing\n"
        "RING_HOOK_API = 1\nring_variant = Bringing().ring_variant\n"
    )
    info = tmp_path / "heavy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: heavy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ring_core.variants]\nheavy = heavy\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    class Heavy(Suite):
        variant = "heavy"

    registry.refresh()
    try:
        with pytest.raises(AssertionError, match=r"heavy.py.*\n *import torch"):
            Heavy().test_listing_the_plugin_imports_no_torch()
    finally:
        monkeypatch.undo()
        registry.refresh()


# Rows


def call(worker: Worker) -> Any:
    registry.register(Bringing(), name="own")
    try:
        attention = registry.create("own", group=worker.group, wrong="padding")
        plan = attention.plan(11)
        return attention(*torch.randn(3, 1, plan.local_len, 1, 8), plan=plan)
    finally:
        registry.unregister("own")


def test_rows_that_nobody_holds_are_refused_before_anybody_waits(cpu_pool: RankPool) -> None:
    """Rank 0 holds three tokens of eleven, and its planner says four."""
    first, *others = cpu_pool.run(call, world=3, errors=True, fresh=True, timeout=60)
    assert isinstance(first, PlanError)
    said = "OwnPlan.tiles(rank=0, owner=0): a tile has query rows 0 to 3 and key rows 0 to 3"
    assert said in str(first)
    assert "rank 0 holds 3 queries, rank 0 3 keys" in str(first)
    for one in others:
        assert isinstance(one, DisagreementError)
        assert said in str(one)
