"""The schema of variant ``distributed``: common fields, another variant, and a mesh of ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from ring_core import registry
from ring_core.config import RingAttentionConfig, common_fields
from ring_core.errors import ConfigError

NAME = "distributed"
BACKOFF = 0.5
LOOPBACK = "127.0.0.1"


def _inner(given: Any) -> Any:
    """A variant's name, or its fields, as a config of its own fields."""
    if isinstance(given, str):
        given = {"variant": given}
    if not isinstance(given, Mapping):
        raise ValueError(
            f"expected the name of a variant or its fields, got {type(given).__name__}"
        )
    fields = dict(given)
    name = fields.pop("variant", "standard")
    if name == "auto":  # as a base config has it
        name = "standard"
    if name == NAME:
        raise ValueError(
            f"{NAME!r} cannot be wrapped in itself; name the variant that computes, such as "
            "'standard'"
        )
    try:
        return registry.variant(name).config(variant=name, **fields)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _as_given(inner: RingAttentionConfig) -> Any:
    given = inner.given()
    own = {name: value for name, value in inner.model_dump(mode="json").items() if name in given}
    return own.pop("variant") if set(own) == {"variant"} else own


Inner = Annotated[
    RingAttentionConfig, BeforeValidator(_inner), PlainSerializer(_as_given, return_type=Any)
]


class DistributedConfig(RingAttentionConfig):
    """Another variant's attention, on a mesh of ranks."""

    variant: str = NAME
    """Name under which the registry knows this variant."""

    inner: Inner = Field(default="standard", validate_default=True)
    """The variant that computes: its name, or its fields, as in {"variant": "blocksparse",
    "patterns": [...]}. Common fields belong here, beside it, and reach it."""

    ulysses: Annotated[int, Field(ge=1, strict=True)] | Literal["auto"] = "auto"
    """Degree of Ulysses (arXiv 2309.14509): so many neighbouring ranks exchange heads for rows, and
    rings go over what is left. It divides the number of ranks, and the heads must allow it: it is
    at most the number of KV heads, or a multiple of it of which each KV head's query heads are one.
    'auto' takes the degree that is predicted to be fastest; 1 is a ring of all ranks. A group of
    one rank exchanges nothing."""

    ranks_per_host: Annotated[int, Field(ge=1, strict=True)] | Literal["auto"] = "auto"
    """How many neighbouring ranks share a host. A ring of several hosts goes in two levels: keys
    cross between hosts once, while a ring within each host goes over those that came before.
    'auto' takes what a launcher says (LOCAL_WORLD_SIZE), or one host. Where hosts have unequally
    many, or it does not divide the ranks, or the degree not it, rings have one level."""

    retries: int = Field(default=0, ge=0, le=20, strict=True)
    """How often a call is tried again whose transfers failed, by agreement of all its ranks, on a
    fresh process group and from unchanged inputs; one rank has no transfers. With retries or checks
    the ranks meet after every forward and backward, so that each ends alike on all of them: no rank
    runs ahead."""

    backoff: float = Field(default=BACKOFF, ge=0, allow_inf_nan=False)
    """Seconds before the first retry; twice as long before each further one."""

    check_finite: bool = False
    """Whether inputs, out and gradients are checked for infinite numbers and NaN, outside padding;
    all ranks then raise one error that names rank, tensor and token."""

    monitor: bool = False
    """Whether each forward and backward is timed on each rank: computing, waiting for data, bytes,
    retries, memory, and who computes for longer than the others. ``attention.monitor.records``
    holds the last ones."""

    metrics_log: str | None = Field(default=None, min_length=1)
    """Folder for a file of JSON lines for each process, one line a forward or backward; turns the
    monitor on."""

    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of rank 0's HTTP endpoint for Prometheus; the ranks of a host listen on the ports from
    there on; 0 takes free ones. Turns the monitor on."""

    metrics_host: str = Field(default=LOOPBACK, min_length=1)
    """Address that endpoints listen on; only this machine by default."""

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, given: Any) -> Any:
        """Common fields that were given in ``inner`` belong to this config."""
        if not isinstance(given, Mapping) or not isinstance(
            given.get("inner"), (Mapping, RingAttentionConfig)
        ):
            return given
        inner = given["inner"]
        fields = (
            {**inner.given(), "variant": inner.variant}
            if isinstance(inner, RingAttentionConfig)
            else dict(inner)
        )
        lifted = {name: fields.pop(name) for name in common_fields() & set(fields) - {"variant"}}
        for name, value in lifted.items():
            if name in given and not _equal(given[name], value):
                raise ValueError(
                    f"{name}: {given[name]!r} here and {value!r} in inner; give it once, beside "
                    "inner"
                )
        return {**lifted, **given, "inner": fields}

    @model_validator(mode="after")
    def _inner_accepts(self) -> Self:
        self.whole_inner()
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> Self:
        if self.metrics_host != LOOPBACK and self.metrics_port is None:
            raise ValueError("metrics_host: nothing listens without metrics_port; give one")
        if self.backoff != BACKOFF and not self.retries:
            raise ValueError("backoff: nothing is tried again without retries; give some")
        return self

    def per_host(self, world: int) -> int:
        """Ranks of a host, of so many ranks."""
        if self.ranks_per_host != "auto":
            return self.ranks_per_host
        return int(os.environ.get("LOCAL_WORLD_SIZE", world))

    @property
    def monitored(self) -> bool:
        """Whether calls are timed."""
        return self.monitor or self.metrics_log is not None or self.metrics_port is not None

    def planning(self) -> dict[str, Any]:
        return self.whole_inner().planning()  # a mesh changes who computes, not who holds what

    def of_variant(self, name: str) -> RingAttentionConfig:
        return self.whole_inner() if name == self.inner.variant else self

    def whole_inner(self) -> RingAttentionConfig:
        """The inner variant's config with the common fields.

        Raises:
            ConfigError: it does not accept them.
        """
        names = common_fields() - {"variant"}
        common = {name: value for name, value in self.given().items() if name in names}
        return type(self.inner)(**{**self.inner.given(), **common})


def _equal(a: Any, b: Any) -> bool:
    """Whether two values of a field mean the same; lists and tuples do."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return list(a) == list(b)
    return bool(a == b)
