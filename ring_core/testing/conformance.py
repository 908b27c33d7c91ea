"""Tests that every variant passes; a plugin's own tests subclass :class:`Conformance`."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ring_core import registry
from ring_core.errors import ConfigError, DisagreementError, InputError, RingError
from ring_core.runtime import Recent
from ring_core.sequences import Kind
from ring_core.testing.case import Case, Result, expected_of, run_case, visible_of
from ring_core.testing.pairs import check_pairs, times_computed
from ring_core.testing.pool import RankPool
from ring_core.testing.tasks import (
    call_without_plan,
    disagree,
    fill_padding_with_nan,
    gradcheck,
    repeat_bitwise,
    replace_the_hidden,
    special_calls,
)

EXACT = 1e-10
HALF_RATIO = 1.25
WORLDS = (1, 2, 3, 4, 8)

_TRIED: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "causal": ({"causal": True}, {}),
    "window": ({"window": (1, 1)}, {}),
    "segment_lengths": ({"segment_lengths": (4,), "dilation_rates": (2,)}, {}),
    "zigzag": ({"layout": "zigzag"}, {"layout": "contiguous"}),
    "striped": ({"layout": "striped"}, {"layout": "contiguous"}),
}
"""Of the fields that planners read: values, and those in whose place they must change something."""

_IMPORT = """
import importlib, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        assert name != "torch", "name torch code by string, or import it in the hooks that need it"

