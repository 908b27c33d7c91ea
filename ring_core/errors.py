"""Every error that this library raises on purpose, under one base class.

A message says what was wrong, with the names and shapes in it, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RingError(Exception):
    """Base of every error raised on purpose by the core or a plugin."""


class ConfigError(RingError, ValueError):
    """A config field is unknown, out of range, or meaningless beside another one."""


class InputError(RingError, ValueError):
    """A tensor, length or plan given to a call does not fit the attention or its plan."""


class PlanError(RingError):
    """A variant's planner named rows that its ranks do not hold: a defect of the variant."""


class UnknownVariantError(RingError, LookupError):
    """No installed, enabled plugin brings a variant of that name."""


class UnknownPresetError(RingError, LookupError):
    """No installed, enabled plugin brings a preset of that name."""


class PluginError(RingError):
    """A plugin cannot be used; the others can."""


class PluginLoadError(PluginError):
    """A plugin failed to import or to register."""


class HookApiError(PluginError):
    """A plugin was built for another version of the hook API."""


class DuplicateNameError(PluginError):
    """Two plugins claim one name, so neither is taken."""


class KernelError(RingError):
    """No kernel can compute what was asked, or the one asked for by name cannot."""


class CommunicatorError(RingError):
    """No communicator serves the group, or the one asked for by name does not."""


class DifferentiationError(RingError, RuntimeError):
    """A gradient of a gradient was asked for; attention here is differentiable once."""


class DisagreementError(RingError):
    """The ranks of a group called with different configs, plans or shapes, or one is missing.

    The message is the same on every rank.
    """


class RingTimeoutError(RingError, TimeoutError):
    """A peer did not deliver within ``timeout`` seconds; the group cannot be used any more."""


class RankFailedError(RingError):
    """A rank raised, died or hung; the message names it. Its own traceback is the cause."""


class NonFiniteError(RingError, ArithmeticError):
    """A call gave infinite numbers or NaN where they were to be checked; names ranks and places."""


class CheckpointError(RingError):
    """A checkpoint cannot be written, or a job cannot go on from it."""


class DemoError(RingError):
    """The demo cannot run here, or cannot write its report."""


class DocumentError(RingError, ValueError):
    """A document cannot be read or is too short."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the option closest to ``name``, or an empty string."""
    close = closest(name, options)
    return f" Did you mean {close!r}?" if close else ""


def closest(name: str, options: Iterable[str]) -> str | None:
    """The option most like ``name``, or None if none is like it."""
    return next(iter(difflib.get_close_matches(name, list(options), n=1)), None)
