"""The command line: list, doctor, exit codes, and the launcher that doctor and demo share."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ring_core import errors, hookimpl
from ring_core.cli import checks, listing, main
from ring_core.cli.findings import ok
from ring_core.cli.next_command import next_command
from ring_core.errors import InputError, RankFailedError
from ring_core.launching import Worker, launch
from ring_core.registry import registry


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a distribution with one variant, as pip would, for the length of a test."""

    def install(name: str, code: str, group: str = "ring_core.variants") -> None:
        (tmp_path / f"{name}_plugin.py").write_text(code)
        metadata = tmp_path / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {name}_plugin\n")
        registry.refresh()

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    monkeypatch.undo()
    registry.refresh()


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


# list


@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["--help"], ["demo", "--help"]])
def test_list_and_help_import_no_torch(words: list[str]) -> None:
    ran = _python(
        "import sys\n"
        "from ring_core.cli import main\n"
        "try:\n"
        f"    status = main({words})\n"
        "except SystemExit as end:\n"
        "    status = end.code\n"
        "assert status == 0, status\n"
        "assert 'torch' not in sys.modules"
    )
    assert ran.returncode == 0, ran.stderr


def test_list_shows_what_is_installed_and_how_to_get_the_rest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "PIP_NAMES", {"standard": "x", "absent": "ring-attention-absent"})
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "ring-attention-standard" in shown
    assert "exact attention, dense" in shown
    assert "absent: pip install ring-attention-absent" in shown
    assert "\x1b" not in shown


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    standard = next(plugin for plugin in found["plugins"] if plugin["name"] == "standard")
    assert standard["distribution"] == "ring-attention-standard"
    assert standard["brings"] == "variant"
    assert standard["status"] == "loaded"
    assert standard["summary"]
    assert standard["error"] == ""
    assert "standard" not in [variant["name"] for variant in found["not_installed"]]


def test_list_shows_a_broken_plugin_beside_the_others(
    capsys: pytest.CaptureFixture[str], installed: Callable[..., None]
) -> None:
    installed("broken", "raise OSError('no [such] library')")
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "failed to import: OSError: no [such] library" in shown
    assert "loaded" in shown


# doctor


