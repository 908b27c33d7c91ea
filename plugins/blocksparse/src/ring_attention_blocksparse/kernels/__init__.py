"""Kernels that compute the blocks of a table."""

from __future__ import annotations

from ring_attention_blocksparse.kernels.cpu_blocks import CpuBlocks
from ring_attention_blocksparse.kernels.flash4_blocks import Flash4Blocks
from ring_attention_blocksparse.kernels.triton_blocks import TritonBlocks
from ring_core.protocols import AttentionKernel

KERNELS: tuple[AttentionKernel, ...] = (Flash4Blocks(), TritonBlocks(), CpuBlocks())
