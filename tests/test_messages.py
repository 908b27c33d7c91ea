"""Every error of the library as a user meets it, and its row in docs/troubleshooting.md."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ring_attention_distributed.checkpoints import Checkpoints

from ring_core import BaseRingAttention, errors, registry
from ring_core.cli import main
from ring_core.demo.document import load
from ring_core.errors import RingError
from ring_core.layout import contiguous
from ring_core.masks import FULL
from ring_core.plan import Plan, Rows, Tile
from ring_core.sequences import Sequences
from ring_core.store import ask
from ring_core.testing import RankPool, Worker

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
ABSTRACT = {"RingError", "PluginError"}


def inputs(*shape: int) -> list[torch.Tensor]:
    return [torch.randn(*shape, requires_grad=True) for _ in range(3)]


def twice(*_: Any) -> None:
    q, k, v = inputs(1, 4, 1, 8)
    out = registry.create("standard")(q, k, v)
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    gradient.sum().backward()


def nan(*_: Any) -> None:
    q, k, v = inputs(1, 4, 1, 8)
    registry.create("distributed", check_finite=True)(q, k * torch.inf, v)


def outside(*_: Any) -> None:
    Outside()(*inputs(1, 4, 1, 8))


class OutsidePlan(Plan):
    def tiles(self, rank: int, owner: int) -> list[Tile]:
        return [Tile(Rows(0, 4), Rows(0, 5), FULL)]


class Outside(BaseRingAttention):
    def make_plan(self, sequences: Sequences, world: int) -> OutsidePlan:
        layout = contiguous(sequences.q_len, world)
        return OutsidePlan(layout, layout)


def lost(*_: Any) -> None:
    def question() -> None:
        raise RuntimeError("Connection reset by peer")

    ask(question)


def no_communicator(worker: Worker) -> None:
    attention = registry.create("standard", group=worker.group, communicator="symmetric")
    attention(*inputs(1, 2, 1, 8), plan=attention.plan(4))


def apart(worker: Worker) -> None:
    attention = registry.create("standard", group=worker.group, causal=worker.rank == 0)
    attention(*inputs(1, 2, 1, 8), plan=attention.plan(4))


def late(worker: Worker) -> None:
    attention = registry.create("standard", group=worker.group, timeout=0.5)
    for step in range(2):
        if step and worker.rank:
            time.sleep(2)
        attention(*inputs(1, 2, 1, 8), plan=attention.plan(4))


def no_folder(worker: Worker, folder: str) -> None:
    model = torch.nn.Linear(2, 2)
    Checkpoints(folder, model, torch.optim.SGD(model.parameters()))


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution with a variant ``mine``, as pip would, for the length of a test."""

    def write(name: str, code: str) -> None:
        (tmp_path / f"{name}_plugin.py").write_text(code)
        metadata = tmp_path / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[ring_core.variants]\nmine = {name}_plugin\n")

    def installed(**codes: str) -> None:
        for name, code in codes.items():
            write(name, code)
        registry.refresh()
        registry.create("mine")

    monkeypatch.syspath_prepend(tmp_path)
    yield installed
    monkeypatch.undo()
    registry.refresh()


ALONE: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "ConfigError": (
        lambda: registry.create("standard", casual=True),
        ["casual", "Did you mean 'causal'?"],
    ),
    "InputError": (
        lambda: registry.create("standard")(*inputs(4, 1, 8)),
        ["q (4, 1, 8)", "expected [batch, rows, heads, head_dim]"],
    ),
    "PlanError": (
        outside,
        ["OutsidePlan.tiles(rank=0, owner=0)", "key rows 0 to 4", "rank 0 4 keys", "Layout.owned"],
    ),
    "UnknownVariantError": (
        lambda: registry.create("standrad"),
        ["'standrad'", "Did you mean 'standard'?", "Installed: "],
    ),
    "UnknownPresetError": (
        lambda: registry.create_from_preset("producton"),
        ["'producton'", "Did you mean 'production'?"],
    ),
    "KernelError": (
        lambda: registry.create("standard", kernel="cudnn")(*inputs(1, 4, 1, 8)),
        ["cudnn: CUDA only", "kernel='auto'"],
    ),
    "DifferentiationError": (twice, ["differentiable once"]),
    "NonFiniteError": (nan, ["k holds", "token 0"]),
    "RankFailedError": (lost, ["the store through which ranks meet is gone"]),
    "DocumentError": (lambda: load(Path("no such file")), ["no such file"]),
}
IN_A_GROUP: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "CommunicatorError": (no_communicator, ["symmetric: ", "communicator='auto'"]),
    "DisagreementError": (apart, ["causal: True on rank 0; False on rank 1"]),
    "RingTimeoutError": (late, ["rank", "0.5 s"]),
}
INSTALLED: dict[str, tuple[dict[str, str], list[str]]] = {
    "PluginLoadError": (
        {"broken": "raise OSError('no library')"},
        ["broken 1.0", "OSError: no library"],
    ),
    "HookApiError": ({"old": "RING_HOOK_API = 0"}, ["old 1.0", "0", "1"]),
    "DuplicateNameError": (
        {"one": "RING_HOOK_API = 1", "two": "RING_HOOK_API = 1"},
        ["one 1.0", "two 1.0", "RING_DISABLE_PLUGINS"],
    ),
}


def names() -> set[str]:
    found = dict(inspect.getmembers(errors, inspect.isclass))
    return {name for name, one in found.items() if issubclass(one, RingError)} - ABSTRACT


def said(name: str, message: str, expected: list[str]) -> None:
    for text in expected:
        assert text in message, (name, message)


@pytest.mark.parametrize("name", ALONE)
def test_messages(name: str) -> None:
    do, expected = ALONE[name]
    with pytest.raises(getattr(errors, name)) as caught:
        do()
    assert type(caught.value).__name__ == name
    said(name, str(caught.value), expected)


@pytest.mark.parametrize("name", IN_A_GROUP)
def test_messages_of_a_group(cpu_pool: RankPool, name: str) -> None:
    """The same on every rank."""
    do, expected = IN_A_GROUP[name]
    found = cpu_pool.run(do, world=2, errors=True, fresh=True)
    assert [type(one).__name__ for one in found] == [name] * 2
    if name != "CommunicatorError":  # of one rank's own config
        assert str(found[0]) == str(found[1])
    said(name, str(found[0]), expected)


@pytest.mark.parametrize("name", INSTALLED)
def test_messages_about_plugins(name: str, install: Install) -> None:
    codes, expected = INSTALLED[name]
    with pytest.raises(getattr(errors, name)) as caught:
        install(**codes)
    said(name, str(caught.value), expected)


def test_messages_about_checkpoints(cpu_pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for one in cpu_pool.run(no_folder, str(tmp_path / "file"), errors=True):
        assert type(one).__name__ == "CheckpointError"
        said("CheckpointError", str(one), ["rank 0 cannot use", "File exists"])


def test_messages_of_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output", str(tmp_path / "file")]) == 1
    said("DemoError", capsys.readouterr().err, ["cannot make --output"])


def test_every_error_has_a_test_and_a_row() -> None:
    shown = {*ALONE, *IN_A_GROUP, *INSTALLED, "CheckpointError", "DemoError"}
    assert shown == names()
    rows = {line.split("`")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")}
    assert rows == names()