def test_doctor_finds_nothing_wrong_here(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["healthy"]
    findings = {finding["topic"]: finding for finding in found["findings"]}
    assert "relative error at most" in findings["2 processes over gloo"]["text"]
    assert findings["communicator, cpu over gloo"]["text"].startswith("p2p")
    assert findings["kernel, float32 on cpu"]["text"].startswith("cpu_flash (")
    assert "cudnn: CUDA only" in findings["kernel, float32 on cpu"]["text"]
    assert findings["plugin standard"]["status"] == "ok"
    assert all(f["remedy"] for f in found["findings"] if f["status"] != "ok")


def test_doctor_fails_for_a_broken_plugin_and_says_what_to_do(
    capsys: pytest.CaptureFixture[str],
    installed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed("broken", "raise OSError('no library')")
    monkeypatch.setattr(checks, "_smoke_runs", lambda: iter([ok("run", "left out")]))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "problem plugin broken: broken 1.0: failed: failed to import: OSError" in shown
    assert "pip install --force-reinstall broken" in shown
    assert "1 problem(s)" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("group", "meant"),
    [
        ("ring_core.variant", "ring_core.variants"),
        ("ring-core.variants", "ring_core.variants"),
        ("ring_core_variants", "ring_core.variants"),
        ("ring_attention.plugins", "ring_core.plugins"),
        ("other_core.plugins", None),
    ],
)
def test_doctor_finds_entry_points_of_misspelled_groups(
    capsys: pytest.CaptureFixture[str],
    installed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    meant: str | None,
) -> None:
    installed("mine", "raise OSError('not to be run')", group)
    monkeypatch.setattr(checks, "_smoke_runs", lambda: iter([ok("run", "left out")]))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    said = f"warning entry point mine: mine 1.0: group {group!r} is not {meant!r}"
    assert (said in shown) == (meant is not None)
    assert (f'write [project.entry-points."{meant}"]' in shown) == (meant is not None)


def test_doctor_without_torch_stops_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises
    assert main(["doctor", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["topic"] for finding in findings] == ["python", "torch"]
    assert findings[1]["remedy"] == "pip install torch"


def _raise(worker: Worker) -> None:
    if worker.rank == 1:
        raise InputError("the cause [on rank 1]")
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.zeros(1))  # fails too, once rank 1 is gone


def test_doctor_passes_on_what_a_rank_raised(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ring_core.launching.launch", lambda *args, **options: launch(_raise, processes=2)
    )
    findings = list(checks._smoke("cpu", "gloo", "float64", 1e-10))
    assert [finding.status for finding in findings] == ["problem"]
    assert "rank 1 of 2 failed with InputError: the cause [on rank 1]" in findings[0].text
    assert capfd.readouterr().err == ""  # nothing of the launcher's own


# Exit codes and the launcher


@pytest.mark.parametrize(
    "words", [[], ["lst"], ["list", "--what"], ["demo", "--processes", "1"], ["demo", "--steps=x"]]
)
def test_usage_errors_exit_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "usage: ring-attention" in capsys.readouterr().err


def test_an_error_ends_with_a_command_and_a_traceback_comes_only_if_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: object) -> int:
        raise InputError("expected [B, S, H, D]")

    monkeypatch.setattr(listing, "run", fail)
    assert main(["list"]) == 1
    said = "error: expected [B, S, H, D]\nTry: ring-attention list --help\n"
    assert capsys.readouterr() == ("", said)
    assert main(["list", "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "command"),
    [
        (errors.UnknownVariantError("unknown"), "ring-attention list"),
        (errors.PluginLoadError("broken"), "ring-attention list"),
        (errors.KernelError("none"), "ring-attention doctor"),
        (errors.ConfigError("layout"), "ring-attention show hilbert"),
        (errors.RankFailedError("rank 1"), "ring-attention plan --verbose, with the same options"),
        (errors.KernelError("none. 'ring-attention doctor' shows every kernel"), None),
        (errors.UnknownVariantError("Install it with: pip install ring-attention-hilbert"), None),
    ],
)
def test_the_next_command(error: errors.RingError, command: str | None) -> None:
    arguments = argparse.Namespace(command="plan", variant="hilbert")
    assert next_command(error, arguments) == command


def test_ctrl_c_exits_130_quietly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(listing, "run", interrupted)
    assert main(["list"]) == 130
    assert capsys.readouterr() == ("", "")


def _rank_and_sum(worker: Worker, number: int) -> tuple[int, int, float]:
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(worker.rank + number)])
    dist.all_reduce(total)
    return worker.rank, worker.world, float(total)


def _die(worker: Worker) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_launch_returns_what_the_ranks_did_and_leaves_signals_alone() -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    assert launch(_rank_and_sum, 10, processes=2) == [(0, 2, 21.0), (1, 2, 21.0)]
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_launch_says_that_a_process_was_killed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankFailedError, match=r"rank 0 of 1 was ended by signal 9 \(SIGKILL\)"):
        launch(_die, processes=1)
    assert capfd.readouterr().err == ""


class Commanding:
    """A plugin with a command that works and one that cannot be imported."""

    RING_HOOK_API = 1

    @hookimpl
    def ring_commands(self) -> dict[str, str]:
        return {"shout": "shout_for_tests", "absent": "no_such_module", "list": "no_such_module"}


def test_plugins_bring_commands(monkeypatch, capsys) -> None:
    shout = types.ModuleType("shout_for_tests")
    shout.SUMMARY = "say it loudly"
    shout.add_arguments = lambda parser: parser.add_argument("word")
    shout.run = lambda arguments: print(arguments.word.upper()) or 0
    monkeypatch.setitem(sys.modules, "shout_for_tests", shout)
    registry.register(Commanding(), name="commanding")
    try:
        assert main(["shout", "ring"]) == 0
        shown = capsys.readouterr()
        assert shown.out == "RING\n"
        assert "command 'absent' of no_such_module failed to import" in shown.err
        assert main(["list", "--json"]) == 0, "the core's own command of that name"
        assert "commanding" not in registry.names(), "it brings no variant"
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "say it loudly" in capsys.readouterr().out
    finally:
        registry.unregister("commanding")
