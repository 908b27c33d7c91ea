"""Predicted times: what rates hold, what a plan makes of them, and what is measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_core import registry
from ring_core.cli import main
from ring_core.errors import InputError
from ring_core.prediction.memory import Sizes
from ring_core.prediction.rates import Curve, Link, Rates, planned, read, shipped
from ring_core.prediction.timeline import Prediction, Where, some_ranks
from ring_core.sequences import Sequences

SIZES = Sizes(8, 2, 64, 64, 1, "float32")
SPEED = 1e12
"""Operations a second of the kernel that the rates below know."""


def curve(mask: str, points: tuple[tuple[float, float], ...]) -> Curve:
    """Of the kernel for CPUs; a backward takes twice as long."""
    return Curve(
        kernel="cpu_flash",
        mask=mask,
        planned=("Band",),
        dtype="float32",
        head_dim=64,
        forward=points,
        backward=tuple((operations, 2 * seconds) for operations, seconds in points),
        host=(0.0, 0.0),
    )


LINE = ((1e6, 1e6 / SPEED), (1e12, 1e12 / SPEED))
RATES = Rates(
    device="made up",
    software="none",
    date="2026-01-01",
    source="this file",
    processes=2,
    gpu=False,
    memory=1e18,
    call=(0.0, 0.0),
    round=(0.0, 0.0),
    link=Link(communicator="p2p", shards=1, start=0.0, bytes_per_second=1e9, hidden=1.0),
    curves=(curve("full", LINE), curve("triangle", LINE)),
)


def test_what_plans_are_weighed_by():
    """A key and its value of 64 numbers are 256 bytes in 16 bits: 256 ns, and as many products as
    come to 1000 pairs; a row is copied at 1e18 bytes a second, read and written."""
    assert RATES.pairs_a_key == pytest.approx(1000)
    assert RATES.packing == pytest.approx(2e-9)
    assert planned() == read("h200")


def test_rates_of_one_process_know_no_link():
    alone = RATES.model_copy(update={"link": None})
    with pytest.raises(InputError, match="rates of made up know no link: one process"):
        print(alone.packing)


def predicted(
    seq_len: int, world: int, rates: Rates = RATES, where: Where | None = None, **fields: Any
) -> Prediction:
    attention = registry.create({"variant": "standard", "causal": True, **fields})
    plan = attention.make_plan(Sequences.build(seq_len), world)
    return attention.predict(plan, SIZES, rates, where or Where(world))


def linked(**fields: Any) -> Rates:
    assert RATES.link is not None
    return RATES.model_copy(update={"link": RATES.link.model_copy(update=fields)})


def test_further_tiles_keep_the_processor() -> None:
    """Each branch of dilated attention is a call of the kernel."""
    rates = RATES.model_copy(update={"tile": (0.5, 0.25)})
    for branches in (1, 2, 3):
        further = branches - 1
        fields: dict[str, Any] = {
            "segment_lengths": (64, 128, 256)[:branches],
            "dilation_rates": (1, 2, 4)[:branches],
        }
        before, after = (predicted(256, 1, one, **fields) for one in (RATES, rates))
        assert after.forward.total - before.forward.total == pytest.approx(0.5 * further)
        assert after.backward.total - before.backward.total == pytest.approx(0.25 * further)


def operations(pairs: float) -> float:
    return 4.0 * SIZES.head_dim * SIZES.q_heads * pairs


@given(
    st.lists(st.tuples(st.floats(1, 1e15), st.floats(1e-6, 1e3)), min_size=1, max_size=5),
    st.floats(1, 1e15),
)
def test_a_curve_goes_through_its_points_and_stays_between_them(points, asked):
    points = tuple(sorted(dict(points).items()))
    found = curve("full", points)
    for operations, seconds in points:
        assert found.seconds(operations)[0] == pytest.approx(seconds)
    below = [point for point in points if point[0] <= asked]
    above = [point for point in points if point[0] >= asked]
    forward, backward = found.seconds(asked)
    assert backward == pytest.approx(2 * forward)
    if below and above:
        low, high = sorted((below[-1][1], above[0][1]))
        assert low * (1 - 1e-9) <= forward <= high * (1 + 1e-9)
    else:  # as fast as the nearest
        operations, seconds = (below or above)[-1 if below else 0]
        assert forward == pytest.approx(seconds * asked / operations)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_kernels_compute_the_visible_pairs_of_the_busiest_rank(world, layout):
    seq_len = 1200
    found = predicted(seq_len, world, layout=layout)
    plan = registry.create("standard", causal=True, layout=layout).make_plan(
        Sequences.build(seq_len), world
    )
    most = max(float(plan.work(rank)) for rank in range(world))
    assert found.forward.kernels == pytest.approx(operations(most) / SPEED)
    assert found.backward.kernels == pytest.approx(2 * found.forward.kernels)
    assert found.kernel == "cpu_flash"


def test_what_travels_takes_what_the_link_takes():
    """Each rank's last rows of keys and values, in float32, at 1 GB/s; none where all is hidden."""
    rows, both = 500, SIZES.kv_heads * SIZES.key_row * SIZES.itemsize
    slow = predicted(4 * rows, 4, linked(hidden=0.0), layout="contiguous")
    assert slow.forward.transfers == pytest.approx(3 * rows * both / 1e9)
    # Gradients come home in float32 too, and the last ones are hidden by nothing.
    assert slow.backward.transfers == pytest.approx(2 * slow.forward.transfers)
    far = predicted(4 * rows, 4, linked(hidden=0.0), Where(2, 1e8), layout="contiguous")
    assert far.forward.transfers == pytest.approx((rows + 20 * rows) * both / 1e9)
    fast = predicted(4 * rows, 4, linked(bytes_per_second=1e15), layout="contiguous")
    assert fast.forward.transfers == pytest.approx(0, abs=1e-6)
    assert fast.forward.kernels == slow.forward.kernels


