"""Names, creation, and every way in which a plugin can be missing or broken."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from ring_attention_standard import StandardConfig, StandardRingAttention

import ring_core
from ring_core import (
    BaseRingAttention,
    Preset,
    Registry,
    RingAttentionConfig,
    Variant,
    hookimpl,
    hookspec,
    registry,
)
from ring_core.catalogue import PIP_NAMES
from ring_core.errors import (
    ConfigError,
    DuplicateNameError,
    HookApiError,
    PluginLoadError,
    RingError,
    UnknownPresetError,
    UnknownVariantError,
)

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


class TestCreate:
    def test_by_name_config_and_mapping(self):
        for attention in (
            registry.create("standard", causal=True),
            registry.create("standard", config=RingAttentionConfig(causal=True)),
            registry.create("standard", config={"causal": True}),
            registry.create(
                "standard", config=StandardConfig(causal=False, layout="auto"), causal=True
            ),
            registry.create({"variant": "standard", "causal": True}),
            registry.create(RingAttentionConfig(variant="standard", causal=True)),
            ring_core.create_ring_attention("standard", causal=True),
            StandardRingAttention(causal=True),
            StandardRingAttention(RingAttentionConfig(causal=True)),
        ):
            assert type(attention) is StandardRingAttention
            assert type(attention.config) is StandardConfig
            assert attention.config == StandardConfig(causal=True)
            assert not list(attention.parameters())

    def test_two_names_are_refused(self):
        with pytest.raises(ConfigError, match=r"asked for 'standard'.*for 'hilbert'"):
            registry.create("standard", config=RingAttentionConfig(variant="hilbert"))
        with pytest.raises(ConfigError, match="not both"):
            registry.create({"variant": "standard"}, config={"causal": True})

    def test_a_variants_own_schema_says_which_variant_it_is_for(self, own):
        own.register(InProcess(), name="mine")
        assert own.create(OneField(causal=True)).config.variant == "mine"
        with pytest.raises(ConfigError, match=r"asked for 'standard'.*for 'mine'"):
            own.create("standard", config=OneField())
        with pytest.raises(ConfigError, match="variant is None"):
            own.create(None)
        with pytest.raises(ConfigError, match="StandardRingAttention is 'standard'"):
            StandardRingAttention(RingAttentionConfig(variant="hilbert"))

    def test_unknown_names_say_what_to_do(self, monkeypatch):
        with pytest.raises(
            UnknownVariantError, match=r"Did you mean 'standard'\? Installed: .*standard"
        ):
            registry.create("standrad")
        monkeypatch.setitem(PIP_NAMES, "absent", "ring-attention-absent")
        with pytest.raises(UnknownVariantError, match=r"pip install ring-attention-absent"):
            registry.create("absent")

    def test_auto(self, caplog):
        with caplog.at_level(logging.INFO, logger="ring_core"):
            assert type(registry.create("auto", causal=True)) is StandardRingAttention
        assert "auto chose variant 'standard': no field asks for another variant" in caplog.text
        with pytest.raises(
            ConfigError, match=r"no installed variant knows the field\(s\) causl.*'causal'"
        ):
            registry.create("auto", causl=True)

    def test_presets(self):
        with pytest.raises(
            UnknownPresetError, match=r"unknown preset 'nightly'.*installed plugins: "
        ):
            registry.create_from_preset("nightly")


class OneField(RingAttentionConfig):
    """A third party's schema."""

    variant: str = "mine"

    sharpness: float = 1.0
    """A field that no other variant has."""


class MineAttention(StandardRingAttention):
    """A third party's attention."""

    config_class = OneField


class ForgetfulAttention(BaseRingAttention):
    """One whose author did not name the schema."""


class InProcess:
    """A plugin object without packaging, which answers to whatever name it is registered by."""

    RING_HOOK_API = 1

    @hookimpl
    def ring_variant(self):
        return Variant(
            config=OneField,
            attention=f"{__name__}:MineAttention",
            retired_names={"older": "2.0"},
        )

    @hookimpl
    def ring_presets(self):
        return {"sharp": Preset("mine", {"sharpness": 2.0})}


@pytest.fixture
def own():
    """A registry apart from the process's own."""
    return Registry()


