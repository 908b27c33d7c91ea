"""The attention module that every variant subclasses: config, plans, and the call."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ring_core import engine, groups
from ring_core.agreement import Agreement, Signature
from ring_core.choice import choose
from ring_core.config import RingAttentionConfig
from ring_core.engine import Program, Settings
from ring_core.errors import (
    CommunicatorError,
    ConfigError,
    DifferentiationError,
    InputError,
    KernelError,
    RingTimeoutError,
    did_you_mean,
)
from ring_core.plan import Plan
from ring_core.protocols import AttentionKernel, Communicator, Problem
from ring_core.rank_plan import RankPlan
from ring_core.registry import Registry
from ring_core.registry import registry as default_registry
from ring_core.sequences import Sequences

logger = logging.getLogger("ring_core")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLANS = 32

_agreements: WeakKeyDictionary[Any, Agreement] = WeakKeyDictionary()


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

    config: RingAttentionConfig

    def __init__(
        self,
        config: RingAttentionConfig | None = None,
        *,
        group: Any = None,
        registry: Registry | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        if fields or not isinstance(config, self.config_class):
            given = config.given() if config is not None else {}
            config = self.config_class(**{**given, **fields})
        self.config = config
        self._group = None if group is None else groups.resolve(group)
        self._registry = registry or default_registry
        self._runtime: _Runtime | None = None
        self.runtime.check_parts()

    # What a variant brings

    def make_plan(self, sequences: Sequences, world: int) -> Plan:
        """The planner: from this config and these sequences to a plan, the same on every rank.

        Communicates with nobody and reads nothing but its arguments and the config.
        """
        raise NotImplementedError(f"{type(self).__name__} must define make_plan")

    # What users call

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
        group = self._group if self._group is not None else groups.resolve(None)
        plans = self.runtime.plans
        key = (sequences, group)
        if key not in plans:
            world = groups.rank_and_world(group)[1]
            plans[key] = RankPlan(self.make_plan(sequences, world), sequences, group)
            if len(plans) > _PLANS:
                plans.popitem(last=False)
        plans.move_to_end(key)
        return plans[key]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
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
        try:
            check_shapes(q, k, v)
            if plan is None:
                plan = self._implied_plan(q, k)
            check_against_plan(q, k, v, plan)
        except InputError as error:
            self._refuse(plan, error)
            raise
        call = self.runtime.call(q, k, v, plan, self.training)
        out, lse = _Ring.apply(q, k, v, call)  # type: ignore[no-untyped-call]
        return (out, lse) if return_lse else out

    def communicator(
        self, plan: RankPlan, device: torch.device | str = "cpu"
    ) -> Communicator | None:
        """The communicator that calls with ``plan`` use on ``device``; None for one rank.

        Its ``counters`` hold bytes and waiting time.
        """
        return self.runtime.communicator(plan, torch.device(device))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in sorted(self.config.given().items()))

    # Inside

    @property
    def runtime(self) -> _Runtime:
        """Kernels, communicators and caches; made again in a copy."""
        if self._runtime is None:
            self._runtime = _Runtime(self.config, self._registry)
        return self._runtime

    def _implied_plan(self, q: Tensor, k: Tensor) -> RankPlan:
        group = self._group if self._group is not None else groups.resolve(None)
        world = groups.rank_and_world(group)[1]
        if world > 1 and self.config.layout == "auto":
            raise InputError(
                f"a call without a plan in a group of {world} ranks needs to know which tokens the "
                "shards hold: pass plan=attn.plan(seq_len), or create the attention with "
                "layout='contiguous', 'zigzag' or 'striped'"
            )
        kv_len = k.shape[1] * world if k.shape[1] != q.shape[1] else None
        return self.plan(q.shape[1] * world, kv_len=kv_len)

    def _refuse(self, plan: RankPlan | None, error: InputError) -> None:
        """Let the other ranks fail with this rank's error instead of waiting for it."""
        group = plan.group if isinstance(plan, RankPlan) else self._group or groups.resolve(None)
        if group is not None and groups.rank_and_world(group)[1] > 1:
            agreement_of(group).refuse(str(error))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_runtime"] = None
        state["_group"] = None if self._group is None else self._group.group_name
        if self._registry is default_registry:
            state["_registry"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        name = state["_group"]
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._group = None if name is None else groups.by_name(name)
        self._registry = state["_registry"] or default_registry


def agreement_of(group: Any) -> Agreement:
    """The agreement of a group, shared by all its attentions."""
    if group not in _agreements:
        _agreements[group] = Agreement(group)
    return _agreements[group]


class _Runtime:
    """What an attention holds beside its config: kernels, communicators and what was chosen."""

    def __init__(self, config: RingAttentionConfig, registry: Registry) -> None:
        self.config = config
        self.origin = registry.origin(config.variant)
        self.observers = registry.observers(config)
        self.kernels = registry.kernels(config)
        self.communicator_classes = registry.communicators(config)
        self.plans: OrderedDict[tuple[Sequences, Any], RankPlan] = OrderedDict()
        self._kernels: dict[Problem, AttentionKernel] = {}
        self._communicators: WeakKeyDictionary[Any, dict[str, Communicator]] = WeakKeyDictionary()
        self._programs: OrderedDict[tuple[int, str], tuple[RankPlan, Program]] = OrderedDict()
        self._signatures: OrderedDict[tuple[Any, ...], tuple[RankPlan, Signature]] = OrderedDict()

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

    def call(self, q: Tensor, k: Tensor, v: Tensor, plan: RankPlan, training: bool) -> _Call:
        """Everything one call needs; the first of its kind is compared with the other ranks'."""
        dropout = self.config.dropout if training else 0.0
        settings = Settings(
            scale=self.config.scale(q.shape[-1]),
            overlap=self.config.overlap,
            deterministic=self.config.deterministic,
            dropout=dropout,
            # Drawn from torch's CPU generator, so that checkpointing replays it.
            seed=int(torch.randint(2**62, ()).item()) if dropout else 0,
        )
        self._agree(q, k, v, plan, dropout)
        return _Call(self, plan, settings, self.communicator(plan, q.device))

    def program(self, plan: RankPlan, q: Tensor, value_dim: int, dropout: bool) -> Program:
        """The plan's tiles lowered for the kernel that fits."""
        problem = Problem(
            q.device,
            q.dtype,
            q.shape[-1],
            value_dim,
            plan.masks,
            dropout,
            self.config.deterministic,
        )
        kernel = self.kernel(problem)
        key = (id(plan), kernel.name)
        if key not in self._programs:
            self._programs[key] = (plan, Program.build(plan.plan, plan.rank, kernel))
            if len(self._programs) > 2 * _PLANS:
                self._programs.popitem(last=False)
        return self._programs[key][1]

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
                )
            best = choice.taken
            logger.info("kernel %r for %s", best.name, problem)
            for observer in self.observers:
                best = observer.kernel(best)
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
            choice = choose(
                self.communicator_classes,
                lambda kind: kind.refuse(plan.group, device),
                self.config.communicator,
            )
            if choice.taken is None:
                raise CommunicatorError(
                    f"no communicator for {device.type} tensors in this group of {plan.world} "
                    f"ranks: {choice.reasons or 'none installed'}"
                )
            communicator = choice.taken(plan.group, self.config.timeout)
            logger.info("communicator %r for %s tensors", choice.taken.name, device.type)
            for observer in self.observers:
                communicator = observer.communicator(communicator)
            made[device.type] = communicator
        return made[device.type]

    def _agree(self, q: Tensor, k: Tensor, v: Tensor, plan: RankPlan, dropout: float) -> None:
        if plan.group is None or plan.world == 1:
            return
        graph = torch.is_grad_enabled()
        wants = tuple(graph and x.requires_grad for x in (q, k, v))
        key = (id(plan), q.shape, k.shape, v.shape, q.dtype, q.device.type, wants, dropout)
        if key not in self._signatures:
            self._signatures[key] = (plan, self._signature(q, k, v, plan, wants, dropout))
            if len(self._signatures) > 4 * _PLANS:
                self._signatures.popitem(last=False)
        agreement_of(plan.group).check(self._signatures[key][1], self.config.timeout)

    def _signature(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: RankPlan,
        wants: tuple[bool, ...],
        dropout: float,
    ) -> Signature:
        spec = plan.sequences
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
                "plan": hashlib.sha256(repr(plan.plan).encode()).hexdigest()[:16],
                "dtype": str(q.dtype),
                "device": q.device.type,
                "q": str(tuple(q.shape)),
                "k": str(tuple(k.shape)),
                "v": str(tuple(v.shape)),
                "requires grad (q, k, v)": str(wants),
                "dropout in this mode": str(dropout),
            }
        )


