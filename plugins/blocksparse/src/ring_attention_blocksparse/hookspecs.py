"""What other plugins may add to this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ring_core import hookspec

if TYPE_CHECKING:
    from ring_attention_blocksparse.patterns import Pattern


@hookspec
def blocksparse_patterns() -> Sequence[type[Pattern]] | None:
    """Kinds of pattern that this plugin brings. Importing their module must not import torch."""
