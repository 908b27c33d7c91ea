"""Schemas: what they accept, what they refuse and how they say so, and that they round-trip."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import yaml
from ring_attention_standard import StandardConfig, StandardRingAttention

from ring_core import Registry, RingAttentionConfig, Variant, hookimpl, registry
from ring_core.cli.fields import field_rows
from ring_core.config import PLANNED
from ring_core.errors import ConfigError, RingError

EVERYTHING = {
    "causal": True,
    "window": (128, None),
    "softmax_scale": 0.25,
    "dropout": 0.1,
    "layout": "zigzag",
    "kernel": "reference",
    "communicator": "p2p",
    "overlap": False,
    "deterministic": True,
    "timeout": 12.5,
}


@pytest.mark.parametrize("schema", [RingAttentionConfig, StandardConfig])
def test_round_trips(schema):
    config = schema(**EVERYTHING)
    assert schema.model_validate_json(config.model_dump_json()) == config
    assert schema.from_yaml(config.to_yaml()) == config
    assert schema(**yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
    assert hash(schema(**EVERYTHING)) == hash(config)


@pytest.mark.parametrize("schema", [RingAttentionConfig, StandardConfig])
def test_every_field_is_described(schema):
    properties = schema.model_json_schema()["properties"]
    assert set(EVERYTHING) < set(properties)
    assert all(field.get("description") for field in properties.values())


def test_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RingAttentionConfig().causal = True


class BaseAttention(StandardRingAttention):
    config_class = RingAttentionConfig


class Base:
    """A variant whose schema is the common one."""

    RING_HOOK_API = 1

    @hookimpl
    def ring_variant(self):
        return Variant(RingAttentionConfig, f"{__name__}:BaseAttention")


@pytest.fixture(scope="module")
def base_registry():
    own = Registry()
    own.register(Base(), name="base")
    return own


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"causl": True}, r"causl[\s\S]*Did you mean 'causal'"),
        ({"zzz": 1}, r"Its fields: variant, causal"),
        ({"dropout": 1.0}, r"dropout[\s\S]*less than 1[\s\S]*input_value=1.0"),
        ({"layout": "diagonal"}, r"layout[\s\S]*'contiguous', 'zigzag' or 'striped'"),
        ({"window": (-1, 0)}, r"window[\s\S]*None leaves a side open"),
        ({"window": 5}, r"window[\s\S]*tuple"),
        ({"timeout": 0}, r"timeout[\s\S]*greater than 0"),
        ({"softmax_scale": float("nan")}, r"softmax_scale[\s\S]*nan"),
        ({"segment_lengths": [4]}, r"give both or neither"),
        ({"segment_lengths": [4, 8], "dilation_rates": [1]}, r"2 entries and dilation_rates 1"),
        ({"segment_lengths": [0], "dilation_rates": [1]}, r"every entry must be >= 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("via", ["schema", "create", "json", "yaml"])
def test_a_bad_field_is_named(base_registry, fields, text, via):
    with pytest.raises(ConfigError, match=text) as caught:
        if via == "schema":
            RingAttentionConfig(**fields)
        elif via == "create":
            base_registry.create("base", **fields)
        elif via == "json":
            RingAttentionConfig.model_validate_json(json.dumps(fields))
        else:
            RingAttentionConfig.from_yaml(
                yaml.safe_dump(
                    {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
                )
            )
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RingError)


class Picky(StandardConfig):
    """A schema that refuses some fields, and one that no plan depends on."""

    refused: ClassVar = {
        "causal": "there is no order; leave it out",
        "segment_lengths": "nothing is dilated",
        "softmax_scale": "it is learnt",
    }
    unplanned = ("loud",)

    loud: bool = False
    """Whether something is told."""

    sharp: bool = False
    """Whether something is seen."""


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"causal": True}, r"causal=True means nothing here: there is no order; leave it out"),
        (
            {"segment_lengths": [4]},
            r"segment_lengths=\(4,\) means nothing here: nothing is dilated",
        ),
        ({"softmax_scale": 0.5}, r"softmax_scale=0.5 means nothing here: it is learnt"),
    ],
)
def test_what_a_schema_refuses_is_told_with_its_reason(fields, text):
    with pytest.raises(ConfigError, match=text):
        Picky(**fields)


def test_the_defaults_of_refused_fields_may_be_written_down():
    assert Picky(causal=False, softmax_scale=None, loud=True) == Picky(loud=True)
    assert Picky.from_yaml(Picky(window=(1, 2)).to_yaml()) == Picky(window=(1, 2))
    shown = {row.name: row.description for row in field_rows(Picky)}
    assert shown["causal"] == "Refused: there is no order; leave it out"
    assert shown["window"].startswith("(left, right)")


@pytest.mark.parametrize("where", ["refused", "unplanned"])
def test_a_schema_that_names_no_field_of_its_own_is_no_schema(where):
    with pytest.raises(ConfigError, match=rf"Wrong.{where} names 'causl'.*Did you mean 'causal'"):
        type("Wrong", (RingAttentionConfig,), {where: {"causl": "why"}})


def test_plans_depend_on_what_planners_read():
    plain = Picky().planning()
    assert set(plain) == {"variant", "sharp", *PLANNED}
    for fields in ({"loud": True}, {"timeout": 3}, {"dropout": 0.1}, {"kernel": "reference"}):
        assert Picky(**fields).planning() == plain
    for fields in ({"sharp": True}, {"window": (1, 1)}, {"layout": "zigzag"}):
        assert Picky(**fields).planning() != plain


def test_a_mesh_plans_as_what_it_wraps():
    inner = {"variant": "blocksparse", "patterns": [{"kind": "sink", "n": 4}]}
    schema = registry.variant("distributed").config
    plain = schema(inner=inner, causal=True)
    for fields in ({"retries": 2}, {"monitor": True}, {"ulysses": 2}, {"timeout": 3}):
        assert schema(inner=inner, causal=True, **fields).planning() == plain.planning()
    assert schema(inner=inner).planning() != plain.planning()
    assert schema(causal=True).planning() != plain.planning()


def test_branches_in_no_order_are_refused():
    with pytest.raises(ConfigError, match=r"segment_lengths[\s\S]*a set has no order"):
        RingAttentionConfig(segment_lengths={4096, 100}, dilation_rates=[1, 2])


def test_yaml_must_be_a_mapping():
    with pytest.raises(ConfigError, match="expected a mapping"):
        RingAttentionConfig.from_yaml("- 1\n- 2\n")


@pytest.mark.parametrize("field", ["kernel", "communicator"])
def test_unknown_parts_are_refused_at_create(field):
    with pytest.raises(
        ConfigError, match=rf"{field}: no installed plugin brings 'nope'.*Allowed: auto, "
    ):
        registry.create("standard", **{field: "nope"})
