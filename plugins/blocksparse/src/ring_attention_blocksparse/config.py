"""The schema of variant ``blocksparse``: the common fields, patterns and block sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from ring_attention_blocksparse.grids import GridPattern, Neighborhood, WindowBlocks
from ring_attention_blocksparse.patterns import (
    Dilated,
    GlobalTokens,
    Local,
    Pattern,
    Sink,
    Strided,
)
from ring_attention_blocksparse.whole import GivenBlocks, Random, TopK
from ring_core import registry
from ring_core.config import RingAttentionConfig
from ring_core.errors import did_you_mean

SHIPPED: tuple[type[Pattern], ...] = (
    Local,
    Sink,
    GlobalTokens,
    Strided,
    Dilated,
    Neighborhood,
    WindowBlocks,
    Random,
    GivenBlocks,
    TopK,
)
"""The kinds that this plugin brings itself."""


def kinds() -> dict[str, type[Pattern]]:
    """Every kind of pattern by name: those shipped, and those of other plugins.

    Raises:
        ValueError: two kinds have one name.
    """
    found: dict[str, type[Pattern]] = {}
    brought = (one for answer in registry.ask("blocksparse_patterns") for one in answer or ())
    for one in (*SHIPPED, *brought):
        name = one.model_fields["kind"].default
        if not isinstance(name, str):
            raise ValueError(
                f"{one.__module__}.{one.__name__} has no kind: give it a field "
                '`kind: Literal["name"] = "name"`'
            )
        if found.setdefault(name, one) is not one:
            raise ValueError(
                f"pattern kind {name!r} is brought by {found[name].__module__} and by "
                f"{one.__module__}; rename one of them"
            )
    return found


def _pattern(given: Any) -> Any:
    """A mapping as the pattern of its kind."""
    if not isinstance(given, Mapping):
        return given
    known = kinds()
    kind = given.get("kind")
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(
            f"unknown kind of pattern {kind!r}.{did_you_mean(str(kind), known)} "
            f"Known: {', '.join(known)}"
        )
    return known[kind].model_validate(given)


def _in_order(given: Any) -> Any:
    if isinstance(given, (str, Mapping, Pattern)) or not isinstance(given, Sequence):
        raise ValueError('give a list of patterns, as in [{"kind": "sink", "n": 4}]')
    return given


class _AnyKind:
    """The JSON schema of a pattern: one of the kinds that are known when it is asked for."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"oneOf": [one.model_json_schema() for one in kinds().values()]}


AnyPattern = Annotated[SerializeAsAny[Pattern], BeforeValidator(_pattern), _AnyKind()]


class BlockSparseConfig(RingAttentionConfig):
    """Attention to what some patterns let a query see; the mask of the common fields is AND-ed."""

    variant: str = "blocksparse"
    """Name under which the registry knows this variant."""

    patterns: Annotated[tuple[AnyPattern, ...], BeforeValidator(_in_order)] | None = Field(
        default=None, min_length=1
    )
    """What a query sees: any of these (they are OR-ed); None: all that the mask lets through."""

    block_q: int = Field(default=128, ge=1)
    """Tokens of a query block."""

    block_kv: int = Field(default=128, ge=1)
    """Tokens of a key block."""

    @model_validator(mode="after")
    def _no_dilation(self) -> Self:
        if self.patterns and self.segment_lengths:
            raise ValueError(
                "patterns with segment_lengths and dilation_rates: not defined; give one of them "
                '(a pattern of kind "dilated" is a dilated window)'
            )
        return self

    @model_validator(mode="after")
    def _heads(self) -> Self:
        """Those that patterns need must be there all at once."""
        given = {one.kv_heads for one in self.patterns or () if one.kv_heads is not None}
        if len(given) > 1:
            counts = " and ".join(map(str, sorted(given)))
            raise ValueError(f"patterns are for {counts} KV heads; a call has one number of them")
        for pattern in self.patterns or ():
            for kv_heads in given:
                if trouble := pattern.check_heads(kv_heads):
                    raise ValueError(f"pattern {pattern.kind!r}: {trouble}")
        return self

    @model_validator(mode="after")
    def _grids(self) -> Self:
        for pattern in self.patterns or ():
            if isinstance(pattern, GridPattern) and pattern.grid is None:
                raise ValueError(
                    f"pattern {pattern.kind!r} needs a grid, as in grid=(32, 32): only variant "
                    "'hilbert' has one of its own"
                )
        return self
