"""The demo: two short runs end to end, and what it says when it cannot run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ring_core.cli import demo, main
from ring_core.cli.output import console
from ring_core.demo.comparison import Comparison, Options, Prepared, Run
from ring_core.demo.document import Document, python_help
from ring_core.demo.training import RankResult

COMMAND = [
    sys.executable,
    "-c",
    "import sys; from ring_core.cli import main; sys.exit(main())",
    "demo",
]
QUICK = ["--steps", "3", "--context", "509", "--processes", "2"]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A quick run in a process of its own, that goes on beside the next test; and its folder."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "report"
    command = [*COMMAND, *QUICK, "--output", str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process, folder
        process.terminate()


@pytest.fixture(scope="module")
def quick(started: tuple[Any, Path]) -> tuple[str, str, Path]:
    """stdout, stderr and the folder of the quick run."""
    out, err = started[0].communicate(timeout=120)
    assert started[0].returncode == 0, err
    return out, err, started[1]


def test_ctrl_c_ends_every_process_quietly(started: tuple[Any, Path], tmp_path: Path) -> None:
    running = subprocess.Popen(
        [*COMMAND, *QUICK, "--steps", "9999", "--context", "128", "--output", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell that runs the tests in the background has it ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stderr is not None
    assert "step 1/9999" in running.stderr.readline()
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = running.communicate(timeout=30)  # returns when no process holds the pipe any more
    assert running.returncode == 130
    assert "Traceback" not in err


def test_a_quick_run_agrees_and_sends_what_is_planned(quick: tuple[str, str, Path]) -> None:
    found: dict[str, Any] = json.loads((quick[2] / "report.json").read_text())
    assert found["schema_version"] == 1
    assert found["agreement"]["agree"]
    assert found["agreement"]["largest_difference"] < 1e-4
    pairs = zip(found["unsharded"]["losses"], found["sharded"]["losses"], strict=True)
    assert all(abs(one - other) < 1e-4 for one, other in pairs)
    assert len(found["sharded"]["losses"]) == 3
    assert found["sharded"]["losses"][-1] < found["sharded"]["losses"][0] - 0.5

    ranks = found["sharded"]["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert sum(rank["tokens"] for rank in ranks) == 509
    for rank in ranks:
        assert rank["attention_bytes_sent"] == rank["attention_bytes_planned"] > 0
    alone = found["unsharded"]["ranks"]
    assert [(one["tokens"], one["attention_bytes_sent"]) for one in alone] == [(509, 0)]
    assert all(one["peak_memory_bytes"] > 0 for one in ranks + alone)
    assert found["unsharded"]["tokens_per_second"] > 0

    assert found["document"]["sha256"] == python_help().sha256
    assert found["document"]["bytes"] > 400_000
    assert found["settings"]["context"] == 509
    assert found["hardware"]["cores"] == os.cpu_count()


def test_a_quick_run_draws_and_tells(quick: tuple[str, str, Path]) -> None:
    out, err, folder = quick
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "The two runs agree" in out
    assert "rank 1" in out
    assert str(folder / "report.json") in out
    assert "unsharded (1 process): step 1/3" in err
    assert "sharded (2 processes): step 3/3" in err
    assert "\x1b" not in out + err


def test_dilated_runs_agree(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    launch_here: Callable[..., list[Any]],
) -> None:
    """Segments within the two shards, and across them."""
    monkeypatch.setattr("ring_core.demo.comparison.launch", launch_here)
    words = ["--segment-lengths", "64", "512", "--dilation-rates", "1", "2"]
    sizes = ["--context", "512", "--steps", "2", "--processes", "2"]
    assert main(["demo", *words, *sizes, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "The two runs agree" in out
    assert "segment_lengths=[64, " in out.replace("\n", " ")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["settings"]["fields"]["dilation_rates"] == [1, 2]
    assert found["command"][-6:] == words
    assert found["agreement"]["largest_difference"] < 1e-4
    for rank in found["sharded"]["ranks"]:
        assert rank["attention_bytes_sent"] == rank["attention_bytes_planned"] > 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--variant", "standrad"], "unknown variant 'standrad'. Did you mean 'standard'?"),
        (["--input", "short.txt"], "has 5 bytes; the demo needs at least 64"),
        (["--input", "absent.txt"], "cannot read --input absent.txt"),
        (["--output", "short.txt"], "cannot make --output short.txt"),
        (["--segment-lengths", "64"], "give both or neither"),
    ],
)
def test_what_cannot_be_run_says_so_and_trains_nothing(
    words: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("short")
    assert main(["demo", *words]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert text in err
    assert not Path("demo-report").exists()


def test_matplotlib_is_asked_for_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert 'pip install "ring-attention-core[demo]"' in capsys.readouterr().err


def _comparison(unsharded: list[float], sharded: list[float]) -> Comparison:
    def run(losses: list[float]) -> Run:
        return Run("cpu", 8, (RankResult(0, losses, [1.0] * len(losses), 8, 1, "", 0, 0),))

    options = Options("standard", 2, 8, len(unsharded), 0)
    document = Document("text", bytes(99))
    return Comparison(document, options, "standard", 8, 1, run(unsharded), run(sharded))


def test_json_stands_alone_on_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Prepared, "run", lambda prepared: _comparison([5.0, 4.0], [5.0, 4.0]))
    assert main(["demo", "--json", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "report.json").read_text())
    assert "The two runs agree" in err


def test_a_short_document_makes_a_short_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[Prepared] = []

    def run(self: Prepared) -> Comparison:
        prepared.append(self)
        return _comparison([5.0, 4.0], [5.0, 4.0])

    monkeypatch.setattr(Prepared, "run", run)
    document = tmp_path / "bytes.bin"
    document.write_bytes(bytes(range(256)) * 2)
    assert main(["demo", "--input", str(document), "--output", str(tmp_path)]) == 0
    assert "The document has 512 bytes: the context is 511 tokens, not 8,192." in " ".join(
        capsys.readouterr().out.split()
    )
    assert prepared[0].job.context == 511
    assert prepared[0].job.windows[0] == document.read_bytes()


@pytest.mark.parametrize("apart", [3.0002, float("nan")])
def test_runs_that_differ_are_told_apart(apart: float, capsys: pytest.CaptureFixture[str]) -> None:
    compared = _comparison([5.0, 4.0, 3.0, 2.0], [5.0, 4.00005, apart, 1.0])
    assert compared.first_apart == 3
    assert demo._verdict(console(), compared) == 1
    assert "differ from step 3 on: loss 3.000000 unsharded" in capsys.readouterr().err
    assert _comparison([5.0], [5.0]).first_apart is None


def test_windows_repeat_with_the_seed_and_stay_inside() -> None:
    document = Document("text", bytes(range(100)))
    windows = document.windows(context=9, count=50, seed=1)
    assert windows == document.windows(context=9, count=50, seed=1)
    assert windows != document.windows(context=9, count=50, seed=2)
    assert {len(window) for window in windows} == {10}
    assert document.windows(document.longest_context(), 1, 0) == (document.data,)
