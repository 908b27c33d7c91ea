"""What a plugin may implement. Hooks run when an attention is built, never in the hot loop.

A plugin is a module or an object, named by an entry point of group ``ring_core.variants`` (it
brings a variant; the entry point's name is the variant's name) or ``ring_core.plugins`` (it brings
other hooks). It carries ``RING_HOOK_API = 1``, the literal version it was written for, and
functions marked with :data:`hookimpl`. Importing it must not import torch: name torch code by
string, or import it inside the hooks that need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

from ring_core.config import RingAttentionConfig

if TYPE_CHECKING:
    from ring_core.protocols import AttentionKernel, Communicator

HOOK_API = 1
"""Version of the hook specifications below; it changes when an existing plugin would break."""

PROJECT = "ring_core"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Variant:
    """A variant as its plugin describes it."""

    config: type[RingAttentionConfig]
    """The variant's own schema."""
    attention: str | type[Any]
    """``"module:Class"`` of its :class:`~ring_core.attention.BaseRingAttention` subclass; imported
    at the first ``create``, so that listing variants needs no torch. Or the class, where that does
    not matter."""
    summary: str = ""
    """One line for listings."""
    retired_names: Mapping[str, str] = field(default_factory=dict)
    """Earlier names of this variant, each with the version that drops it."""


@dataclass(frozen=True)
class Preset:
    """A named set of fields for one variant."""

    variant: str
    fields: Mapping[str, Any]
    summary: str = ""


class Observer:
    """Watches an attention at work by wrapping its parts as they are built.

    A wrapper keeps the interface of what it wraps: it is a subclass of
    :class:`~ring_core.wrapping.WrappedCommunicator` or :class:`~ring_core.wrapping.WrappedKernel`.
    It is not the place for a retry: a failure belongs to the whole group, and a retry by one rank
    alone desynchronises its peers.
    """

    def communicator(self, communicator: Communicator) -> Communicator:
        """Return ``communicator`` or something that wraps it."""
        return communicator

    def kernel(self, kernel: AttentionKernel) -> AttentionKernel:
        """Return ``kernel`` or something that wraps it."""
        return kernel


@hookspec
def ring_hookspecs() -> object | None:
    """A module or object with hook specifications of its own, for other plugins to implement."""


@hookspec(firstresult=True)
def ring_variant(name: str) -> Variant | None:
    """The variant that this plugin brings under the entry point's ``name``."""


@hookspec
def ring_presets() -> Mapping[str, Preset] | None:
    """Named sets of fields, by preset name."""


@hookspec
def ring_kernels(config: RingAttentionConfig) -> Sequence[AttentionKernel] | None:
    """The attention kernels that this plugin brings."""


@hookspec
def ring_communicators(config: RingAttentionConfig) -> Sequence[type[Communicator]] | None:
    """The communicator classes that this plugin brings."""


@hookspec
def ring_observers(config: RingAttentionConfig) -> Sequence[Observer] | None:
    """Observers of the attention that is being built."""


@hookspec
def ring_commands() -> Mapping[str, str] | None:
    """Commands of ``ring-attention``, by name, each as the name of a module with ``SUMMARY``,
    ``add_arguments(parser)`` and ``run(arguments)``, which returns the exit status."""