class TestRegister:
    def test_an_object_is_a_first_class_plugin(self, own):
        own.register(InProcess(), name="mine")
        assert own.names() == sorted(["mine", *INSTALLED])
        assert own.variant("mine").config is OneField
        own.unregister("mine")
        assert own.names() == INSTALLED

    def test_auto_takes_the_only_variant_that_knows_a_field(self, own):
        own.register(InProcess(), name="mine")
        assert own._choose({"sharpness": 2.0}, None)[0] == "mine"

    def test_preset_fields_are_overridden_and_validated(self, own):
        own.register(InProcess(), name="mine")
        assert own.presets()["sharp"].fields == {"sharpness": 2.0}
        with pytest.raises(ConfigError, match="Did you mean 'sharpness'"):
            own.create_from_preset("sharp", sharpnes=3.0)

    def test_a_taken_name_is_refused(self, own):
        with pytest.raises(
            DuplicateNameError, match=r"'standard' is taken by ring-attention-standard 0"
        ):
            own.register(InProcess(), name="standard")

    def test_a_retired_name_works_and_warns(self, own):
        own.register(InProcess(), name="mine")
        with pytest.warns(DeprecationWarning, match=r"'older' is now called 'mine'.*version 2.0"):
            assert own.variant("older").config is OneField

    @pytest.mark.parametrize(
        ("config", "attention", "said"),
        [
            (
                OneField,
                "ForgetfulAttention",
                r"is OneField.*has config_class = RingAttentionConfig",
            ),
            (
                RingAttentionConfig,
                "MineAttention",
                r"is RingAttentionConfig.*config_class = OneField",
            ),
            (StandardConfig, "MineAttention", r"is StandardConfig.*has config_class = OneField"),
        ],
    )
    def test_two_schemas_for_one_variant_are_named(self, own, config, attention, said):
        class Torn(InProcess):
            @hookimpl
            def ring_variant(self):
                return Variant(config=config, attention=f"{__name__}:{attention}")

        own.register(Torn(), name="torn")
        with pytest.raises(PluginLoadError, match=rf"register\('torn'\).*: Variant.config {said}"):
            own.create("torn")

    def test_a_class_serves_schemas_that_extend_its_own(self, own):
        class Finer(OneField):
            variant: str = "finer"

        class Bringer(InProcess):
            @hookimpl
            def ring_variant(self):
                return Variant(config=Finer, attention=f"{__name__}:MineAttention")

        own.register(Bringer(), name="finer")
        assert type(own.create("finer", sharpness=3.0).config) is Finer

    def test_an_outdated_plugin_names_both_versions(self, own):
        class Old(InProcess):
            RING_HOOK_API = 0

        with pytest.raises(
            HookApiError, match=r"built for hook API 0, and this core has hook API 1"
        ):
            own.register(Old(), name="old")
        assert own.names() == INSTALLED

    def test_a_plugin_without_a_version_is_told_to_declare_one(self, own):
        with pytest.raises(HookApiError, match="write RING_HOOK_API = 1"):
            own.register(object(), name="bare")

    def test_a_misspelled_hook_is_named(self, own):
        class Misspelled(InProcess):
            @hookimpl
            def ring_kernel(self):
                return []

        with pytest.raises(
            PluginLoadError, match=r"'ring_kernel', which is no hook. Did you mean 'ring_kernels'"
        ):
            own.register(Misspelled(), name="typo")

    def test_a_hook_that_raises_leaves_the_others_alone(self, own):
        class Raises(InProcess):
            @hookimpl
            def ring_kernels(self):
                raise RuntimeError("no GPU of ours")

        own.register(Raises(), name="fragile")
        attention = own.create("standard", causal=True)
        assert attention.config.causal
        row = next(row for row in own.plugins() if row.name == "fragile")
        assert (row.status, row.error) == (
            "failed",
            "ring_kernels raised RuntimeError: no GPU of ours",
        )

    def test_plugins_may_bring_hook_specifications(self, own):
        class Specs:
            @hookspec
            def my_patterns(self):
                """Pattern kinds."""

        class Bringer(InProcess):
            @hookimpl
            def ring_hookspecs(self):
                return Specs

        class Implementer:
            RING_HOOK_API = 1

            @hookimpl
            def my_patterns(self):
                return ["stripes"]

        with pytest.raises(PluginLoadError, match="my_patterns"):
            own.register(Implementer(), name="implementer")
        own.register(Bringer(), name="bringer")
        own.register(Implementer(), name="implementer")
        assert own.ask("my_patterns") == [["stripes"]]


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


def test_no_warning_on_the_normal_way():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Registry().create("standard", causal=True)


def test_auto_says_who_knows_which_field() -> None:
    with pytest.raises(ConfigError, match=r"grid: hilbert; retries: distributed\)\. Name the var"):
        registry.create("auto", grid=(4, 4), retries=1)
    with pytest.raises(ConfigError) as caught:
        registry.create("auto", causl=True)
    assert "pip install" not in str(caught.value), "all that is known is installed"


def test_a_variant_may_hand_over_its_class() -> None:
    class Plugin:
        RING_HOOK_API = ring_core.HOOK_API

        @hookimpl
        def ring_variant(self, name: str) -> Variant:
            return Variant(StandardConfig, StandardRingAttention)

    mine = Registry()
    mine.register(Plugin(), name="mine")
    assert isinstance(mine.create("mine"), StandardRingAttention)