def test_transfers_are_hidden_by_what_is_computed_meanwhile():
    exposed = predicted(8192, 4).forward.transfers
    alone = predicted(8192, 4, linked(hidden=0.0)).forward.transfers
    assert 0 <= exposed < alone
    assert predicted(8192, 4, overlap=False).forward.transfers == pytest.approx(alone)
    slow = predicted(8192, 4, linked(bytes_per_second=1e6)).forward
    kernels = slow.kernels + slow.merging
    assert slow.transfers == pytest.approx(1e3 * alone - kernels, rel=0.3)


def test_the_processor_of_a_gpu_runs_ahead():
    busy = RATES.model_copy(update={"call": (1.0, 1.0), "round": (0.5, 0.5)})
    here = predicted(64, 4, busy).forward
    assert here.processor == pytest.approx(1.0 + 3 * 0.5)
    assert here.total == pytest.approx(here.processor, rel=1e-2)
    there = predicted(64, 4, busy.model_copy(update={"gpu": True})).forward
    assert there.total == pytest.approx(2.5)
    long = predicted(1 << 20, 4, busy.model_copy(update={"gpu": True})).forward
    assert long.processor == 0


def test_of_many_ranks_a_few_are_looked_at():
    assert some_ranks(4, 8) == [0, 1, 2, 3]
    few = some_ranks(1024, 8)
    assert len(few) <= 8
    assert {0, 1, 1022, 1023} < set(few)
    assert predicted(64 * 300, 300).forward.kernels > 0


def test_heads_are_exchanged_where_that_is_faster():
    attention = registry.create("distributed", causal=True)
    plan = attention.make_plan(Sequences.build(4096), 4)
    sizes = Sizes(8, 4, 64, 64, 1, "float32")
    slow = attention.predict(plan, sizes, linked(start=1.0), Where(4))
    assert slow.degree == 1, "an exchange starts more transfers"
    busy = RATES.model_copy(update={"round": (1.0, 1.0)})
    assert attention.predict(plan, sizes, busy, Where(4)).degree == 4, "a ring has more rounds"
    given = registry.create("distributed", causal=True, ulysses=2)
    assert given.predict(plan, sizes, busy, Where(4)).degree == 2
    with pytest.raises(InputError, match="Possible here: 1, 2, 4"):
        registry.create("distributed", ulysses=3).predict(plan, sizes, busy, Where(4))


def test_rates_that_lack_something_say_what():
    alone = RATES.model_copy(update={"link": None})
    assert predicted(64, 1, alone).forward.total > 0
    with pytest.raises(InputError, match="--link"):
        predicted(64, 2, alone)
    with pytest.raises(
        InputError, match=r"no rate of mask 'triangle', float32, heads of 64.*known"
    ):
        predicted(64, 1, RATES.model_copy(update={"curves": (_wider(RATES.curves[0]),)}))
    with pytest.raises(InputError, match="depends on the tensors"):
        predicted(64, 1, variant="blocksparse", patterns=[{"kind": "topk", "blocks": 1}])
    some = RATES.model_copy(update={"curves": RATES.curves[:1]})
    assert predicted(64, 1, some).instead == (("triangle", "full"),)


def _wider(one: Curve) -> Curve:
    return one.model_copy(update={"head_dim": 128})


