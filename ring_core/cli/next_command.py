"""What to run after an error, by its kind."""

from __future__ import annotations

import argparse

from ring_core.errors import (
    CommunicatorError,
    ConfigError,
    DemoError,
    DocumentError,
    InputError,
    KernelError,
    PluginError,
    RingError,
    UnknownPresetError,
    UnknownVariantError,
)


def next_command(error: RingError, arguments: argparse.Namespace) -> str | None:
    """A command that shows more of what went wrong; None where the error names one itself."""
    if any(named in str(error) for named in ("ring-attention ", "pip install ")):
        return None
    if isinstance(error, (UnknownVariantError, UnknownPresetError, PluginError)):
        return "ring-attention list"
    if isinstance(error, (KernelError, CommunicatorError)):
        return "ring-attention doctor"
    if isinstance(error, ConfigError):
        variant = getattr(arguments, "variant", None)
        return f"ring-attention show {variant}" if variant else "ring-attention list"
    if isinstance(error, (InputError, DocumentError, DemoError)):
        return f"ring-attention {arguments.command} --help"
    return f"ring-attention {arguments.command} --verbose, with the same options"
