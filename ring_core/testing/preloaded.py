"""What ranks have in common: imported once, by the process that a pool's ranks are forked from."""

from __future__ import annotations

import contextlib

import torch._dynamo  # noqa: F401 - or each rank does, at an optimizer's first step

from ring_core import registry

for name in registry.names():
    # One that cannot be made says so where it is asked for.
    with contextlib.suppress(Exception):
        registry.create(name)
