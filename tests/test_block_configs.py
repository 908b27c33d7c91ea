"""What configs of patterns say, refuse and mean; and kinds that a third party brings."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from ring_attention_blocksparse import BlockSparseConfig, BlockSparseRingAttention

from by_definition import defined
from ring_core import reference, registry
from ring_core.errors import ConfigError, InputError

DOCS = Path(__file__).parent.parent / "docs" / "blocksparse.md"


def test_configs_round_trip():
    config = BlockSparseConfig(
        patterns=[
            {"kind": "local", "left": 512, "right": 0},
            {"kind": "blocks", "table": torch.eye(3), "heads": [1]},
            {"kind": "neighborhood", "grid": [4, 4], "radius": [1, 2]},
        ],
        block_kv=64,
    )
    assert BlockSparseConfig.model_validate_json(config.model_dump_json()) == config
    assert BlockSparseConfig.from_yaml(config.to_yaml()) == config
    assert hash(config) == hash(BlockSparseConfig(**config.given()))
    kinds = json.dumps(BlockSparseConfig.model_json_schema())
    assert '"topk"' in kinds
    assert '"window_blocks"' in kinds


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([{"kind": "locl", "left": 1, "right": 1}], r"unknown kind of pattern 'locl'.*'local'"),
        ([{"kind": "local", "left": -1, "right": 1}], r"left.*greater than or equal to 0"),
        ([{"kind": "local", "left": 1, "right": 1, "size": 3}], "size.*[Ee]xtra"),
        ({"kind": "sink", "n": 4}, "give a list of patterns"),
        ([], "at least 1 item"),
        ([{"kind": "sink", "n": 4, "heads": []}], "heads.*at least 1 item"),
        ([{"kind": "neighborhood", "radius": 2}], "needs a grid"),
        ([{"kind": "neighborhood", "grid": [4, 4], "radius": [1, 2, 3]}], "give radius for each"),
        ([{"kind": "blocks", "table": [[True], [True, False]]}], "one size|every row"),
    ],
)
def test_bad_patterns_say_what_was_wrong(patterns, message):
    with pytest.raises(ConfigError, match="(?s)" + message):
        registry.create("blocksparse", patterns=patterns)


def test_what_has_no_meaning_is_refused():
    sink = [{"kind": "sink", "n": 4}]
    with pytest.raises(ConfigError, match="patterns with segment_lengths"):
        registry.create("blocksparse", patterns=sink, segment_lengths=[8], dilation_rates=[2])
    attention = registry.create("blocksparse", patterns=sink)
    with pytest.raises(InputError, match="cross-attention is not defined"):
        attention.plan(16, kv_len=20)
    with pytest.raises(InputError, match=r"'neighborhood'.*16 cells.*17 tokens"):
        registry.create(
            "blocksparse", patterns=[{"kind": "neighborhood", "grid": [4, 4], "radius": 1}]
        ).plan(17)
    with pytest.raises(InputError, match=r"table has 2 x 2 blocks.*3 query blocks"):
        registry.create(
            "blocksparse", patterns=[{"kind": "blocks", "table": torch.eye(2)}], block_q=8
        ).plan(17)
    q = torch.randn(1, 16, 2, 4)
    with pytest.raises(InputError, match=r"heads=\[2\], and there are 2 KV heads"):
        registry.create("blocksparse", patterns=[{**sink[0], "heads": [2]}])(q, q, q)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([{"kind": "local", "left": 0, "right": 2**63 - 1}], "less than or equal to 4611686"),
        ([{"kind": ["sink"], "n": 3}], "unknown kind"),
        ([{"kind": "blocks", "table": [[0, 2]] * 8}], "true or false, and one is 2"),
        ([{"kind": "window_blocks", "grid": {8, 9}, "shape": [2, 2]}], "a set has no order"),
    ],
)
def test_numbers_and_shapes_that_would_go_wrong_later(patterns, message):
    with pytest.raises(ConfigError, match=message):
        registry.create("blocksparse", patterns=patterns)
    with pytest.raises(ConfigError, match=r"at most 2\*\*62"):
        registry.create("standard", window=(2**63, None))


@pytest.mark.parametrize(
    "patterns",
    [
        [{"kind": "dilated", "window": 2**62, "rate": 2**62}],
        [{"kind": "strided", "stride": 3}],
        [{"kind": "random", "blocks": 2}],
        [{"kind": "topk", "blocks": 1}],
    ],
)
def test_blocks_larger_than_the_sequence_are_like_it(patterns):
    q = torch.randn(1, 30, 2, 4, dtype=torch.float64)
    huge = registry.create("blocksparse", patterns=patterns, block_q=2**40, block_kv=2**40)
    same = registry.create("blocksparse", patterns=patterns, block_q=30, block_kv=30)
    assert torch.equal(huge(q, q, q), same(q, q, q))


@pytest.mark.parametrize(
    "patterns",
    [
        [{"kind": "random", "blocks": 1}, {"kind": "local", "left": 3, "right": 0, "heads": [0]}],
        [{"kind": "random", "blocks": 2, "heads": [1, 2]}],
        [{"kind": "topk", "blocks": 2}, {"kind": "sink", "n": 1, "heads": [0, 1]}],
    ],
)
def test_dropout_is_that_of_the_reference(patterns):
    """Heads that see different keys, too: weights are dropped by query, key and head."""
    attention = registry.create(
        "blocksparse", patterns=patterns, block_q=4, block_kv=4, dropout=0.4
    ).train()
    q, k, v = (torch.randn(1, 30, h, 4, dtype=torch.float64) for h in (6, 3, 3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ()))
    torch.manual_seed(5)
    out = attention(*leaves)
    shown, _ = defined(attention.config, 30, [0, 30], 3, q[0].detach(), k[0].detach())
    expected, _ = reference.attention(
        *leaves, shown.repeat_interleave(2, dim=0), dropout=0.4, seed=seed
    )
    for one, right in zip(
        (out, *torch.autograd.grad(out.square().sum(), leaves)),
        (expected, *torch.autograd.grad(expected.square().sum(), leaves)),
        strict=True,
    ):
        assert torch.allclose(one, right, atol=1e-12, rtol=0)


def test_the_reference_kernel_reads_no_padding():
    attention = registry.create(
        "blocksparse",
        patterns=[{"kind": "local", "left": 2, "right": 2}],
        block_q=4,
        block_kv=4,
        kernel="reference",
    )
    plan = attention.plan(8, lengths=[5])
    q, k, v = (torch.randn(1, 8, 1, 4, dtype=torch.float64) for _ in range(3))
    for x in (q, k, v):
        x[:, 5:] = torch.nan
        x.requires_grad_()
    out = attention(q, k, v, plan=plan)
    out.sum().backward()
    assert not any(x.isnan().any() for x in (out, q.grad, k.grad, v.grad))


def test_auto_takes_it_for_its_fields():
    assert type(registry.create("auto", patterns=[{"kind": "sink", "n": 4}])) is (
        BlockSparseRingAttention
    )


def test_without_patterns_it_is_dense_or_dilated():
    q = torch.randn(1, 37, 2, 4, dtype=torch.float64)
    for fields in ({"causal": True}, {"segment_lengths": [8], "dilation_rates": [2]}):
        mine, theirs = (
            registry.create(name, **fields)(q, q, q) for name in ("blocksparse", "standard")
        )
        assert torch.equal(mine, theirs)
    attention = registry.create("blocksparse")
    attention(q, q, q)
    assert attention.density == 1.0


# A third party's kind


def documented():
    """The plugin in the docs, as a module."""
    (code,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
        if "blocksparse_patterns" in block
    ]
    module = types.ModuleType("even_keys")
    sys.modules[module.__name__] = module  # pydantic looks annotations up there
    exec(code, vars(module))
    return module


def test_a_third_party_brings_a_kind():
    registry.register(documented(), name="even")
    try:
        attention = registry.create(
            "blocksparse", patterns=[{"kind": "even_keys", "far": 9}], block_q=4, block_kv=4
        )
        q = torch.randn(1, 37, 2, 4, dtype=torch.float64)
        i, j = torch.arange(37)[:, None], torch.arange(37)
        seen = (j % 2 == 0) & (j <= i) & (i - j <= 9)
        expected, _ = reference.attention(q, q, q, seen)
        assert torch.allclose(attention(q, q, q), expected, atol=1e-12, rtol=0)
        assert '"even_keys"' in json.dumps(BlockSparseConfig.model_json_schema())
    finally:
        registry.unregister("even")
    with pytest.raises(ConfigError, match="unknown kind of pattern 'even_keys'"):
        registry.create("blocksparse", patterns=[{"kind": "even_keys", "far": 9}])
