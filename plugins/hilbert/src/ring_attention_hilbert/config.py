"""The schema of variant ``hilbert``: patterns and blocks, a grid or segments, and an order."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from ring_attention_blocksparse.config import BlockSparseConfig
from ring_attention_blocksparse.grids import GridPattern, by_axis
from ring_attention_blocksparse.patterns import GlobalTokens, Pattern, Positive

OrderName = Literal["auto", "hilbert", "morton", "tile", "row"]


class HilbertConfig(BlockSparseConfig):
    """Block-sparse, dense or dilated attention over tokens that are laid out on a curve first."""

    variant: str = "hilbert"
    """Name under which the registry knows this variant."""

    grid: tuple[Positive, ...] | None = Field(default=None, min_length=2, max_length=3)
    """Cells of a picture (height, width) or a video (frames, height, width), whose tokens are in
    row-major order; None: the sequence has one dimension."""

    segment_length: int | None = Field(default=None, ge=1)
    """Tokens of a segment of a sequence of one dimension; each is folded to a square and walked by
    itself. None: the whole sequence is one segment."""

    prefix: int = Field(default=0, ge=0)
    """Tokens before the grid (text, a class token): they see and are seen by all."""

    order: OrderName = "auto"
    """The curve: ``hilbert``, ``morton`` (Z-order), ``tile`` (boxes of about a block, row by row)
    or ``row`` (as the tokens come); ``auto`` takes the cheapest by active blocks, remote keys and
    balance, and ``row`` where nothing is sparse."""

    @field_validator("grid", mode="before")
    @classmethod
    def _in_order(cls, given: Any) -> Any:
        return by_axis(given)

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if self.grid is not None and self.segment_length is not None:
            raise ValueError(
                f"grid={self.grid} and segment_length={self.segment_length}: a sequence is a grid, "
                "or segments of one dimension; give one of them"
            )
        if self.prefix and self.grid is None:
            raise ValueError(
                f"prefix={self.prefix} without a grid: tokens before what? Give a grid; tokens of "
                'a sequence that all see are a pattern, {"kind": "global_tokens"}'
            )
        return self

    @model_validator(mode="after")
    def _grids(self) -> Self:
        for pattern in self.patterns or ():
            if isinstance(pattern, GridPattern) and pattern.grid is None and self.grid is None:
                raise ValueError(
                    f"pattern {pattern.kind!r} needs a grid: give grid=(height, width), to it or "
                    "to the config"
                )
            try:
                self._with_grid(pattern)
            except ValidationError as error:
                raise ValueError(f"pattern {pattern.kind!r}: {error.errors()[0]['msg']}") from error
        return self

    def resolved(self) -> tuple[Pattern, ...] | None:
        """The patterns with the grids that they take from here, and what the prefix sees."""
        if self.patterns is None:
            return None
        found = tuple(map(self._with_grid, self.patterns))
        return (*found, GlobalTokens(ids=tuple(range(self.prefix)))) if self.prefix else found

    def _with_grid(self, pattern: Pattern) -> Pattern:
        if not isinstance(pattern, GridPattern) or pattern.grid is not None:
            return pattern
        fields = {name: getattr(pattern, name) for name in pattern.model_fields_set}
        return type(pattern).model_validate({**fields, "grid": self.grid})
