"""Names, creation, and plugins that are registered by hand."""

from __future__ import annotations

import logging
import warnings

import pytest
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
    UnknownPresetError,
    UnknownVariantError,
)

INSTALLED = ["blocksparse", "distributed", "hilbert", "standard"]
"""The variants of this repository."""


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
