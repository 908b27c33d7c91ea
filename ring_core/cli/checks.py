"""The checks of ``ring-attention doctor``, in the order in which one thing needs another."""

from __future__ import annotations

import logging
import platform
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from importlib_metadata import requires
from packaging.requirements import Requirement
from packaging.version import Version

from ring_core.choice import choose
from ring_core.cli.findings import Finding, ok, problem, warning
from ring_core.config import RingAttentionConfig
from ring_core.discovery import VARIANTS, PluginRow, misspelled
from ring_core.errors import RingError
from ring_core.registry import registry

if TYPE_CHECKING:
    import torch

    from ring_core.cli.smoke import SmokeResult

logger = logging.getLogger("ring_core")

_HEAD_DIM = 128
_DTYPES = {
    "cpu": ("float32", "bfloat16", "float64"),
    "cuda": ("bfloat16", "float16", "float32"),
}
_SLOW_KERNEL = "reference"


def check_all() -> Iterator[Finding]:
    """Every finding, each as soon as it is known. Stops early where there is no torch."""
    yield _python()
    try:
        import torch
    except Exception as error:
        text = f"cannot be imported: {type(error).__name__}: {error}"
        yield problem("torch", text, "pip install torch")
        return
    yield _torch(torch.__version__)
    yield from _gpus()
    yield from _distributed()
    kernels = list(_kernels())
    yield from _plugins()  # after the kernels: asking for them can show that a plugin is broken
    yield from kernels
    yield from _smoke_runs()


def _python() -> Finding:
    build = f"{platform.python_version()} ({platform.python_implementation()}, {sys.platform})"
    return ok("python", build)


def _torch(installed: str) -> Finding:
    import torch

    build = "CPU only"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    wanted = next(
        need
        for need in map(Requirement, requires("ring-attention-core") or ())
        if need.name == "torch"
    )
    text = f"{installed}, build: {build}"
    if not wanted.specifier.contains(Version(installed), prereleases=True):
        return problem("torch", f"{text}; needed is {wanted}", f"pip install '{wanted}'")
    return ok("torch", text)


def _gpus() -> Iterator[Finding]:
    import torch

    count = torch.cuda.device_count()
    if not count:
        if torch.version.cuda or torch.version.hip:
            yield warning(
                "GPUs",
                "this torch is built for GPUs and sees none",
                "look at nvidia-smi and CUDA_VISIBLE_DEVICES; without a GPU here all is well",
            )
        elif shutil.which("nvidia-smi"):
            yield warning(
                "GPUs",
                "an NVIDIA driver is here, and this torch is built for CPUs only",
                "install a CUDA build of torch: https://pytorch.org/get-started/locally/",
            )
        else:
            yield ok("GPUs", "none; attention runs on the CPU")
        return
    for index in range(count):
        about = torch.cuda.get_device_properties(index)
        memory = about.total_memory / 2**30
        yield ok(
            f"GPU {index}", f"{about.name}, {memory:.0f} GiB, compute {about.major}.{about.minor}"
        )
    if count > 1:
        yield _peers(count)


def _peers(count: int) -> Finding:
    import torch

    apart = [
        f"{a}-{b}"
        for a in range(count)
        for b in range(count)
        if a != b and not torch.cuda.can_device_access_peer(a, b)
    ]
    if apart:
        return warning(
            "GPU links",
            f"no direct access between {', '.join(apart)}: transfers go through the host's memory",
            "results are the same and transfers slower; nvidia-smi topo -m shows the links",
        )
    return ok("GPU links", f"all {count} GPUs reach each other directly")


def _distributed() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    topic = "torch.distributed"
    if not dist.is_available():
        yield problem(topic, "not in this build of torch", "install a build with torch.distributed")
        return
    backends = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    text = ", ".join(f"{name}: {'yes' if here else 'no'}" for name, here in backends.items())
    if not backends["gloo"]:
        yield problem(topic, text, "install a build of torch with gloo; CPU ranks talk through it")
    elif torch.cuda.device_count() > 1 and not backends["nccl"]:
        yield problem(topic, text, "install a build of torch with NCCL; GPU ranks talk through it")
    else:
        yield ok(topic, text)


