"""``show``, ``schema`` and ``launch``, and the pages that are made from the code."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ring_core import registry
from ring_core.cli import main
from ring_core.config import common_fields

DOCS = Path(__file__).parents[1] / "docs"


def test_show_a_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "hilbert", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["distribution"]) == ("variant", "ring-attention-hilbert")
    assert found["presets"] == ["hilbert_optimized"]
    own = [field["name"] for field in found["fields"] if not field["common"]]
    assert own == [field["name"] for field in found["fields"]][: len(own)]
    assert {"grid", "order", "prefix"} < set(own)
    assert common_fields() == {field["name"] for field in found["fields"]} - set(own)
    order = next(field for field in found["fields"] if field["name"] == "order")
    assert order["type"] == "'auto' | 'hilbert' | 'morton' | 'tile' | 'row'"
    assert order["default"] == "'auto'"

    assert main(["show", "hilbert"]) == 0
    shown = capsys.readouterr().out
    assert "variant hilbert" in shown
    assert "order: 'auto' | 'hilbert'" in shown


def test_show_what_a_field_holds_of_several_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "blocksparse", "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)["fields"]
    (patterns,) = [field for field in fields if field["kinds"]]
    assert patterns["name"] == "patterns"
    found = {one["kind"]: one["takes"] for one in patterns["kinds"]}
    assert {"local", "sink", "topk", "blocks", "neighborhood"} < set(found)
    assert found["random"] == ["heads", "blocks", "seed"]
    assert main(["show", "blocksparse"]) == 0
    assert "sink(heads, n): The first n tokens" in capsys.readouterr().out


def test_show_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "production", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["variant"]) == ("preset", "distributed")
    assert found["set"]["segment_lengths"] == [2048, 4096, 8192]
    assert main(["show", "production"]) == 0
    assert "check_finite" in capsys.readouterr().out


def test_show_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "standrad"]) == 1
    said = capsys.readouterr().err
    assert "Did you mean 'standard'?" in said
    assert "Presets: development, " in said


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    """One that a reader of JSON can check a config with."""
    assert main(["schema", "distributed"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(
        json.dumps(registry.variant("distributed").config.model_json_schema())
    )
    assert found["additionalProperties"] is False
    assert all(field.get("description") for field in found["properties"].values())


def launched(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from ring_core.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "launch", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_launch(tmp_path: Path) -> None:
    """A script whose options begin like the launcher's own; started again, its ranks connect."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "dist.barrier()\n"
        "attempt = os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "said = f'rank {dist.get_rank()} attempt {attempt} {sys.argv[1:]}\\n'\n"
        "os.write(1, said.encode())  # whole at once\n"
        "if attempt == '0' and dist.get_rank(): os.kill(os.getpid(), 9)\n"
        "dist.barrier()\n"
    )
    done = launched("-n", "2", "--max-restarts", "1", str(script), "--log", "x", "-n", "3")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank} attempt 1 ['--log', 'x', '-n', '3']" in done.stdout
    command = done.stderr.splitlines()[0]
    assert command.startswith("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 ")
    assert "-m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=1" in command


def test_launch_on_several_machines_needs_a_meeting_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["launch", "--nodes", "2", "script.py"]) == 1
    assert "--nodes and --endpoint go together" in capsys.readouterr().err


def test_bench(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    launch_here: Callable[..., list[Any]],
) -> None:
    """Variants and configs beside dense attention; one that cannot run is told, not hidden."""
    monkeypatch.setattr("ring_core.bench.measure.launch", launch_here)
    config = tmp_path / "window.yaml"
    config.write_text(
        "variant: blocksparse\nblock_q: 16\nblock_kv: 16\n"
        "patterns: [{kind: local, left: 20, right: 0}]\n"
    )
    table = tmp_path / "table.yaml"
    table.write_text("variant: blocksparse\npatterns: [{kind: blocks, table: [[true]]}]\n")
    words = ["--variants", "standard", "--set", "causal=true", "--seq-len", "200", "--heads", "4"]
    words += ["--config", str(config), "--config", str(table), "--output", str(tmp_path / "out")]
    assert main(["bench", *words, "--json", "--turns", "1", "--dtype", "float64"]) == 1
    found = json.loads(capfd.readouterr().out)
    dense, standard, window, refused = found["rows"]
    assert [row["name"] for row in (dense, standard, window, refused)] == [
        "dense, one device",
        "standard",
        "window",
        "table",
    ]
    for row in (dense, standard, window):
        assert list(row["errors"]) == ["out", "dq", "dk", "dv"]
        assert max(row["errors"].values()) < 1e-12
        assert row["forward"] > 0
        assert row["both"] > 0
    assert (dense["ranks"], dense["bytes_sent"]) == (1, 0)
    assert 0 < window["bytes_sent"] < standard["bytes_sent"]
    assert "the table has 1 x 1 blocks" in refused["refused"]
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == found
    assert (tmp_path / "out" / "bench.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["hooks.md", "config.md", "cli.md"])
def test_pages_are_what_the_code_says(name: str) -> None:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (DOCS / name).read_text() == generate.page(name), "run: python docs/generate.py"
