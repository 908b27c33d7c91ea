"""``ring-attention plan``: figures of a plan, and its picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ring_core import registry
from ring_core.cli import main
from ring_core.sequences import Sequences
from ring_core.tile_map import tile_map

SPARSE = ["--set", "patterns=[{kind: local, left: 512, right: 0}]", "--set", "causal=true"]


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_figures_are_the_plans(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"seq-len": 65536, "heads": 8, "kv-heads": 2, "head-dim": 64, "dtype": "float32"}
    words = [f"--{name}={value}" for name, value in sizes.items()]
    found = json.loads(planned(capsys, *words, *SPARSE, "--json"))
    assert found["config"]["variant"] == "blocksparse"
    assert found["config"]["patterns"][0]["left"] == 512
    halo = 2 * 512 * 2 * 64 * 4
    assert [one["bytes_fetched_by_offset"] for one in found["ranks"]] == [
        {},
        *({"1": halo} for _ in range(3)),
    ]
    assert [one["bytes_sent"] for one in found["ranks"]] == [halo] * 3 + [0]
    assert sum(one["tokens"] for one in found["ranks"]) == 65536
    assert sum(one["share_of_work"] for one in found["ranks"]) == pytest.approx(1)
    # Five blocks a query block, but for the first four, of 256.5 in the mean.
    assert found["facts"]["density"].startswith(f"{(5 * 512 - 10) / (512 * 513 / 2):.4f}")


def test_the_table_names_what_a_reader_needs(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "--seq-len", "8192", *SPARSE)
    for part in ("blocksparse: 8,192 tokens on 4 ranks", "Fetches", "imbalance: 1.0", "density: "):
        assert part in text
    text = planned(capsys, "--seq-len", "8192", "--set", "patterns=[{kind: topk, blocks: 4}]")
    assert "density: at most" in text
    assert "else all visible keys" in text


def test_a_config_file_and_fields_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("variant: standard\ncausal: true\nlayout: contiguous\n")
    words = ["--config", str(tmp_path / "config.yaml"), "--set", "layout=zigzag"]
    found = json.loads(planned(capsys, "--seq-len", "1000", *words, "--json"))
    assert (found["config"]["causal"], found["config"]["layout"]) == (True, "zigzag")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "causal"], "expected FIELD=VALUE"),
        (["--set", "causl=true"], "no installed variant knows"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--heads", "3", "--kv-heads", "2"], "no multiple"),
        (["--picture", "map.jpg"], "must end in .png or .svg"),
    ],
)
def test_mistakes_are_told(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--seq-len", "64", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("suffix", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_pictures(
    suffix: str, begin: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"map.{suffix}"
    planned(capsys, "--seq-len", "4096", *SPARSE, "--picture", str(path))
    assert path.read_bytes().startswith(begin)


@pytest.mark.parametrize(
    "fields",
    [
        {"causal": True},
        {"window": (3, 2)},
        {"segment_lengths": [8, 32], "dilation_rates": [1, 4]},
        {"patterns": [{"kind": "strided", "stride": 12}], "block_q": 4, "block_kv": 4},
    ],
)
def test_the_map_shows_who_computes_what_and_when(fields: dict) -> None:
    """At one token a cell it is the mask itself; of patterns the blocks that are computed."""
    plan = registry.create("auto", **fields).make_plan(Sequences.build(32), 4)
    found = tile_map(plan, cells=32)
    i, j = torch.arange(32)[:, None], torch.arange(32)
    near = (i - 3 <= j) & (j <= i + 2)
    shown = {
        "causal": j <= i,
        "window": near,
        "segment_lengths": (i // 8 == j // 8) | ((i % 4 == 0) & (j % 4 == 0)),
        "patterns": (i // 4 - j // 4) % 3 == 0,
    }[next(iter(fields))]
    assert torch.equal(found.rank >= 0, shown)
    owner = torch.empty(32, dtype=torch.int64)
    for rank in range(4):
        for run in plan.queries.rows[rank]:
            owner[list(run)] = rank
    expected = owner[:, None].expand(32, 32)
    assert torch.equal(found.rank[shown], expected[shown])
    assert torch.equal(found.step[shown], ((expected - owner[None, :]) % 4)[shown])
