"""What plugins answer: checked, blamed on the one that gave it, and asked with the right config."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ring_attention_standard.config import StandardConfig

from ring_core import (
    Observer,
    RingAttentionConfig,
    RingCommunicationMixin,
    Variant,
    WrappedCommunicator,
    WrappedKernel,
    hookimpl,
    registry,
)
from ring_core.errors import PluginLoadError
from ring_core.protocols import Communicator, Pending
from ring_core.testing import RankPool, Worker


@pytest.fixture
def registered() -> Iterator[Any]:
    """Register plugins of this process by name, for the length of a test."""
    names = []

    def register(name: str, plugin: object) -> None:
        names.append(name)
        registry.register(plugin, name=name)

    yield register
    for name in names:
        registry.unregister(name)


class Wrong:
    """Answers one hook with something else than it asks for."""

    RING_HOOK_API = 1

    def __init__(self, hook: str, answer: Any) -> None:
        setattr(self, hook, hookimpl(specname=hook)(lambda: answer))


@pytest.mark.parametrize(
    ("hook", "answer", "said"),
    [
        ("ring_observers", Observer(), "not a list of observers"),
        ("ring_observers", [Observer], "not a list of observers"),
        ("ring_kernels", [object()], "not a list of kernels"),
        ("ring_communicators", [object()], "not a list of communicator classes"),
        ("ring_presets", ["mine"], "not a mapping of names to presets"),
    ],
)
def test_a_wrong_answer_is_its_plugins_own_failure(registered, hook, answer, said) -> None:
    registered("wrong", Wrong(hook, answer))
    registry.presets()
    assert registry.create("standard")(*torch.randn(3, 1, 4, 1, 8)).shape == (1, 4, 1, 8)
    (row,) = [row for row in registry.plugins() if row.name == "wrong"]
    assert row.status == "failed"
    assert f"{hook} raised TypeError: returned" in row.error
    assert said in row.error


class Forgetful(Observer):
    def kernel(self, kernel: Any) -> None:  # type: ignore[override]
        pass


def test_an_observer_that_returns_nothing_is_named(registered) -> None:
    registered("forgetful", Wrong("ring_observers", [Forgetful()]))
    with pytest.raises(PluginLoadError, match=r"Forgetful returned None from kernel\(\)"):
        registry.create("standard")(*torch.randn(3, 1, 4, 1, 8))


class Passing(WrappedCommunicator):
    """Counts the calls of one method."""

    fetched = 0

    def fetch(self, *transfer: Any) -> Pending:
        self.fetched += 1
        return super().fetch(*transfer)


def wrapped(worker: Worker) -> dict[str, Any]:
    """Of a call by wrapped parts: what was asked of them, and what a wrapper passes on."""
    attention = registry.create("standard", group=worker.group)
    runtime, plan = attention.runtime, attention.plan(6)
    plain, kernel = attention.communicator(plan), runtime.kernel
    passing = Passing(plain)
    runtime._communicators[worker.group]["cpu"] = passing
    runtime.kernel = lambda problem: WrappedKernel(kernel(problem))  # type: ignore[method-assign]
    q = torch.ones(1, plan.local_len, 1, 8, dtype=torch.float64, requires_grad=True)
    attention(q, q, q, plan=plan).sum().backward()
    names = ("group", "rank", "world", "name", "priority", "shards", "counters", "buffers")
    return {
        "fetched": passing.fetched,
        "sent": passing.counters.bytes_sent,
        "alike": [getattr(passing, name) is getattr(plain, name) for name in names],
        "kinds": [isinstance(one, Communicator) for one in (plain, passing)],
        "copied": copy.copy(passing).inner is plain,
        "refused": Passing.refuse(worker.group, worker.device),
    }


def test_a_wrapper_has_all_that_it_wraps(cpu_pool: RankPool) -> None:
    for found in cpu_pool.run(wrapped, world=2, fresh=True):
        assert found["fetched"] == 2
        assert found["sent"] > 0
        assert all(found["alike"])
        assert found["kinds"] == [True, True]
        assert found["copied"]
        assert found["refused"] == "wraps another communicator"


class Selecting(RingCommunicationMixin):
    """Gives another one for a call's choice."""

    def among(self, selection: Any) -> Any:
        other = copy.copy(self)
        other.chosen = selection
        return other


def test_a_wrapper_stays_around_what_moves_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ring_core.communication.rank_and_world", lambda group: (0, 1))
    inner, choice = Selecting(Selecting, 1.0), object()
    passing = Passing(inner)
    for_a_call = passing.among(choice)
    assert isinstance(for_a_call, Passing)
    assert for_a_call.inner.chosen is choice
    assert passing.inner is inner
    assert for_a_call.counters is passing.counters
    plain = Passing(RingCommunicationMixin(Selecting, 1.0))
    assert plain.among(choice) is plain


class Mine(StandardConfig):
    variant: str = "mine"
    loud: bool = False
    """Whether something is told."""


class Bringing:
    """A variant whose hooks read a field of its own config."""

    RING_HOOK_API = 1

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.asked = fails, []

    @hookimpl
    def ring_variant(self) -> Variant:
        return Variant(Mine, "ring_attention_standard.attention:StandardRingAttention")

    @hookimpl
    def ring_observers(self, config: RingAttentionConfig) -> list[Observer]:
        self.asked.append(config)
        if self.fails:
            raise ValueError("no good")
        return [Observer()] if isinstance(config, Mine) and config.loud else []


def test_a_wrapped_variants_plugin_is_asked_with_its_own_config(registered) -> None:
    plugin = Bringing()
    registered("mine", plugin)
    attention = registry.create("distributed", inner={"variant": "mine", "loud": True}, causal=True)
    assert all(isinstance(config, Mine) and config.causal for config in plugin.asked)
    assert any(type(one) is Observer for one in attention.runtime.observers)
    plugin.asked.clear()
    registry.create("distributed")
    assert not any(isinstance(config, Mine) for config in plugin.asked)


def test_a_variant_whose_hooks_failed_is_not_built_without_them(registered) -> None:
    registered("mine", Bringing(fails=True))
    with pytest.raises(PluginLoadError, match="ring_observers raised ValueError: no good"):
        registry.create("mine", loud=True)
    with pytest.raises(PluginLoadError, match="no good"):
        registry.create("mine")
    assert registry.create("standard").config.variant == "standard"
