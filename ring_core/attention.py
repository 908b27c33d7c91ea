"""The attention module that every variant subclasses: config, plans, and the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ring_core import groups
from ring_core.agreement import agreement_of
from ring_core.calls import AnyCall, Call
from ring_core.compiling import untraced
from ring_core.config import RingAttentionConfig
from ring_core.errors import ConfigError, InputError
from ring_core.exchange import Exchange
from ring_core.operator import NO_PLAN, attend, number_of
from ring_core.plan import Plan
from ring_core.prediction.memory import Sizes
from ring_core.prediction.rates import Rates
from ring_core.prediction.timeline import Prediction, Where, predict
from ring_core.protocols import AttentionKernel, Communicator
from ring_core.rank_plan import RankPlan
from ring_core.registry import Registry
from ring_core.registry import registry as default_registry
from ring_core.runtime import Runtime
from ring_core.sequences import Sequences

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class BaseRingAttention(nn.Module):
    """Attention over sequences sharded across a group. A variant overrides :meth:`make_plan`.

    It has no parameters; projections stay the model's. It can be pickled and deep-copied; a group
    given explicitly is then found again by name.

    Args:
        config: the variant's schema, or a base config that is widened to it.
        group: ProcessGroup or 1-D DeviceMesh; None takes the default group, looked up at each plan.
        registry: where kernels, communicators and observers come from.
        fields: override those of ``config``.

    Raises:
        ConfigError: a field is unknown, out of range, or has no meaning beside another.
    """

    config_class: ClassVar[type[RingAttentionConfig]] = RingAttentionConfig

    rearranges: bool = False
    """Whether plans may have tiles count rows in another order than the sequence's own: calls
    without a plan must then find out."""

    config: RingAttentionConfig

    def __init__(
        self,
        config: RingAttentionConfig | Mapping[str, Any] | None = None,
        *,
        group: Any = None,
        registry: Registry | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        if fields or not isinstance(config, self.config_class):
            config = self.config_class(**{**self._given(config), **fields})
        self.config = config
        self._group = None if group is None else groups.resolve(group)
        self._registry = registry or default_registry
        self._runtime: Runtime | None = None
        self._number = torch.tensor(number_of(self), device="cpu")
        self.runtime.check_parts()

    @classmethod
    def _given(cls, config: RingAttentionConfig | Mapping[str, Any] | None) -> dict[str, Any]:
        """Explicit fields of a config that may be another schema's, for this class's own."""
        given = config.given() if isinstance(config, RingAttentionConfig) else dict(config or {})
        meant, own = given.get("variant", "auto"), cls.config_class.model_fields["variant"].default
        if meant == "auto":
            given.pop("variant", None)
        elif meant != own and not isinstance(config, cls.config_class):
            raise ConfigError(
                f"variant: {cls.__name__} is {own!r}, and the config is for {meant!r}"
            )
        return given

    # What a variant brings

    def make_plan(self, sequences: Sequences, world: int) -> Plan:
        """The planner: from this config and these sequences to a plan, the same on every rank.

        Communicates with nobody and reads nothing but its arguments and the config.
        """
        raise NotImplementedError(f"{type(self).__name__} must define make_plan")

    def make_implied_plan(self, sequences: Sequences, world: int) -> Plan:
        """The plan of a call without one, whose shards are those of the sequence's own order."""
        return self.make_plan(sequences, world)

    def choose(self, plan: RankPlan, q: Tensor, k: Tensor, exchange: Exchange) -> Any:
        """What masks of the plan must know of a call's tensors; None where that is nothing.

        Called before the forward and, with the same tensors, before the backward, on every rank.
        :meth:`ring_core.masks.Mask.filled` is given what it returns.

        Args:
            q: [B, S_local, Hq, D]. k: [B, Skv_local, Hkv, D]: this rank's shards.
            exchange: to reach the other ranks with.
        """
        return None

    def predict(self, plan: Plan, sizes: Sizes, rates: Rates, where: Where) -> Prediction:
        """How long a call with ``plan`` would take on the slowest rank of a machine.

        A variant that does more than attend, such as exchanging heads before, overrides this.

        Raises:
            InputError: the rates lack what this attention would compute or send with.
        """
        where = replace(where, overlap=self.config.overlap)
        return predict(plan, sizes, rates, where, self.candidates)

    @property
    def candidates(self) -> list[AttentionKernel]:
        """The kernels that the config allows, the best first, whether or not they run here."""
        config = self.config
        allowed = [
            kernel
            for kernel in self.runtime.kernels
            if config.kernel in ("auto", kernel.name)
            and (kernel.supports_dropout or not config.dropout)
        ]
        return sorted(allowed, key=lambda kernel: kernel.priority, reverse=True)

    # What users call

    @untraced
    def plan(
        self,
        seq_len: int | None = None,
        *,
        kv_len: int | None = None,
        cu_seqlens: Any = None,
        kv_cu_seqlens: Any = None,
        lengths: Any = None,
    ) -> RankPlan:
        """Plan a sequence of any length >= 1 over the group; talks to no other rank; cached.

        Args:
            seq_len: tokens of the sequence (of the queries, for cross-attention).
            kv_len: tokens of the keys, for cross-attention; ends are aligned.
            cu_seqlens: 0 and the end of each packed document. kv_cu_seqlens: the keys' own.
            lengths: valid tokens of each batch row of a padded batch.

        Raises:
            InputError: a number is out of range or a combination has no meaning.
        """
        sequences = Sequences.build(
            seq_len,
            kv_len=kv_len,
            cu_seqlens=cu_seqlens,
            kv_cu_seqlens=kv_cu_seqlens,
            lengths=lengths,
        )
        return self._planned(sequences, self.make_plan)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: RankPlan | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of this rank's queries over the whole sequence; a collective of the group.

        Args:
            q: [B, S_local, Hq, D]. k: [B, Skv_local, Hkv, D]. v: [B, Skv_local, Hkv, Dv]: shards of
                ``plan``. Any strides; float64, float32, bfloat16 or float16; Hq a multiple of Hkv.
            plan: of this attention. May be left out on one rank, or where ``layout`` was given:
                then the inputs are equal shards of S_local * world tokens in that layout.
            return_lse: also return the log-sum-exp of the scores.

        Returns:
            out [B, S_local, Hq, Dv] in q's dtype, and lse [B, Hq, S_local], natural log, float32
            (float64 for float64 inputs), if asked for. Both are differentiable.

        Raises:
            InputError: shapes, dtypes or devices do not fit each other or the plan.
            DisagreementError: the ranks' calls differ, or a rank is missing (first call of a kind).
            RingTimeoutError: a peer did not deliver within ``timeout``.
            KernelError, CommunicatorError: nothing installed can do this.
        """
        if not torch.compiler.is_compiling():  # a graph is made of tensors and a plan
            self._check_types(q, k, v, plan)
        if plan is None and self.rearranges and self._is_alone and q.ndim == k.ndim == 4:
            plan = self._implied_plan(q, k)
        q, k, v = autocast(q, k, v)
        number = NO_PLAN if plan is None else plan.number
        rows = None if plan is None else plan.rearranged
        if rows is not None:
            queries, keys, back = (x.to(q.device) for x in rows)
            q, k, v = q[:, queries], k[:, keys], v[:, keys]
        out, lse = attend(self._number, number, q, k, v, self.training)
        if rows is not None:
            out, lse = out[:, back], lse[:, :, back]
        return (out, lse) if return_lse else out

    def communicator(
        self, plan: RankPlan, device: torch.device | str = "cpu"
    ) -> Communicator | None:
        """The communicator that calls with ``plan`` use on ``device``; None for one rank.

        Its ``counters`` hold bytes and waiting time. On GPUs, where no call was made yet, every
        rank of the group must ask: they compare how they reach each other.
        """
        return self.runtime.communicator(plan, torch.device(device))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in sorted(self.config.given().items()))

    # Inside

    def begin(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: RankPlan | None,
        training: bool,
        wants: tuple[bool, bool, bool],
    ) -> AnyCall:
        """Number a call and check its inputs; what the operator runs first."""
        group = plan.group if plan is not None else self._target()
        number = self._next_call(group)
        try:
            check_tensors(q, k, v)
            if plan is None:
                plan = self._implied_plan(q, k)
            self._check_plan(plan)
            check_against_plan(q, k, v, plan)
            # Drawn from torch's CPU generator, so that checkpointing replays it.
            drops = self.config.dropout and training
            seed = int(torch.randint(2**62, ()).item()) if drops else 0
            return self.resume(q, k, v, plan, training, wants, number, seed)
        except Exception as error:
            self._refuse(group, number, error)
            raise

    def resume(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: RankPlan | None,
        training: bool,
        wants: tuple[bool, bool, bool],
        number: int,
        seed: int,
    ) -> AnyCall:
        """The call of that number again, for its backward."""
        return self.make_call(
            self._implied_plan(q, k) if plan is None else plan,
            q,
            k,
            v,
            number=number,
            training=training,
            wants=wants,
            seed=seed,
        )

    def make_call(self, plan: RankPlan, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> AnyCall:
        """What runs forward and backward of a call; ``call``: see :class:`ring_core.calls.Call`.

        Raises:
            InputError: the tensors do not fit the config.
            PlanError: the plan's tiles do not fit its shards.
        """
        plan.check(k.shape[2])  # here: no other rank waits for this one's tiles yet
        return Call(self.runtime, self.choose, plan, q, k, v, **call)

    @staticmethod
    def _next_call(group: Any | None) -> int:
        alone = group is None or groups.rank_and_world(group)[1] == 1
        return 0 if alone else agreement_of(group).next_call()

    @staticmethod
    def _refuse(group: Any | None, number: int, error: Exception) -> None:
        """The other ranks must not wait for this one, nor meet its next call in this one."""
        if number:
            agreement_of(group).refuse(number, str(error))

    def _check_types(self, q: Any, k: Any, v: Any, plan: Any) -> None:
        try:
            check_types(q, k, v)
            if plan is not None and not isinstance(plan, RankPlan):
                raise InputError(
                    f"plan is a {type(plan).__name__}; get one from attn.plan(seq_len)"
                )
        except InputError as error:
            group = plan.group if isinstance(plan, RankPlan) else self._target()
            self._refuse(group, self._next_call(group), error)
            raise

    @property
    def runtime(self) -> Runtime:
        """Kernels, communicators and caches; made again in a copy."""
        if self._runtime is None:
            self._runtime = Runtime(self.config, self._registry)
        return self._runtime

    def _planned(self, sequences: Sequences, make: Callable[[Sequences, int], Plan]) -> RankPlan:
        group = self._target()
        plan: RankPlan = self.runtime.plans.get(
            (sequences, group, make.__name__),
            lambda: RankPlan(
                make(sequences, groups.rank_and_world(group)[1]),
                sequences,
                group,
                made_by=self._planning,
                timeout=self.config.timeout,
            ),
        )
        return plan

    @property
    def _is_alone(self) -> bool:
        return groups.rank_and_world(self._target())[1] == 1

    def _target(self) -> Any | None:
        """The group that plans are for: the one given, or the default group of this moment."""
        if isinstance(self._group, str):  # this is a copy out of a pickle
            self._group = groups.by_name(self._group)
        return self._group if self._group is not None else groups.resolve(None)

    @cached_property
    def _planning(self) -> tuple[Any, ...]:
        """What a plan of this attention depends on beside the sequence; a config is frozen."""
        return type(self), str(sorted(self.config.planning().items()))

    def _check_plan(self, plan: RankPlan) -> None:
        if plan.made_by != self._planning:
            raise InputError(
                f"{plan!r} was made by an attention of another config; get one from this "
                f"attention, {type(self).__name__}({self.extra_repr()})"
            )

    def _implied_plan(self, q: Tensor, k: Tensor) -> RankPlan:
        world = groups.rank_and_world(self._target())[1]
        if world > 1 and self.config.layout == "auto":
            raise InputError(
                f"a call without a plan in a group of {world} ranks needs to know which tokens the "
                "shards hold: pass plan=attn.plan(seq_len), or create the attention with "
                "layout='contiguous', 'zigzag' or 'striped'"
            )
        kv_len = k.shape[1] * world if k.shape[1] != q.shape[1] else None
        sequences = Sequences.build(q.shape[1] * world, kv_len=kv_len)
        return self._planned(sequences, self.make_implied_plan)

    def __getstate__(self) -> dict[str, Any]:
        # A process group is known by name, and looked up when the copy first plans.
        group = self._group
        named = group if group is None or isinstance(group, str) else group.group_name
        registry = None if self._registry is default_registry else self._registry
        return {**self.__dict__, "_runtime": None, "_group": named, "_registry": registry}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._registry = state["_registry"] or default_registry
        self._number = torch.tensor(number_of(self), device="cpu")


def check_types(q: Any, k: Any, v: Any) -> None:
    """Refuse what is no tensor of this rank.

    Raises:
        InputError: names it.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise InputError(f"{name} is a {type(x).__name__}, not a tensor")
        if hasattr(x, "to_local"):
            raise InputError(f"{name} is a DTensor; pass this rank's shard, {name}.to_local()")


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors as scaled_dot_product_attention would cast them; float64 stays."""
    kind = q.device.type
    if not torch.is_autocast_enabled(kind):
        return q, k, v
    half = torch.get_autocast_dtype(kind)
    q, k, v = (x.to(half) if x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse tensors that do not fit each other.

    Raises:
        InputError: names the shapes and what should be equal.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise InputError(f"{shapes}: expected [batch, rows, heads, head_dim] for each")
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: they must be of one dtype")
    if q.dtype not in DTYPES:
        raise InputError(f"{q.dtype}: expected one of {', '.join(map(str, DTYPES))}")
    if not q.device == k.device == v.device:
        raise InputError(f"q is on {q.device}, k on {k.device}, v on {v.device}: move them to one")
    if min(*q.shape, *k.shape, *v.shape) < 1:
        raise InputError(f"{shapes}: every size must be at least 1")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise InputError(f"{shapes}: batch sizes differ")
    if k.shape[1:3] != v.shape[1:3]:
        raise InputError(f"{shapes}: k and v must have the same rows and heads")
    if q.shape[3] != k.shape[3]:
        raise InputError(f"{shapes}: q and k must have the same head_dim")
    if q.shape[2] % k.shape[2]:
        raise InputError(
            f"{shapes}: {q.shape[2]} query heads are no multiple of {k.shape[2]} key/value heads"
        )


def check_against_plan(q: Tensor, k: Tensor, v: Tensor, plan: RankPlan) -> None:
    """Refuse shards that are not the plan's.

    Raises:
        InputError: names the lengths and how to get right ones.
    """
    for name, x, rows, kv in (("q", q, plan.local_len, False), ("k", k, plan.kv_local_len, True)):
        if x.shape[1] != rows:
            hint = ", kv=True" if kv and plan.sequences.cross else ""
            raise InputError(
                f"{name} {tuple(x.shape)} has {x.shape[1]} rows, and each shard of {plan!r} has "
                f"{rows}: use plan.shard({name}_full, dim=1{hint})"
            )
    lengths = plan.sequences.lengths
    if lengths is not None and len(lengths) != q.shape[0]:
        raise InputError(f"q {tuple(q.shape)}: the plan has lengths for a batch of {len(lengths)}")
