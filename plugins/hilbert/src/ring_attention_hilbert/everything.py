"""Dense attention in an order: all blocks, some of which a mask that speaks of tokens cuts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from ring_attention_blocksparse.pairs import visible_block, visible_count
from ring_attention_blocksparse.patterns import Pattern
from ring_attention_blocksparse.scene import Reach, ragged

if TYPE_CHECKING:
    from ring_attention_blocksparse.scene import Blocks, Scene


class Everything(Pattern):
    """All that the mask lets through. No kind that a config can name: it has no patterns then."""

    kind: str = "everything"

    def reach(self, scene: Scene, q: Blocks, head: int) -> Reach:
        query, place = ragged(visible_count(scene, q))
        sure = torch.ones_like(query, dtype=torch.bool)
        return Reach(query, visible_block(scene, q, query, place), sure, sure)
