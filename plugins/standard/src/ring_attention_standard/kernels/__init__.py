"""The attention kernels of this plugin, each behind the same interface."""

from __future__ import annotations

from ring_attention_standard.kernels.cpu_flash import CpuFlash
from ring_attention_standard.kernels.cuda_flash import CudaFlash
from ring_attention_standard.kernels.cudnn import Cudnn
from ring_attention_standard.kernels.eager import Eager
from ring_attention_standard.kernels.flash4 import Flash4
from ring_core.protocols import AttentionKernel

KERNELS: tuple[AttentionKernel, ...] = (Flash4(), Cudnn(), CudaFlash(), CpuFlash(), Eager())
