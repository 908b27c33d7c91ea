"""What an attention holds beside its config: kernels, communicators, plans, and what was chosen."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ring_core.agreement import Signature
from ring_core.choice import choose
from ring_core.config import RingAttentionConfig
from ring_core.errors import (
    CommunicatorError,
    ConfigError,
    KernelError,
    PluginLoadError,
    did_you_mean,
)
from ring_core.hookspecs import Observer
from ring_core.program import Program
from ring_core.protocols import AttentionKernel, Communicator, Problem
from ring_core.rank_plan import RankPlan
from ring_core.registry import Registry

logger = logging.getLogger("ring_core")

T = TypeVar("T")
V = TypeVar("V")


class Recent(Generic[V]):
    """The values made last, by key; safe to use from several threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.RLock()
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of ``key``, made now if it is not there."""
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
                if len(self._values) > self._most:
                    self._values.popitem(last=False)
            self._values.move_to_end(key)
            return self._values[key]


class Runtime:
    """Made when an attention is built, and made again in a copy of it."""

    def __init__(self, config: RingAttentionConfig, registry: Registry) -> None:
        self.config = config
        self.origin = registry.origin(config.variant)
        self.observers = registry.observers(config)
        self.kernels = registry.kernels(config)
        self.communicator_classes = registry.communicators(config)
        self.plans: Recent[RankPlan] = Recent(32)
        self._kernels: dict[Problem, AttentionKernel] = {}
        self._communicators: WeakKeyDictionary[Any, dict[str, Communicator]] = WeakKeyDictionary()
        self._programs: Recent[Program] = Recent(64)
        self._signatures: Recent[Signature] = Recent(128)

    def check_parts(self) -> None:
        """Refuse parts that nothing brings, and dropout with a kernel that has none."""
        for field, given, known in (
            ("kernel", self.config.kernel, [kernel.name for kernel in self.kernels]),
            ("communicator", self.config.communicator, [c.name for c in self.communicator_classes]),
        ):
            if given != "auto" and given not in known:
                raise ConfigError(
                    f"{field}: no installed plugin brings {given!r}.{did_you_mean(given, known)} "
                    f"Allowed: auto, {', '.join(known)}"
                )
        able = [kernel.name for kernel in self.kernels if kernel.supports_dropout]
        if self.config.dropout and self.config.kernel not in ("auto", *able):
            raise ConfigError(
                f"dropout={self.config.dropout}: kernel {self.config.kernel!r} cannot repeat its "
                f"dropout mask in the backward and on other tiles; allowed: auto, {', '.join(able)}"
            )

    def program(
        self, plan: RankPlan, q: Tensor, v: Tensor, dropout: bool, columns: int = 0
    ) -> Program:
        """The plan's tiles lowered for the kernel that fits ``columns`` more than the values have.

        Only this rank may need them: in which dtype gradients travel does not depend on it.
        """
        usual = self.kernel(self.problem(q, v.shape[-1], plan, dropout))
        kernel = self.kernel(self.problem(q, v.shape[-1] + columns, plan, dropout))
        communicator = self.communicator(plan, q.device)
        shards = communicator.shards if communicator else 1
        batch, _, kv_heads, _ = v.shape
        return self._programs.get(
            (plan, kernel.name, usual.name, shards, kv_heads, batch, dropout),
            lambda: Program.build(
                plan.plan,
                plan.rank,
                kernel,
                shards,
                usual,
                kv_heads=kv_heads,
                batch=batch,
                apart=dropout,  # weights are dropped by rows that all heads of a tile share
                held=plan.held,
            ),
        )

    def problem(self, q: Tensor, value_dim: int, plan: RankPlan, dropout: bool) -> Problem:
        """What a kernel is asked for calls with ``plan`` and queries like ``q``."""
        deterministic = self.config.deterministic
        ragged = self.config.kernel == "auto" and plan.is_ragged
        return Problem(
            q.device, q.dtype, q.shape[-1], value_dim, plan.masks, dropout, deterministic, ragged
        )

    def kernel(self, problem: Problem) -> AttentionKernel:
        """The kernel named in the config, or the best that does not refuse.

        Raises:
            KernelError: none can; says why each one refuses.
        """
        if problem not in self._kernels:
            choice = choose(self.kernels, lambda kernel: kernel.refuse(problem), self.config.kernel)
            if choice.taken is None:
                raise KernelError(
                    f"no kernel for {problem.dtype} on {problem.device} with head sizes "
                    f"{problem.head_dim} and {problem.value_dim}: "
                    f"{choice.reasons or 'none installed (ring-attention-standard brings some)'}"
                    + _instead("kernel", self.config.kernel)
                )
            best = choice.taken
            logger.info("kernel %r for %s", best.name, problem)
            for observer in self.observers:
                best = _given(observer, observer.kernel(best), "kernel")
            self._kernels[problem] = best
        return self._kernels[problem]

    def communicator(self, plan: RankPlan, device: torch.device) -> Communicator | None:
        """The communicator named in the config, or the best that does not refuse.

        Raises:
            CommunicatorError: none serves this group and device; says why each one refuses.
        """
        if plan.group is None or plan.world == 1:
            return None
        made = self._communicators.setdefault(plan.group, {})
        if device.type not in made:
            kind = self._communicator_class(plan, device)
            communicator = kind(plan.group, self.config.timeout)
            logger.info("communicator %r for %s tensors", kind.name, device.type)
            for observer in self.observers:
                communicator = _given(observer, observer.communicator(communicator), "communicator")
            made[device.type] = communicator
        return made[device.type]

    def _communicator_class(self, plan: RankPlan, device: torch.device) -> type[Communicator]:
        choice = choose(
            self.communicator_classes,
            lambda kind: kind.refuse(plan.group, device),
            self.config.communicator,
        )
        if choice.taken is None:
            raise CommunicatorError(
                f"no communicator for {device.type} tensors in this group of {plan.world} "
                f"ranks: {choice.reasons or 'none installed'}"
                + _instead("communicator", self.config.communicator)
            )
        return choice.taken

    def signature(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: RankPlan,
        dropout: float,
        wants: tuple[bool, ...],
        also: tuple[tuple[str, str], ...] = (),
    ) -> Signature:
        """What ranks compare before the first call of this kind."""
        key = (plan, q.shape, k.shape, v.shape, q.dtype, q.device.type, wants, dropout, also)
        return self._signatures.get(
            key, lambda: self._signature(q, k, v, plan, wants, dropout, also)
        )

    def _signature(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: RankPlan,
        wants: tuple[bool, ...],
        dropout: float,
        also: tuple[tuple[str, str], ...],
    ) -> Signature:
        spec = plan.sequences
        if q.device.type == "cpu":  # elsewhere ranks may have to compare how they reach each other
            self._communicator_class(plan, q.device)
        config = self.config.model_dump(mode="json")
        fields = {name: str(value) for name, value in config.items()}
        return Signature(
            {
                **fields,
                "plugin": self.origin,
                "tokens": str(spec.q_len),
                "key tokens": str(spec.kv_len),
                "documents": _brief(
                    [(d.q.start, d.q.stop, d.kv.start, d.kv.stop) for d in spec.documents]
                ),
                "lengths": _brief(spec.lengths),
                "plan": plan.digest,
                "dtype": str(q.dtype),
                "device": q.device.type,
                # Ranks must round alike, so they compute with one kernel. Where there is none, this
                # rank refuses the call before the others start it.
                "kernel": self.kernel(self.problem(q, v.shape[-1], plan, bool(dropout))).name,
                "communicators": ", ".join(sorted(one.name for one in self.communicator_classes)),
                "q": str(tuple(q.shape)),
                "k": str(tuple(k.shape)),
                "v": str(tuple(v.shape)),
                "requires grad (q, k, v)": str(wants),
                "dropout in this mode": str(dropout),
                **dict(also),
            }
        )


def _brief(value: Any) -> str:
    text = str(value)
    return (
        text
        if len(text) <= 120
        else f"{text[:100]}... #{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    )


def _given(observer: Observer, wrapped: T | None, what: str) -> T:
    """
    Raises:
        PluginLoadError: the observer gave nothing back.
    """
    if wrapped is None:
        kind = type(observer)
        raise PluginLoadError(
            f"observer {kind.__module__}.{kind.__qualname__} returned None from {what}(): it must "
            f"return the {what} it was given, or what wraps it"
        )
    return wrapped


def _instead(field: str, named: str) -> str:
    """What to do where nothing serves."""
    if named == "auto":
        return f". 'ring-attention doctor' shows every {field} of this machine, and why"
    return f". {field}='auto' takes one that can, where there is one"