def _plugins() -> Iterator[Finding]:
    rows = registry.plugins()
    if not any(row.group == VARIANTS for row in rows):
        yield problem("plugins", "no variant is installed", "pip install ring-attention-standard")
    for row in rows:
        yield _plugin(row)
    for row, meant in misspelled():
        yield warning(
            f"entry point {row.name}",
            f"{row.distribution} {row.version}: group {row.group!r} is not {meant!r}, so nothing "
            "looks for it there",
            f'write [project.entry-points."{meant}"] in its pyproject.toml, and install it again',
        )


def _plugin(row: PluginRow) -> Finding:
    topic = f"plugin {row.name}"
    text = f"{row.distribution} {row.version}: {row.status}"
    if row.status == "loaded":
        return ok(topic, text)
    text = f"{text}: {row.error}"
    if row.status == "disabled":
        return warning(topic, text, "unset the variable, or change it, to have the plugin back")
    return problem(
        topic,
        text,
        {
            "conflict": "pip uninstall one of the distributions named above",
            "outdated": f"pip install --upgrade ring-attention-core {row.distribution}",
        }.get(
            row.status,
            f"pip install --force-reinstall {row.distribution}, or leave it out with "
            f"RING_DISABLE_PLUGINS={row.name}",
        ),
    )


def _kernels() -> Iterator[Finding]:
    """Which kernel ``auto`` takes for causal attention, on each kind of device that is here."""
    import torch

    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for kind in kinds:
        for dtype in _DTYPES[kind]:
            yield _kernel(torch.device(kind), dtype)


def _kernel(device: torch.device, dtype: str) -> Finding:
    import torch

    from ring_core.masks import Band
    from ring_core.protocols import Problem

    asked = Problem(
        device, getattr(torch, dtype), _HEAD_DIM, _HEAD_DIM, frozenset({Band}), False, False
    )
    choice = choose(registry.kernels(RingAttentionConfig()), lambda one: one.refuse(asked))
    topic = f"kernel, {dtype} on {device.type}"
    if choice.taken is None:
        return problem(
            topic, choice.reasons or "none installed", "pip install ring-attention-standard"
        )
    taken = choice.taken.name
    text = _choice(taken, choice.refusals)
    if taken == _SLOW_KERNEL and dtype in ("bfloat16", "float16"):
        return warning(topic, text, "works, slowly: the reasons say what the fast kernels miss")
    return ok(topic, text)


def _choice(taken: str, refusals: dict[str, str | None]) -> str:
    others = [
        f"{name}: {why or 'can too, ranks lower'}"
        for name, why in refusals.items()
        if name != taken
    ]
    return f"{taken} ({'; '.join(others)})" if others else taken


def _smoke_runs() -> Iterator[Finding]:
    """Two processes attend together: over gloo, and over NCCL where there are two GPUs."""
    import torch
    import torch.distributed as dist

    yield from _smoke("cpu", "gloo", "float64", 1e-10)
    if torch.cuda.device_count() > 1 and dist.is_nccl_available():
        yield from _smoke("cuda", "NCCL", "bfloat16", 2e-2)


def _smoke(device_type: str, backend: str, dtype: str, allowed: float) -> Iterator[Finding]:
    from ring_core.cli.smoke import LENGTH, smoke
    from ring_core.launching import launch

    topic = f"2 processes over {backend}"
    try:
        results: list[SmokeResult] = launch(smoke, dtype, processes=2, device_type=device_type)
    except RingError as error:
        logger.info("the run on 2 processes over %s failed", backend, exc_info=True)
        yield problem(
            topic, str(error), "mend the problems above first; --verbose shows the traceback"
        )
        return
    result = results[0]
    taken = next(name for name, refusal in result.communicators.items() if refusal is None)
    yield ok(f"communicator, {device_type} over {backend}", _choice(taken, result.communicators))
    worst = max(result.errors, key=lambda name: result.errors[name])
    text = (
        f"causal attention over {LENGTH} tokens in {dtype}, output and gradients: relative error "
        f"at most {result.errors[worst]:.1e} ({worst}), allowed {allowed:.0e}"
    )
    if not result.errors[worst] <= allowed:  # so that NaN fails
        yield problem(topic, text, "results are wrong here; please report this output")
    else:
        yield ok(topic, text)
