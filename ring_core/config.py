"""The schema that every variant shares; each variant's own schema extends it.

A field changes what is computed or how, or the variant refuses it by name. None is decoration.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ring_core.errors import ConfigError, did_you_mean

LayoutName = Literal["auto", "contiguous", "zigzag", "striped"]

PLANNED = ("causal", "window", "segment_lengths", "dilation_rates", "layout")
"""The common fields that are a planner's to read, or to refuse; the engine sees to the others."""

_MOST = 2**62
"""Numbers of tokens are added up in 64 bits."""


class RingAttentionConfig(BaseModel):
    """Fields common to all variants. Frozen, hashable; JSON, YAML and JSON Schema round-trip.

    Raises:
        ConfigError: a field is unknown, out of range, refused, or contradicts another one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    refused: ClassVar[Mapping[str, str]] = {}
    """Fields that mean nothing for the variant, each with why and what to do instead: all values
    but the default are refused. A schema that extends another one has this from it."""

    unplanned: ClassVar[Collection[str]] = ()
    """The variant's own fields that its planner does not read, such as switches of a log: layers
    that differ in nothing else share plans."""

    variant: str = "auto"
    """Name of the variant that this config is for; 'auto' leaves the choice to the registry."""

    causal: bool = False
    """Query i sees key j only if j <= i; in cross-attention the ends are aligned."""

    window: tuple[int | None, int | None] | None = None
    """(left, right): query i sees keys from i-left to i+right; None leaves that side open."""

    softmax_scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Factor on q.k before the softmax; None means 1/sqrt(head_dim)."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an attention weight while training. Needs a kernel that can repeat
    its mask (kernel 'reference'). The mask is a function of token indices and a seed from torch's
    CPU generator: seed that alike on all ranks, and no world size changes the mask."""

    segment_lengths: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Dilated attention (LongNet, arXiv 2307.02486): segment length of each branch, in tokens."""

    dilation_rates: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Dilated attention: every how many-th row each branch keeps; as many as segment_lengths."""

    layout: LayoutName = "auto"
    """Which tokens each rank holds; 'auto' takes the one that keeps ranks equally busy."""

    kernel: str = "auto"
    """Name of the attention kernel; 'auto' takes the fastest that can do what is asked."""

    communicator: str = "auto"
    """Name of the communicator; 'auto' takes the best that serves the group."""

    overlap: bool = True
    """Fetch the next keys while these are computed; False fetches, then computes (debugging)."""

    deterministic: bool = False
    """Bitwise repeatable results, forward and backward."""

    timeout: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    """Seconds that a rank waits for a peer before it gives up: at a first call of a kind, and at
    every step where the communicator can bound that (over gloo; not yet between GPUs)."""

    @field_validator("window")
    @classmethod
    def _window_not_negative(
        cls, window: tuple[int | None, int | None] | None
    ) -> tuple[int | None, int | None] | None:
        if window and any(side is not None and side < 0 for side in window):
            raise ValueError("both sides count tokens and are >= 0; None leaves a side open")
        if window and any(side is not None and side > _MOST for side in window):
            raise ValueError("both sides are at most 2**62; None leaves a side open")
        return window

    @field_validator("segment_lengths", "dilation_rates", mode="before")
    @classmethod
    def _in_order(cls, numbers: Any) -> Any:
        if isinstance(numbers, (set, frozenset)):
            raise ValueError("a set has no order, and entry i belongs to entry i: give a list")
        return numbers

    @field_validator("segment_lengths", "dilation_rates")
    @classmethod
    def _positive(cls, numbers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if numbers and min(numbers) < 1:
            raise ValueError("every entry must be >= 1")
        if numbers and max(numbers) > _MOST:
            raise ValueError("every entry must be at most 2**62")
        return numbers

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        for where, names in (("refused", cls.refused), ("unplanned", cls.unplanned)):
            for name in set(names) - set(cls.model_fields):
                raise ConfigError(
                    f"{cls.__name__}.{where} names {name!r}, which is no field."
                    f"{did_you_mean(name, cls.model_fields)}"
                )

    @model_validator(mode="after")
    def _nothing_refused(self) -> Self:
        for name, why in self.refused.items():
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            if (value := getattr(self, name)) != default:
                raise ValueError(f"{name}={value!r} means nothing here: {why}")
        return self

    @model_validator(mode="after")
    def _one_rate_per_segment(self) -> Self:
        lengths, rates = self.segment_lengths, self.dilation_rates
        if (lengths is None) != (rates is None):
            raise ValueError("segment_lengths and dilation_rates go together: give both or neither")
        if lengths and rates and len(lengths) != len(rates):
            raise ValueError(
                f"segment_lengths has {len(lengths)} entries and dilation_rates {len(rates)}; "
                "each branch needs one of each"
            )
        return self

    def scale(self, head_dim: int) -> float:
        """The softmax scale for heads of ``head_dim``."""
        return self.softmax_scale if self.softmax_scale is not None else 1 / math.sqrt(head_dim)

    def given(self) -> dict[str, Any]:
        """The fields that were set explicitly, by name."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    def planning(self) -> dict[str, Any]:
        """The fields that a planner reads: attentions that are alike in them share plans."""
        engines = common_fields() - {"variant", *PLANNED}
        return self.model_dump(exclude={*engines, *self.unplanned})

    def of_variant(self, name: str) -> RingAttentionConfig:
        """What the plugin that brings variant ``name`` is asked with: this config, or that of the
        variant of this name which this one wraps."""
        return self

    def to_yaml(self) -> str:
        """This config as YAML text that :meth:`from_yaml` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Read a config from YAML (or JSON) text."""
        try:
            fields = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{cls.__name__}: this is no YAML: {error}") from error
        if not isinstance(fields, Mapping):
            raise ConfigError(
                f"{cls.__name__}: expected a mapping of field names to values, got "
                f"{type(fields).__name__}"
            )
        return cls(**fields)

    # Pydantic raises its own ValidationError; users of this library catch one family of errors.
    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise config_error(type(self), error) from error

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise config_error(cls, error) from error

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise config_error(cls, error) from error


def config_error(schema: type[BaseModel], error: ValidationError) -> ConfigError:
    """Pydantic's text for every bad field, with the nearest field name for an unknown one."""
    hints = [
        f"{name!r} is no field of {schema.__name__}."
        + (
            did_you_mean(name, schema.model_fields)
            or f" Its fields: {', '.join(schema.model_fields)}."
        )
        for name in (
            str(part["loc"][-1]) for part in error.errors() if part["type"] == "extra_forbidden"
        )
    ]
    return ConfigError("\n".join([str(error), *hints]))


def common_fields() -> frozenset[str]:
    """Names of the fields that every variant has."""
    return frozenset(RingAttentionConfig.model_fields)
