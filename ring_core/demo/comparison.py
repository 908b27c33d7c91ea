"""The same training twice, unsharded and sharded, and what the two have to do with each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist

from ring_core import registry
from ring_core.cli.ranks import launch
from ring_core.demo.document import Document
from ring_core.demo.model import LanguageModel, ModelSize
from ring_core.demo.training import Job, RankResult, train

TOLERANCE = 1e-4
"""How far the losses of a step may be apart. Sums in another order make some 1e-6."""

SIZE = ModelSize()
LEARNING_RATE = 4e-3
EPSILON = 1e-6
"""Of AdamW, which divides each gradient by its usual size: with torch's 1e-8, mere rounding in a
gradient that is all but zero, as that of a byte hardly ever seen, becomes a step like any other."""


@dataclass(frozen=True)
class Options:
    """What the user chose."""

    variant: str
    processes: int
    context: int
    steps: int
    seed: int


@dataclass(frozen=True)
class Run:
    """One training, on one process or several."""

    name: str
    device_type: str
    context: int
    ranks: tuple[RankResult, ...]

    @property
    def losses(self) -> list[float]:
        """Of the whole context at each step."""
        return self.ranks[0].losses

    @property
    def tokens_per_second(self) -> float:
        """Over all steps but the first, which also allocates."""
        seconds = self.ranks[0].seconds[1:]
        return self.context * len(seconds) / sum(seconds)


@dataclass(frozen=True)
class Comparison:
    """Both runs, and what they were run on.

    Attributes:
        variant: by its own name, also where 'auto' was asked for.
        context: tokens of a step; less than asked for where the document is shorter.
    """

    document: Document
    options: Options
    variant: str
    context: int
    parameters: int
    unsharded: Run
    sharded: Run

    @cached_property
    def differences(self) -> list[float]:
        """How far the losses of each step are apart."""
        pairs = zip(self.unsharded.losses, self.sharded.losses, strict=True)
        return [abs(one - other) for one, other in pairs]

    @property
    def largest_difference(self) -> float:
        """Of all steps; NaN if a loss is."""
        return math.nan if any(map(math.isnan, self.differences)) else max(self.differences)

    @property
    def first_apart(self) -> int | None:
        """The first step, from 1, whose losses are not within the tolerance; None if all are."""
        for step, difference in enumerate(self.differences, start=1):
            if not difference <= TOLERANCE:  # so that NaN is apart
                return step
        return None


def context_for(document: Document, asked: int) -> int:
    """The context to train with: what was asked for, or what the document has."""
    return min(asked, document.longest_context())


def device_type_for(processes: int) -> str:
    """'cuda' where every process gets a GPU of its own, else 'cpu'."""
    enough = torch.cuda.device_count() >= processes
    return "cuda" if enough and dist.is_nccl_available() else "cpu"


def compare(document: Document, options: Options, announce: Callable[[str], None]) -> Comparison:
    """Train unsharded and sharded, each in processes of its own.

    Args:
        announce: told, once that is known, what is about to run.

    Raises:
        RingError: the variant does not exist, refuses causal text, or failed on a rank.
    """
    context = context_for(document, options.context)
    # Here first, where an error is one line and costs nothing.
    attention = registry.create(options.variant, causal=True)
    attention.plan(context)
    variant = attention.config.variant
    parameters = sum(p.numel() for p in LanguageModel(SIZE).parameters())
    device_type = device_type_for(options.processes)
    job = Job(
        variant=variant,
        windows=document.windows(context, options.steps, options.seed),
        seed=options.seed,
        size=SIZE,
        learning_rate=LEARNING_RATE,
        epsilon=EPSILON,
    )
    backend = {"cpu": "gloo on the CPU", "cuda": "NCCL on GPUs"}[device_type]
    announce(
        f"{document.name}: {len(document.data):,} bytes. A context of {context:,} on "
        f"{options.processes} processes, {backend}; variant {variant}; {parameters:,} parameters."
    )

    def run(name: str, processes: int) -> Run:
        title = f"{name} ({processes} process{'es' if processes > 1 else ''})"
        ranks = launch(train, job, title, processes=processes, device_type=device_type)
        return Run(name, device_type, context, tuple(ranks))

    return Comparison(
        document=document,
        options=options,
        variant=variant,
        context=context,
        parameters=parameters,
        unsharded=run("unsharded", 1),
        sharded=run("sharded", options.processes),
    )
