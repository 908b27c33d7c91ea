"""Variants by name: list them, build them, and say clearly when one cannot be built."""

from __future__ import annotations

import copy
import logging
import os
import pkgutil
import sys
import threading
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ring_core.catalogue import PIP_NAMES
from ring_core.config import RingAttentionConfig, common_fields
from ring_core.discovery import DISABLE, PLUGINS, VARIANTS, PluginRow, discover
from ring_core.errors import (
    ConfigError,
    DuplicateNameError,
    PluginLoadError,
    RingError,
    UnknownPresetError,
    UnknownVariantError,
    closest,
    did_you_mean,
)
from ring_core.hookspecs import Observer, Preset, Variant
from ring_core.loading import Plugins, error_of

if TYPE_CHECKING:
    from ring_core.attention import BaseRingAttention
    from ring_core.protocols import AttentionKernel, Communicator

logger = logging.getLogger("ring_core")


class Registry:
    """The plugins of this process: those installed, and those registered by hand.

    Plugins are found at the first question and loaded at the first one that needs their code.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._by_hand: dict[str, object] = {}
        self._plugins: Plugins | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Registry:
        return self  # plugins belong to the process, not to what was built with them

    def __reduce__(self) -> tuple[type[Registry], tuple[()]]:
        return Registry, ()  # elsewhere, that process's plugins

    def refresh(self) -> None:
        """Forget what was found and loaded, so that the next question looks again."""
        with self._lock:
            self._plugins = None

    # What there is

    def names(self) -> list[str]:
        """Sorted names of the variants that are installed and enabled. Runs no plugin's code."""
        rows = self._found().rows
        return sorted({r.name for r in rows if r.group == VARIANTS and r.status != "disabled"})

    def plugins(self) -> list[PluginRow]:
        """A row per plugin: name, distribution, version, status, error. Loads every plugin."""
        return [copy.copy(row) for row in self._ready().rows]

    def presets(self) -> dict[str, Preset]:
        """Every preset of the plugins, by name.

        Raises:
            DuplicateNameError: two plugins bring a preset of one name.
        """
        presets: dict[str, tuple[Preset, str]] = {}
        for row, brought in self._ready().ask("ring_presets"):
            for name, preset in (brought or {}).items():
                if name in presets:
                    raise DuplicateNameError(
                        f"preset {name!r} is brought by {presets[name][1]} and by {row.origin}; "
                        f"leave one out with {DISABLE}"
                    )
                presets[name] = preset, row.origin
        return {name: preset for name, (preset, _) in presets.items()}

    def variant(self, name: str) -> Variant:
        """The variant of that name, with its schema; imports no torch.

        Raises:
            UnknownVariantError, DuplicateNameError, PluginLoadError, HookApiError: see there.
        """
        name = self._current_name(name)
        variants = self._ready().variants
        if name not in variants:
            raise self._no_variant(name)
        return variants[name]

    def ask(self, hook: str, **arguments: Any) -> list[Any]:
        """Every plugin's answer to ``hook``, one of the core's or of a plugin's own."""
        return [answer for _, answer in self._ready().ask(hook, **arguments)]

    # Building

    def create(
        self,
        variant: str | Mapping[str, Any] | RingAttentionConfig,
        *,
        config: RingAttentionConfig | Mapping[str, Any] | None = None,
        group: Any = None,
        **fields: Any,
    ) -> BaseRingAttention:
        """Build an attention: by name, from a config, or from a mapping with a ``variant`` key.

        Args:
            variant: a variant's name, ``"auto"``, or a config (object or mapping) that names one.
            config: fields to start from; a base config is widened to the variant's own schema.
            group: ProcessGroup or 1-D DeviceMesh; None takes the default group at each plan.
            fields: override those of ``config``.

        Raises:
            ConfigError: a field is unknown or out of range, or a combination has no meaning.
            UnknownVariantError, DuplicateNameError, PluginLoadError, HookApiError: see there.
        """
        if not isinstance(variant, str):
            if variant is None:
                raise ConfigError("variant is None; give a name, 'auto', or a config")
            if config is not None:
                raise ConfigError(
                    "give the config either as the first argument or as config=, not both"
                )
            config, variant = variant, "auto"
        given = {**_given(config), **fields}
        named = given.pop("variant", "auto")
        asked, meant = self._current_name(variant), self._current_name(named)
        if "auto" not in (asked, meant) and asked != meant:
            raise ConfigError(
                f"variant: asked for {variant!r}, and the config is for {named!r}; name one of them"
            )
        name = meant if asked == "auto" else asked
        if name == "auto":
            name, reason = self._choose(given, group)
            logger.info("auto chose variant %r: %s", name, reason)
        described = self.variant(name)
        checked = described.config(variant=name, **given)
        attention: BaseRingAttention = self._attention_class(name, described)(
            checked, group=group, registry=self
        )
        return attention

    def create_from_preset(
        self, preset: str, *, group: Any = None, **fields: Any
    ) -> BaseRingAttention:
        """Build the attention of a preset; ``fields`` override the preset's, validated alike.

        Raises:
            UnknownPresetError: no installed, enabled plugin brings that preset.
            ConfigError: a field is unknown or out of range.
        """
        presets = self.presets()
        if preset not in presets:
            raise UnknownPresetError(
                f"unknown preset {preset!r}.{did_you_mean(preset, presets)} "
                f"Presets of the installed plugins: {', '.join(sorted(presets)) or 'none'}."
            )
        chosen = presets[preset]
        return self.create(chosen.variant, group=group, **{**chosen.fields, **fields})

    def register(self, plugin: object, name: str) -> None:
        """Add a plugin object of this process under ``name``; its variant, if any, gets that name.

        Raises:
            DuplicateNameError: the name is taken.
            PluginLoadError, HookApiError: the object is no usable plugin; nothing is registered.
        """
        with self._lock:
            taken = self._found().row(name) or self._found().row(name, PLUGINS)
            if taken is not None and taken.status != "disabled":
                raise DuplicateNameError(
                    f"{name!r} is taken by {taken.origin}; register under another name"
                )
            self._by_hand[name] = plugin
            self.refresh()
            row = self._ready().row(name) or self._ready().row(name, PLUGINS)
            if row is not None and row.status != "loaded":
                self.unregister(name)
                raise error_of(row)

    def unregister(self, name: str) -> None:
        """Take back what :meth:`register` added under ``name``."""
        with self._lock:
            if name not in self._by_hand:
                raise UnknownVariantError(
                    f"nothing was registered as {name!r}; registered: {sorted(self._by_hand)}"
                )
            del self._by_hand[name]
            self.refresh()

    # What an attention asks for while it is built

    def kernels(self, config: RingAttentionConfig) -> list[AttentionKernel]:
        """Every kernel the plugins bring for ``config``.

        Raises:
            PluginLoadError: the plugin that brings the config's variant failed over it.
        """
        return self._all("ring_kernels", config)

    def communicators(self, config: RingAttentionConfig) -> list[type[Communicator]]:
        """Every communicator class the plugins bring for ``config``; raises as :meth:`kernels`."""
        return self._all("ring_communicators", config)

    def observers(self, config: RingAttentionConfig) -> list[Observer]:
        """Every observer the plugins bring for ``config``; raises as :meth:`kernels`."""
        return self._all("ring_observers", config)

    def origin(self, name: str) -> str:
        """Distribution and version that bring variant ``name``; what ranks compare."""
        row = self._found().row(name)
        return f"{row.distribution} {row.version}" if row else "not a plugin"

    # Inside

    def _all(self, hook: str, config: RingAttentionConfig) -> list[Any]:
        found = [one for brought in self.ask(hook, config=config) for one in brought or ()]
        row = self._found().row(config.variant)
        if row is not None and row.status == "failed":
            raise error_of(row)  # without its hooks, fields of its config would be ignored
        return found

    def _found(self) -> Plugins:
        with self._lock:
            if self._plugins is None:
                self._plugins = Plugins(discover(), self._by_hand)
            return self._plugins

    def _ready(self) -> Plugins:
        with self._lock:
            plugins = self._found()
            plugins.load()
            return plugins

    def _current_name(self, name: str) -> str:
        """``name``, or the successor of a retired one, with a warning."""
        variants = self._ready().variants
        for current, variant in variants.items():
            if name in variant.retired_names and name not in variants:
                warnings.warn(
                    f"variant {name!r} is now called {current!r}; the old name goes in version "
                    f"{variant.retired_names[name]}",
                    DeprecationWarning,
                    stacklevel=_callers_level(),
                )
                return current
        return name

    def _no_variant(self, name: str) -> RingError:
        row = self._found().row(name)
        if row is None or row.status == "loaded":
            known = [*self.names(), *PIP_NAMES]
            text = (
                f"unknown variant {name!r}.{did_you_mean(name, known) if name not in known else ''}"
            )
            text += f" Installed: {', '.join(self.names()) or 'none'}."
            meant = name if name in PIP_NAMES else closest(name, known)
            if meant in PIP_NAMES and meant not in self.names():
                text += f" Install {'it' if meant == name else meant} with: "
                text += f"pip install {PIP_NAMES[meant]}"
            return UnknownVariantError(text)
        if row.status == "disabled":
            return UnknownVariantError(
                f"variant {name!r} of {row.origin} is disabled: {row.error}."
            )
        return error_of(row)

    def _choose(self, given: Mapping[str, Any], group: Any) -> tuple[str, str]:
        """The variant that ``auto`` takes, and why."""
        variants = self._ready().variants
        special = set(given) - common_fields()
        if not special:
            if "distributed" in variants and _spans_hosts(group):
                return "distributed", "the group spans hosts"
            return "standard", "no field asks for another variant"
        listed = ", ".join(sorted(special))
        knowing = [n for n, v in sorted(variants.items()) if special <= set(v.config.model_fields)]
        if len(knowing) == 1:
            return knowing[0], f"only its schema knows {listed}"
        schemas = {name: variants[name].config for name in knowing}
        # A schema that extends another one knows its fields, too: then they are the other's.
        first = [n for n in knowing if not any(_extends(schemas[n], schemas[m]) for m in knowing)]
        if len(first) == 1:
            return first[0], f"{listed} are of its schema, which others extend"
        if knowing:
            raise ConfigError(f"{listed}: known to {', '.join(knowing)}; name the variant")
        knowers = {
            field: sorted(n for n, v in variants.items() if field in v.config.model_fields)
            for field in sorted(special)
        }
        if all(knowers.values()):
            each = "; ".join(f"{field}: {', '.join(who)}" for field, who in knowers.items())
            raise ConfigError(
                f"no installed variant knows all of {listed} ({each}). Name the variant, and leave "
                "out the fields of others, or give those in the inner of one that wraps another"
            )
        fields = {field for one in variants.values() for field in one.config.model_fields}
        hints = "".join(did_you_mean(name, fields) for name in sorted(special - fields))
        text = (
            f"no installed variant knows the field(s) {listed}.{hints} "
            f"Installed: {', '.join(sorted(variants)) or 'none'}"
        )
        # What is installed and disabled is told by the registry's table.
        others = [pip for name, pip in PIP_NAMES.items() if self._found().row(name) is None]
        if others:
            text += f"; others may know them: pip install {' '.join(others)}"
        raise ConfigError(text)

    def _attention_class(self, name: str, variant: Variant) -> type[BaseRingAttention]:
        row = self._found().row(name)
        origin = row.origin if row else name
        try:
            found: type[BaseRingAttention] = (
                variant.attention
                if isinstance(variant.attention, type)
                else pkgutil.resolve_name(variant.attention)
            )
            named, schema = variant.config, found.config_class
        except Exception as error:
            raise PluginLoadError(
                f"{origin} failed to import {variant.attention!r}: {type(error).__name__}: {error}"
            ) from error
        # A class may serve schemas that extend its own; all of them extend the common one.
        forgotten = schema is RingAttentionConfig and named is not RingAttentionConfig
        if forgotten or not issubclass(named, schema):
            raise PluginLoadError(
                f"{origin}: Variant.config is {named.__name__}, and {variant.attention!r} has "
                f"config_class = {schema.__name__}: give both the variant's own schema"
            )
        return found


