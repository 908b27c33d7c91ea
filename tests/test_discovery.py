"""Plugins found by entry points: listed unread, broken, disabled, of hooks alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

from ring_core import Registry, registry
from ring_core.errors import RingError

INSTALLED = ["blocksparse", "distributed", "hilbert", "standard"]
"""The variants of this repository."""

GOOD = """
    from ring_core import Variant, hookimpl
    from ring_attention_standard import StandardConfig
    RING_HOOK_API = 1
    @hookimpl
    def ring_variant(name):
        return Variant(config=StandardConfig, attention="ring_attention_standard:StandardRingAttention",
                       summary="a third party's")
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path where distributions with entry points can be written."""
    folder = Path(tmp_path)
    monkeypatch.syspath_prepend(folder)
    written = []

    def write(distribution, module, source, group="ring_core.variants", name=None, requires=()):
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        written.append(module)
        info = folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {one}\n" for one in requires)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n{needs}"
        )
        (info / "entry_points.txt").write_text(f"[{group}]\n{name or module} = {module}\n")

    write.folder = folder
    yield write
    monkeypatch.undo()
    for module in written:
        sys.modules.pop(module, None)
    registry.refresh()


def _fresh(folder, code, **environment):
    """Run ``code`` in a new interpreter that sees the folder's distributions; its printed JSON."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _listed(**environment):
    """Names, what a variant ``mine`` says when it is made, and warnings about the variables."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, value in environment.items():
            patch.setenv(name, value)
        own = Registry()
        names, said = own.names(), ""
        try:
            own.create("mine")
        except RingError as error:
            said = f"{type(error).__name__}: {error}"
    return [names, said, [str(one.message) for one in caught if "RING_" in str(one.message)]]


def test_names_import_no_torch_and_run_no_plugin_code(site):
    site("loud", "loud", "raise SystemExit('this plugin was run')")
    answer = _fresh(
        site.folder,
        """
        import json, sys
        import ring_core
        names = ring_core.registry.names()
        print(json.dumps([names, [m for m in ("torch", "loud", "ring_attention_standard") if m in sys.modules]]))
        """,
    )
    assert answer == [sorted(["loud", *INSTALLED]), []]


def test_loading_plugins_imports_no_torch(site):
    answer = _fresh(
        site.folder,
        """
        import json, sys
        from ring_core import registry
        rows = [(row.name, row.status) for row in registry.plugins()]
        print(json.dumps([rows, registry.variant("standard").summary != "", "torch" in sys.modules]))
        """,
    )
    assert answer == [[[name, "loaded"] for name in INSTALLED], True, False]


class TestBrokenPlugins:
    def test_each_has_its_row_and_its_error_and_the_others_work(self, site):
        site("good-dist", "good", GOOD)
        site("broken-dist", "broken", "import no_such_module")
        site("exits-dist", "exits", "raise SystemExit(3)")
        site("old-dist", "old", GOOD.replace("RING_HOOK_API = 1", "RING_HOOK_API = 99"))
        site("empty-dist", "empty", "RING_HOOK_API = 1")
        site("twice-a", "twice_a", GOOD, name="twice")
        site("twice-b", "twice_b", GOOD, name="twice")
        answer = _fresh(
            site.folder,
            """
            import json
            from ring_core import registry
            out = {row.name + "/" + row.distribution: [row.version, row.status, row.error] for row in registry.plugins()}
            errors = {}
            for name in registry.names():
                try:
                    registry.create(name, causal=True)
                except Exception as error:
                    errors[name] = [type(error).__name__, str(error)]
            print(json.dumps([registry.names(), out, errors]))
            """,
        )
        names, rows, errors = answer
        assert names == sorted(["broken", "empty", "exits", "good", "old", "twice", *INSTALLED])
        assert {name: row[1] for name, row in rows.items()} == {
            "good/good-dist": "loaded",
            **{f"{name}/ring-attention-{name}": "loaded" for name in INSTALLED},
            "broken/broken-dist": "failed",
            "exits/exits-dist": "failed",
            "empty/empty-dist": "failed",
            "old/old-dist": "outdated",
            "twice/twice-a": "conflict",
            "twice/twice-b": "conflict",
        }
        assert set(errors) == {"broken", "exits", "empty", "old", "twice"}
        kind, text = errors["broken"]
        assert kind == "PluginLoadError"
        for part in ("broken-dist 1.2", "broken = broken", "ModuleNotFoundError", "no_such_module"):
            assert part in text
        kind, text = errors["old"]
        assert kind == "HookApiError"
        assert "hook API 99" in text
        assert "hook API 1" in text
        kind, text = errors["twice"]
        assert kind == "DuplicateNameError"
        assert "twice-a 1.2" in text
        assert "twice-b 1.2" in text

    def test_ring_plugins_allows_only_those_and_what_they_need(self, site):
        site("mine-dist", "mine", GOOD, requires=["ring-attention-standard>=0.1"])
        site("other-dist", "other", GOOD)
        assert _listed(RING_PLUGINS="mine") == [["mine", "standard"], "", []]
        names, said, _ = _listed(RING_PLUGINS="other-dist")
        assert names == ["other"]
        assert said == (
            "UnknownVariantError: variant 'mine' of mine-dist 1.2 (entry point 'mine = mine') is disabled: "
            "left out by RING_PLUGINS=other-dist."
        )

    def test_ring_disable_plugins_leaves_those_out(self, site):
        site("mine-dist", "mine", GOOD)
        names, said, _ = _listed(RING_DISABLE_PLUGINS="mine")
        assert names == INSTALLED
        assert "left out by RING_DISABLE_PLUGINS=mine" in said

    def test_a_name_that_is_no_plugin_is_told(self, site):
        site("mine-dist", "mine", GOOD)
        *_, warned = _listed(RING_DISABLE_PLUGINS="mina")
        assert warned == ["RING_DISABLE_PLUGINS names 'mina', which no installed plugin is"]

    def test_disabling_one_claimant_settles_a_conflict(self, site):
        site("mine-a", "mine_a", GOOD, name="mine")
        site("mine-b", "mine_b", GOOD, name="mine")
        _, said, _ = _listed()
        assert said.startswith("DuplicateNameError")
        assert _listed(RING_DISABLE_PLUGINS="mine-b")[:2] == [sorted(["mine", *INSTALLED]), ""]

    def test_hook_only_plugins_are_loaded_too(self, site):
        site(
            "watcher-dist",
            "watcher",
            """
            from ring_core import Observer, WrappedKernel, hookimpl
            RING_HOOK_API = 1
            calls = []
            class Counted(WrappedKernel):
                def forward(self, *args, **options):
                    calls.append(1)
                    return super().forward(*args, **options)
            class Counting(Observer):
                def kernel(self, kernel):
                    return Counted(kernel)
            @hookimpl
            def ring_observers():
                return [Counting()]
            """,
            group="ring_core.plugins",
        )
        registry.refresh()
        q = torch.randn(1, 4, 2, 8)
        registry.create("standard")(q, q, q)
        assert registry.names() == INSTALLED
        assert len(sys.modules["watcher"].calls) == 1