def test_files_of_rates(tmp_path: Path):
    path = tmp_path / "new" / "rates.json"
    RATES.save(path)
    assert read(str(path)) == RATES
    with pytest.raises(InputError, match=r"come with the core: cpu, h200.*--calibrate"):
        read(str(tmp_path / "none.json"))
    path.write_text('{"version": 0}')
    with pytest.raises(InputError, match="not a file of this version"):
        read(str(path))
    other = RATES.model_copy(update={"curves": (curve("window", LINE), curve("full", LINE[:1]))})
    both = RATES.beside(other)
    assert [one.mask for one in both.curves] == ["full", "triangle", "window"]
    assert both.curves[0] == RATES.curves[0], "what is new stays"


@pytest.mark.parametrize("name", ["cpu", "h200"])
def test_rates_that_come_with_the_core_predict_a_causal_layer(name):
    assert name in shipped()
    rates = read(name)
    sizes = {
        "cpu": SIZES,
        "h200": Sizes(32, 8, 128, 128, 1, "bfloat16"),
    }[name]
    attention = registry.create("standard", causal=True)
    times = [
        attention.predict(
            attention.make_plan(Sequences.build(32768), world), sizes, rates, Where(world)
        ).total
        for world in (1, 2, 4)
    ]
    assert times[0] > times[1] > times[2] > times[0] / 8


# The command


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    sizes = ["--heads", "8", "--kv-heads", "2", "--head-dim", "64", "--dtype", "float32"]
    assert main(["plan", "--seq-len", "4096", "--set", "causal=true", *sizes, *words]) == 0
    return capsys.readouterr().out


@pytest.fixture
def file(tmp_path: Path) -> str:
    RATES.save(tmp_path / "rates.json")
    return str(tmp_path / "rates.json")


def test_plans_are_compared_on_paper(file: str, capsys: pytest.CaptureFixture[str]):
    words = ["--rates", file, "--compare", "layout=zigzag,contiguous"]
    words += ["--compare", "variant=standard,distributed,hilbert"]
    found = json.loads(run(capsys, *words, "--json"))
    rows = found["comparison"]
    ran = [row for row in rows if "refused" not in row]
    assert len(rows) == 6
    assert [row["total"] for row in ran] == sorted(row["total"] for row in ran)
    assert ran[0]["fields"]["layout"] == "zigzag"
    assert {row["fields"]["variant"] for row in rows if "refused" in row} <= {"hilbert"}
    here = found["prediction"]
    assert here["total"] == pytest.approx(
        sum(sum(here[x].values()) for x in ("forward", "backward"))
    )
    text = run(capsys, *words)
    for part in ("kernel cpu_flash", "the fastest first", "Transfers", "layout=zigzag"):
        assert part in text


def test_a_link_is_given_in_gigabytes(file: str, capsys: pytest.CaptureFixture[str]):
    words = ["--rates", file, "--world", "4", "--set", "overlap=false", "--json"]
    spent = [
        json.loads(run(capsys, *words, *more))["prediction"]["forward"]["transfers"]
        for more in ([], ["--link", "2"], ["--ranks-per-host", "1", "--between", "0.5"])
    ]
    assert spent[0] == pytest.approx(2 * spent[1]) == pytest.approx(spent[2] / 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "layout=zigzag"], "--compare is about times"),
        (["--rates", "h2000"], "Did you mean 'h200'"),
        (["--rates", "cpu", "--compare", "layout"], "expected FIELD=A,B"),
        (["--rates", "cpu", "--calibrate"], "name a file to keep others in"),
    ],
)
def test_mistakes_are_told(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["plan", "--seq-len", "64", *words]) == 1
    assert message in capsys.readouterr().err


def test_without_rates_it_is_said_how_to_come_by_some(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = run(capsys)
    assert "--calibrate" in text
    assert "Peak" in text


def test_this_machine_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two processes, on shards of up to 128 tokens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("ring_core.prediction.calibration.LONGEST", 128)
    found = json.loads(run(capsys, "--calibrate", "--world", "2", "--json"))["prediction"]
    assert found["kernel"] == "cpu_flash"
    assert found["total"] > 0
    path = tmp_path / "ring-attention" / "rates.json"
    first = read(str(path))
    assert first.processes == 2
    assert first.link is not None
    assert first.link.communicator == "p2p"
    assert first.link.bytes_per_second > 0
    assert {one.kernel for one in first.curves} == {"cpu_flash"}
    assert all(seconds > 0 for one in first.curves for _, seconds in (*one.forward, *one.backward))
    assert {one.mask for one in first.curves} == {"full", "triangle"}