def _brief(value: Any) -> str:
    text = str(value)
    return (
        text
        if len(text) <= 120
        else f"{text[:100]}... #{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    )


class _Call:
    """One call: its plan and settings, and the engine's programs for it."""

    def __init__(
        self,
        runtime: _Runtime,
        plan: RankPlan,
        settings: Settings,
        communicator: Communicator | None,
    ) -> None:
        self.runtime, self.plan, self.settings = runtime, plan, settings
        self.communicator = communicator

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        program = self.runtime.program(self.plan, q, v.shape[-1], bool(self.settings.dropout))
        with engine.quiet(q.device), self.failing_alike():
            return engine.forward(program, q, k, v, self.communicator, self.settings)

    def backward(
        self, dout: Tensor, dlse: Tensor | None, saved: tuple[Tensor, ...], need_kv: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = saved
        value_dim = v.shape[-1] + (dlse is not None)
        program = self.runtime.program(self.plan, q, value_dim, bool(self.settings.dropout))
        with engine.quiet(q.device), self.failing_alike():
            return engine.backward(
                program,
                dout,
                q,
                k,
                v,
                out,
                lse,
                self.communicator,
                self.settings,
                dlse=dlse,
                need_kv=need_kv,
            )

    def failing_alike(self) -> _FailingAlike:
        return _FailingAlike(self.plan.group)


class _FailingAlike:
    """Turn a late peer into the one error that every rank of the group raises."""

    def __init__(self, group: Any | None) -> None:
        self.group = group

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RingTimeoutError) and self.group is not None:
            try:
                agreed = agreement_of(self.group).fail(error)
            except RuntimeError:  # the store went down with the rank that served it
                return
            raise agreed from error


class _Ring(torch.autograd.Function):
    """The engine under autograd."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        wide, lse = call.forward(q, k, v)
        out = wide.to(q.dtype)
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():  # create_graph=True: these gradients would carry no graph
            raise DifferentiationError(
                "ring attention is differentiable once: call backward or autograd.grad without "
                "create_graph=True, or compute this layer with dense attention"
            )
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        need_q, need_k, need_v, _ = ctx.needs_input_grad
        dq, dk, dv = ctx.call.backward(dout, dlse, (q, k, v, out, lse), need_k or need_v)
        return (
            dq.to(q.dtype) if need_q else None,
            dk.to(k.dtype) if need_k else None,
            dv.to(v.dtype) if need_v else None,
            None,
        )


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
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
    if not isinstance(plan, RankPlan):
        raise InputError(f"plan is a {type(plan).__name__}; get one from attn.plan(seq_len)")
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
