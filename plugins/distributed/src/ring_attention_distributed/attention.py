"""Variant ``distributed``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ring_attention_distributed.calls import Arrangement, MeshCall
from ring_attention_distributed.config import DistributedConfig
from ring_attention_distributed.cost import predictions, quickest, with_exchange
from ring_attention_distributed.heads import Split, degrees
from ring_attention_distributed.hosts import agreed_per_host
from ring_attention_distributed.levels import Levels, levels_of
from ring_attention_distributed.mesh import Mesh, part_of, places, ring_plan
from ring_attention_distributed.monitor import Monitor, MonitoredCall, monitor_by
from ring_attention_distributed.steady import SteadyCall
from ring_core.attempts import WAIT
from ring_core.attention import BaseRingAttention
from ring_core.calls import AnyCall, Call
from ring_core.config import RingAttentionConfig
from ring_core.errors import InputError
from ring_core.exchange import Exchange
from ring_core.plan import Plan
from ring_core.prediction.memory import Sizes
from ring_core.prediction.rates import Rates
from ring_core.prediction.timeline import Prediction, Where
from ring_core.rank_plan import RankPlan
from ring_core.registry import Registry
from ring_core.runtime import Recent, Runtime
from ring_core.sequences import Sequences


class DistributedRingAttention(BaseRingAttention):
    """Another variant's attention on a mesh: heads are exchanged among neighbouring ranks (Ulysses,
    arXiv 2309.14509), and rings go over what is left (as in USP, arXiv 2405.07719).

    Plans and shards are the inner variant's for a ring of all ranks: which tokens a rank holds does
    not depend on the mesh, nor does the result.

    Attributes:
        inner: the variant that computes.
    """

    config_class = DistributedConfig
    config: DistributedConfig

    def __init__(
        self,
        config: RingAttentionConfig | Mapping[str, Any] | None = None,
        *,
        group: Any = None,
        registry: Registry | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(config, group=group, registry=registry, **fields)
        self.inner = self._registry.create(self.config.whole_inner(), group=group)
        self._arrangements: Recent[Arrangement] | None = None
        self._steady: Runtime | None = None

    @property
    def rearranges(self) -> bool:  # type: ignore[override]
        return self.inner.rearranges

    def make_plan(self, sequences: Sequences, world: int) -> Plan:
        return self.inner.make_plan(sequences, world)

    def make_implied_plan(self, sequences: Sequences, world: int) -> Plan:
        return self.inner.make_implied_plan(sequences, world)

    def choose(self, plan: RankPlan, q: Tensor, k: Tensor, exchange: Exchange) -> Any:
        return self.inner.choose(plan, q, k, exchange)

    def degree(self, plan: RankPlan, q: Tensor, k: Tensor, v: Tensor) -> int:
        """How many ranks exchange heads in a call with these shards.

        Raises:
            InputError: ``ulysses`` divides neither the ranks nor the heads.
        """
        world, (q_heads, kv_heads) = plan.world, (q.shape[2], k.shape[2])
        given = self.config.ulysses
        if world == 1 or given == 1:
            return 1
        if given == "auto":
            return quickest(self.predictions(plan, q, k, v))
        self._check_degree(given, q_heads, kv_heads, world)
        return given

    @staticmethod
    def _check_degree(given: int, q_heads: int, kv_heads: int, world: int) -> None:
        allowed = list(degrees(q_heads, kv_heads, world))
        if world > 1 and given not in allowed:
            why = (
                f"it does not divide the {world} ranks"
                if world % given
                else Split.refuse(q_heads, kv_heads, given)
            )
            raise InputError(
                f"ulysses={given} with {q_heads} query heads, {kv_heads} KV heads and {world} "
                f"ranks: {why}. Possible here: {', '.join(map(str, allowed))}, or 'auto'"
            )

    def predictions(
        self, plan: RankPlan, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Prediction, ...]:
        """How long a call with these shards would take with each degree that they allow, by rates
        that come with the core; ``ulysses="auto"`` takes the fastest."""
        dropout = bool(self.config.dropout)
        kernel = self.runtime.kernel(self.runtime.problem(q, v.shape[-1], plan, dropout))
        dtype = str(q.dtype).removeprefix("torch.")
        sizes = Sizes(q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.shape[0], dtype)
        per_host = self.config.per_host(plan.world)
        return predictions(plan.plan, sizes, kernel, q.device.type, per_host)

    def predict(self, plan: Plan, sizes: Sizes, rates: Rates, where: Where) -> Prediction:
        """Of the degree that the config names, or of the fastest one."""
        config = self.config
        per_host = where.per_host if config.ranks_per_host == "auto" else config.ranks_per_host
        where = replace(where, per_host=per_host, overlap=config.overlap)
        allowed = list(degrees(sizes.q_heads, sizes.kv_heads, plan.world))
        if config.ulysses != "auto":
            self._check_degree(config.ulysses, sizes.q_heads, sizes.kv_heads, plan.world)
            allowed = [config.ulysses if plan.world > 1 else 1]
        found = [
            with_exchange(plan, sizes, rates, where, self.candidates, degree) for degree in allowed
        ]
        return min(found, key=lambda one: one.total)

    def make_call(self, plan: RankPlan, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> AnyCall:
        plan.check(k.shape[2])
        degree, config = self.degree(plan, q, k, v), self.config
        call["also"] = (("ulysses in this call", str(degree)),)

        def on(over: RankPlan, runtime: Runtime = self.runtime) -> Call:
            if degree == 1 and config.per_host(over.world) >= over.world:
                return Call(runtime, self.choose, over, q, k, v, **call)
            make = partial(self._arranged, over, degree, q.shape[2], k.shape[2])
            return MeshCall(runtime, self.choose, over, q, k, v, **call, arrangement=make)

        made: AnyCall = on(plan)
        if config.check_finite or (config.retries and plan.world > 1):
            made = SteadyCall(
                on(plan),
                lambda over: on(over, self._steady_runtime),
                forget=self._forget,
                device=q.device,
                retries=config.retries,
                backoff=config.backoff,
                finite=config.check_finite,
            )
        monitor = self.monitor
        return made if monitor is None else MonitoredCall(made, monitor, q.device)

    @property
    def monitor(self) -> Monitor | None:
        """What this rank's calls cost, where the config asks for it."""
        return monitor_by(self.config, self._target())

    @property
    def _steady_runtime(self) -> Runtime:
        """Whose transfers leave some of the deadline for the ranks to meet."""
        if self._steady is None:
            timeout = WAIT * self.config.timeout
            config = self.config.model_copy(update={"timeout": timeout})
            self._steady = Runtime(config, self._registry)
        return self._steady

    def _forget(self) -> None:
        """Communicators and rings of a process group that failed."""
        self._steady, self._arrangements = None, None

    def _arranged(self, plan: RankPlan, degree: int, q_heads: int, kv_heads: int) -> Arrangement:
        """Made at the first call of a kind, once its ranks have agreed: it may make groups."""
        if self._arrangements is None:
            self._arrangements = Recent(32)
        return self._arrangements.get(
            (plan, degree, q_heads, kv_heads),
            lambda: arrange(plan, degree, q_heads, kv_heads, self.config),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_arrangements": None, "_steady": None}


def arrange(
    plan: RankPlan, degree: int, q_heads: int, kv_heads: int, config: DistributedConfig
) -> Arrangement:
    """A plan's calls with so many heads, where ``degree`` ranks exchange them; all ranks ask."""
    mesh, split = Mesh(plan.world, degree, plan.rank), Split.of(q_heads, kv_heads, degree)
    held = split.held(mesh.place) if degree > 1 else None
    around = ring_plan(plan.plan, degree) if degree > 1 else plan.plan
    per_host, timeout = config.per_host(plan.world), config.timeout
    if config.ranks_per_host == "auto" and per_host < plan.world:
        agreed = agreed_per_host(plan.group, per_host, timeout)
        per_host = plan.world if agreed is None else agreed  # else no two levels fit all hosts
    ring: RankPlan | Levels | None = levels_of(
        around, plan.group, mesh, per_host, plan.sequences, held, timeout
    )
    if ring is None:
        group = part_of(plan.group, mesh.ring_peers, timeout)
        ring = RankPlan(around, plan.sequences, group, held=held, within=True)
    return Arrangement(mesh, split, ring, *places(plan, around, mesh))