sys.meta_path.insert(0, NoTorch())
importlib.import_module(sys.argv[1])
"""

_known: Recent[Any] = Recent(256)


class Conformance:
    """Subclass it, name your ``variant``, and say what a query sees if it is more than the band.

    Every test compares with float64 attention straight from the definitions, through real
    processes: see :mod:`ring_core.testing.fixtures` for the ``rank_pool`` fixture.
    """

    variant: ClassVar[str]
    """The variant under test, as the registry knows it."""

    fields: ClassVar[Sequence[Mapping[str, Any]]] = (
        {},
        {"causal": True},
        {"causal": True, "window": (5, None)},
        {"window": (3, 9)},
    )
    """Configs to test; each is tried on every kind of sequence."""

    layouts: ClassVar[Sequence[str]] = ("auto",)
    """Layouts to try each config in."""

    in_every_layout: ClassVar[Sequence[str] | None] = None
    """Sequences, by name, to try in layouts after the first one too; None: all."""

    sequences: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "odd": {"seq_len": 37},
        "shorter than the group": {"seq_len": 5},
        "one token": {"seq_len": 1},
        "batch": {"seq_len": 32, "batch": 3, "value_dim": 12},
        "many queries per key": {"seq_len": 29, "heads": 6, "kv_heads": 1},
        "no grouping": {"seq_len": 24, "heads": 3, "kv_heads": 3, "value_dim": 4},
        "packed": {"cu_seqlens": (0, 1, 14, 14, 41, 43)},
        "packed batch": {"cu_seqlens": (0, 20, 21, 50), "batch": 2},
        "padded": {"seq_len": 23, "lengths": (23, 0, 7, 1), "batch": 4},
        "more keys": {"seq_len": 13, "kv_len": 40},
        "more queries": {"seq_len": 40, "kv_len": 13},
        "packed cross": {"cu_seqlens": (0, 9, 20, 31), "kv_cu_seqlens": (0, 17, 17, 25)},
    }
    """Sequences to test, by a name that stands in the test's id."""

    without: ClassVar[Collection[Kind]] = ()
    """Kinds of sequences that the variant refuses: ``packed``, ``padded``, ``cross``."""

    half: ClassVar[Mapping[str, Any]] = {
        "seq_len": 512,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "value_dim": 64,
    }
    """Sizes of the half-precision test."""

    # What a variant may override

    def visible(self, case: Case) -> Tensor:
        """Which keys each query sees, by definition, or how often they count: a shape that
        broadcasts to [B, H, Sq, Sk]."""
        return visible_of(case)

    def expected(self, case: Case) -> Result:
        """Out, lse and gradients of the case in float64."""
        return expected_of(case, self.visible(case))

    def hidden(self, case: Case) -> Tensor:
        """Keys that no head of the middle query sees: bool [B, Sk]."""
        seen = self.visible(case)
        seen = seen.expand(case.batch, case.heads, case.q_len, case.k_len)
        return ~seen[:, :, case.q_len // 2].any(1)

    @classmethod
    def kept(cls) -> dict[str, Mapping[str, Any]]:
        """The sequences to test, less those of kinds that the variant is ``without``."""
        left_out = set(cls.without)
        return {
            name: one
            for name, one in cls.sequences.items()
            if not Case(cls.variant, **one).sequences.kinds & left_out
        }

    # Worlds have these in common; both are computed once

    def _expected(self, case: Case) -> Result:
        key = type(self), pickle.dumps(case)
        expected: Result = _known.get(key, lambda: self.expected(case))
        return expected

    def _alone(self, pool: RankPool, case: Case) -> dict[str, float]:
        """The relative error of one device."""

        def make() -> dict[str, float]:
            result: Result = pool.run(run_case, case, world=1)[0]
            return result.relative(self._expected(case))

        alone: dict[str, float] = _known.get((type(self), pool, pickle.dumps(case)), make)
        return alone

    # The planner, without any process

    def test_every_pair_is_planned(self, planned: Case) -> None:
        """As often as it counts: names pairs of a query and a key that no rank has, or two have."""
        attention = registry.create(planned.variant, **planned.fields)
        first = planned.fields == self.fields[0]
        # Which divides nothing; and once for each sequence more ranks than some have tokens.
        for world in (3, max(WORLDS)) if first else (3,):
            plan = attention.make_plan(planned.sequences, world)
            if plan.chooses:
                pytest.skip("the tensors of a call decide what is seen")
            check_pairs(plan, self._by_kv_head(planned))

    @pytest.mark.parametrize("field", _TRIED)
    def test_no_common_field_is_ignored(self, field: str) -> None:
        """Each field that is a planner's to read is refused, or changes who sees or holds what."""
        given, instead = _TRIED[field]
        accepted = False
        for fields in self.fields:
            plain = {name: value for name, value in fields.items() if name not in given}
            for one in self.kept().values():
                try:
                    with_it, without = (
                        self._seen(Case(self.variant, {**plain, **more}, **one))
                        for more in (given, instead)
                    )
                except (ConfigError, InputError):
                    continue
                accepted = True
                if with_it != without:
                    return
        named = " and ".join(f"{name}={value!r}" for name, value in given.items())
        assert not accepted, (
            f"{named}: neither refused nor does it change who sees or holds what; have the planner "
            "read it, or name it in the config's `refused`"
        )

    def test_sequences_that_it_is_without_are_refused(self) -> None:
        """And not taken for others."""
        for fields, (name, one) in product(self.fields, Conformance.sequences.items()):
            case = Case(self.variant, fields, **one)
            if case.sequences.kinds & set(self.without):
                attention = registry.create(self.variant, **fields)
                with pytest.raises(InputError):
                    pytest.fail(f"{name} is planned: {attention.make_plan(case.sequences, 2)}")

    def test_listing_the_plugin_imports_no_torch(self) -> None:
        """The module that the entry point names imports none, so that listing plugins is quick."""
        rows = [row for row in registry.plugins() if row.name == self.variant]
        _, _, module = rows[0].entry_point.partition(" = ")
        if not module:
            pytest.skip("registered by hand: there is no entry point")
        command = [sys.executable, "-c", _IMPORT, module.partition(":")[0]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def _by_kv_head(self, case: Case) -> Tensor:
        """How often pairs count: int32 [B, K, Sq, Sk]; query heads of one KV head see alike."""
        shape = case.batch, case.heads, case.q_len, case.k_len
        return self.visible(case).expand(shape)[:, :: case.heads // case.kv_heads].int()

    def _seen(self, case: Case) -> tuple[Any, ...]:
        """Who sees what, and who holds what, on three ranks."""
        plan = registry.create(case.variant, **case.fields).make_plan(case.sequences, 3)
        times = times_computed(plan, case.batch, case.kv_heads)
        return plan.shards, times.numpy().tobytes()

    # Numbers

    def test_equals_the_reference(self, rank_pool: RankPool, world: int, conforming: Case) -> None:
        """Out, lse, dq, dk, dv equal float64 attention to 1e-10 at every world size."""
        skip_too_large(rank_pool, world)
        result = rank_pool.run(run_case, conforming, world=world)[0]
        errors = result.errors(self._expected(conforming))
        assert all(error < EXACT for error in errors.values()), errors  # NaN is not

    @pytest.mark.parametrize("world", [2, 4, 8])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, rank_pool: RankPool, world: int, dtype: str) -> None:
        """At most 1.25 times the error that one device makes on the same tensors.

        In the largest world, each config takes one of the dtypes.
        """
        skip_too_large(rank_pool, world)
        turn = ["bfloat16", "float16"].index(dtype)
        thin = world == max(WORLDS) and len(self.fields) > 1
        for fields in self.fields[turn::2] if thin else self.fields:
            case = Case(self.variant, fields, dtype=dtype, **self.half)
            expected = self._expected(case)
            alone = self._alone(rank_pool, case)
            many = rank_pool.run(run_case, case, world=world)[0].relative(expected)
            for name, error in many.items():
                assert error <= HALF_RATIO * alone[name], (fields, name, error, alone[name])

    def test_gradcheck(self, rank_pool: RankPool) -> None:
        """torch's numerical gradient check through shard, a 2-rank ring and unshard."""
        skip_too_large(rank_pool, 2)
        for fields in self.fields:
            case = Case(
                self.variant, fields, seq_len=7, heads=2, kv_heads=1, head_dim=2, value_dim=1
            )
            assert rank_pool.run(gradcheck, case, world=2) == [True, True]

    # What must not move a result

    def test_the_unseen_changes_nothing(self, rank_pool: RankPool, leaking: Case) -> None:
        """Replacing every key that a query does not see leaves its output bitwise as it was."""
        world, query = min(3, rank_pool.size), leaking.q_len // 2
        hidden = self.hidden(leaking)
        before, after = rank_pool.run(replace_the_hidden, leaking, hidden, world=world)[0]
        assert torch.equal(before[0][:, query], after[0][:, query])
        assert torch.equal(before[1][:, :, query], after[1][:, :, query])

    def test_padding_is_never_read(self, rank_pool: RankPool) -> None:
        """NaN in padded rows and beyond ``lengths`` changes neither results nor gradients."""
        world = min(3, rank_pool.size)
        for fields in self.fields:
            for sizes in ({"seq_len": 7}, {"seq_len": 11, "lengths": (11, 3, 0), "batch": 3}):
                if "lengths" in sizes and "padded" in self.without:
                    continue
                case = Case(self.variant, fields, **sizes)
                clean, dirty = rank_pool.run(fill_padding_with_nan, case, world=world)[0]
                for name in ("out", "lse", "dq", "dk", "dv"):
                    assert torch.equal(getattr(clean, name), getattr(dirty, name)), (fields, name)

    def test_bitwise_repeatable(self, rank_pool: RankPool) -> None:
        """``deterministic=True`` gives the same bits twice."""
        world = min(4, rank_pool.size)
        for fields in self.fields:
            case = Case(
                self.variant, {**fields, "deterministic": True}, dtype="bfloat16", **self.half
            )
            # Several times: a race between adds gives the same bits more often than not.
            assert all(rank_pool.run(repeat_bitwise, case, world=world))

    def test_overlap_changes_nothing(self, rank_pool: RankPool) -> None:
        """Fetching ahead and fetching first give the same bits."""
        world = min(4, rank_pool.size)
        for fields in self.fields:
            case = Case(self.variant, fields)
            ahead = rank_pool.run(run_case, case, world=world)[0]
            first = rank_pool.run(
                run_case, replace(case, fields={**fields, "overlap": False}), world=world
            )[0]
            assert ahead.errors(first) == dict.fromkeys(("out", "dq", "dk", "dv", "lse"), 0.0)

    # How it is called

    @pytest.mark.parametrize(
        "how",
        [
            "strided",
            "twice",
            "frozen_kv",
            "frozen_q",
            "no_grad",
            "inference",
            "checkpoint",
            "checkpoint_reentrant",
            "compile",
            "out_only",
            "lse_only",
            "autocast",
        ],
    )
    def test_called_as(self, rank_pool: RankPool, how: str) -> None:
        """Strided inputs, two backwards, frozen inputs, checkpoints, compile: same numbers."""
        world = min(2, rank_pool.size)
        for fields in self.fields[:2]:
            case = Case(self.variant, fields)
            expected = self._expected(case)
            result = rank_pool.run(special_calls, how, case, world=world)[0]
            errors = result.errors(expected)
            checked = {
                "frozen_kv": ("out", "lse", "dq"),
                "frozen_q": ("out", "lse", "dk", "dv"),
                "no_grad": ("out", "lse"),
                "inference": ("out", "lse"),
                "out_only": ("out", "lse"),
                "lse_only": ("out", "lse"),
            }.get(how, ("out", "lse", "dq", "dk", "dv"))
            assert all(errors[name] < EXACT for name in checked), errors

    @pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
    def test_without_a_plan(self, rank_pool: RankPool, layout: str) -> None:
        """With an explicit layout, equal shards need no plan; the result is the plan's."""
        world = min(4, rank_pool.size)
        if "layout" in registry.variant(self.variant).config.refused:
            pytest.skip("the config refuses layouts")
        for fields in self.fields:
            case = Case(self.variant, {**fields, "layout": layout}, seq_len=6 * world)
            assert all(rank_pool.run(call_without_plan, case, world=world))

    def test_any_group(self, rank_pool: RankPool) -> None:
        """A group of some ranks, not starting at 0, works beside the default one."""
        if rank_pool.size < 3:
            pytest.skip("needs 3 ranks")
        case = Case(self.variant, self.fields[0])
        for ranks in ([2, 1], [1, 2]) if rank_pool.size < 6 else ([5, 2, 3], [1, 4]):
            result = rank_pool.run(run_case, case, ranks=sorted(ranks))[0]
            assert max(result.errors(self._expected(case)).values()) < EXACT

    # What goes wrong

    @pytest.mark.parametrize("what", ["config", "length", "dtype", "heads", "bad_shape", "missing"])
    def test_disagreeing_ranks(self, rank_pool: RankPool, what: str) -> None:
        """Ranks that call differently raise one error, the same text on all, and none hangs."""
        world = min(3, rank_pool.size)
        if world < 2:
            pytest.skip("needs 2 ranks")
        case = Case(self.variant, self.fields[0])
        outcomes = rank_pool.run(
            disagree, case, what, world=world, errors=True, fresh=True, timeout=60
        )
        assert all(isinstance(outcome, RingError) for outcome in outcomes), outcomes
        others = outcomes[1:] if what == "bad_shape" else outcomes
        assert len({str(outcome) for outcome in others}) == 1, outcomes
        assert all(isinstance(outcome, DisagreementError) for outcome in others)
        if what == "bad_shape":
            assert isinstance(outcomes[0], InputError)
            assert str(outcomes[0]) in str(outcomes[1])

    def test_copies(self) -> None:
        """A pickled and a deep-copied attention have the config and compute the same."""
        attention = registry.create(self.variant, **self.fields[0])
        q = torch.randn(1, 9, 2, 4, dtype=torch.float64)
        expected = attention(q, q, q)
        for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
            assert copied.config == attention.config
            assert torch.equal(copied(q, q, q), expected)


def skip_too_large(pool: RankPool, world: int) -> None:
    """Skip a test for more ranks than the pool has: on a machine with fewer GPUs."""
    if world > pool.size:
        pytest.skip(f"{world} ranks, and this machine has {pool.size} GPUs")


def in_worlds(suite: type[Conformance]) -> list[Any]:
    """Every case of a suite at world sizes that take turns, as pytest parameters.

    Each sequence and each config meets every world size, but not all sequences with all configs: of
    the two largest, which take longest, a case takes one. In layouts after the first one each case
    takes every second world size, so that each layout meets each sequence and each config at each.
    """
    found = []
    for turn, first, parameter in _cases(suite):
        if not first:
            worlds = WORLDS[turn % 2 :: 2]
        elif len(suite.fields) > 1:
            worlds = (*WORLDS[:-2], WORLDS[-2 + turn % 2])
        else:
            worlds = WORLDS
        found += [
            pytest.param(*parameter.values, world, id=f"{parameter.id}-{world}") for world in worlds
        ]
    return found


def cases_of(suite: type[Conformance]) -> list[Any]:
    """Every combination of a suite's fields, layouts and sequences, as pytest parameters."""
    return [parameter for *_, parameter in _cases(suite)]


def _cases(suite: type[Conformance]) -> Iterator[tuple[int, bool, Any]]:
    """A number that alternates, whether the layout is the first one, and the parameter."""
    for (x, name), (y, fields), (place, layout) in product(
        enumerate(suite.kept()), enumerate(suite.fields), enumerate(suite.layouts)
    ):
        if place and suite.in_every_layout is not None and name not in suite.in_every_layout:
            continue
        given = {**fields, **({} if layout == "auto" else {"layout": layout})}
        shown = "-".join([name, *(f"{k}={v}" for k, v in fields.items()), layout])
        case = Case(suite.variant, given, **suite.sequences[name])
        yield x + y + place, not place, pytest.param(case, id=shown.replace(" ", "_"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give tests that ask for a ``conforming`` case all cases of their suite.

    Those that ask for a ``leaking`` one get the cases in which the middle query is denied some key.
    """
    suite = metafunc.cls
    if "conforming" in metafunc.fixturenames:
        metafunc.parametrize(("conforming", "world"), in_worlds(suite))
    if "planned" in metafunc.fixturenames:
        metafunc.parametrize("planned", cases_of(suite))
    if "leaking" in metafunc.fixturenames:
        cases = [case for case in cases_of(suite) if suite().hidden(case.values[0]).any()]
        metafunc.parametrize("leaking", cases)