def _extends(schema: type[RingAttentionConfig], other: type[RingAttentionConfig]) -> bool:
    return schema is not other and issubclass(schema, other)


def _given(config: RingAttentionConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, RingAttentionConfig):
        # A variant's own schema says by its default which variant it is for.
        named = {} if config.variant == "auto" else {"variant": config.variant}
        return {**config.given(), **named}
    if isinstance(config, Mapping):
        return dict(config)
    raise ConfigError(
        f"a config is a RingAttentionConfig or a mapping, not {type(config).__name__}"
    )


def _callers_level() -> int:
    """The ``stacklevel`` by which a warning points to the first line outside this package.

    Python shows a DeprecationWarning only where it points into the program itself.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_globals.get("__name__", "").startswith("ring_core.") and frame.f_back:
        frame, level = frame.f_back, level + 1
    return level


def _spans_hosts(group: Any) -> bool:
    """Whether the ranks of ``group`` run on more than one host, as torch's launcher tells it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if not 0 < local < int(os.environ.get("WORLD_SIZE", "1")):
        return False
    from ring_core.groups import ranks_of

    return len({rank // local for rank in ranks_of(group)}) > 1


registry = Registry()
"""The registry of this process."""


def create_ring_attention(
    variant: str | Mapping[str, Any] | RingAttentionConfig, **options: Any
) -> BaseRingAttention:
    """:meth:`Registry.create` on the registry of this process."""
    return registry.create(variant, **options)


def create_ring_attention_from_preset(preset: str, **options: Any) -> BaseRingAttention:
    """:meth:`Registry.create_from_preset` on the registry of this process."""
    return registry.create_from_preset(preset, **options)
