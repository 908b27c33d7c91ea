"""The hooks of this plugin."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ring_core import Observer, hookimpl

RING_HOOK_API = 1

VARIABLE = "RING_TRACE"


@hookimpl
def ring_observers() -> Sequence[Observer] | None:
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    from ring_attention_tracing.observer import Tracing

    return [Tracing(path)]
