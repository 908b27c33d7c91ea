"""The same training twice, unsharded and sharded, and what the two have to do with each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from ring_core import registry
from ring_core.demo.document import Document
from ring_core.demo.model import LanguageModel, ModelSize
from ring_core.demo.training import Job, RankResult, train
from ring_core.launching import launch

TOLERANCE = 1e-4
"""How far the losses of a step may be apart. Sums in another order make some 1e-6."""

SIZE = ModelSize()
LEARNING_RATE = 4e-3
EPSILON = 1e-6
"""Of AdamW, which divides each gradient by its usual size: with torch's 1e-8, mere rounding in a
gradient that is all but zero, as that of a byte hardly ever seen, becomes a step like any other."""


@dataclass(frozen=True)
class Options:
    """What the user chose; ``fields`` are the config's, beside the variant and ``causal``."""

    variant: str
    processes: int
    context: int
    steps: int
    seed: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    def named(self, variant: str) -> str:
        """The variant with its fields, as text."""
        return ", ".join([variant, *(f"{name}={value}" for name, value in self.fields.items())])


@dataclass(frozen=True)
class Run:
    """One training, on one process or several."""

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


@dataclass(frozen=True)
class Prepared:
    """A comparison that can be run: the variant exists and plans this context."""

    document: Document
    options: Options
    job: Job
    parameters: int
    device_type: str

    def __str__(self) -> str:
        backend = {"cpu": "gloo on the CPU", "cuda": "NCCL on GPUs"}[self.device_type]
        return (
            f"{self.document.name}: {len(self.document.data):,} bytes. A context of "
            f"{self.job.context:,} on {self.options.processes} processes, {backend}; variant "
            f"{self.options.named(self.job.variant)}; {self.parameters:,} parameters."
        )

    def run(self) -> Comparison:
        """Train unsharded and sharded, each in processes of its own.

        Raises:
            RankFailedError: a rank raised or died; says which, and the error's own text.
        """
        return Comparison(
            document=self.document,
            options=self.options,
            variant=self.job.variant,
            context=self.job.context,
            parameters=self.parameters,
            unsharded=self._train("unsharded", 1),
            sharded=self._train("sharded", self.options.processes),
        )

    def _train(self, name: str, processes: int) -> Run:
        title = f"{name} ({processes} process{'es' if processes > 1 else ''})"
        ranks = launch(train, self.job, title, processes=processes, device_type=self.device_type)
        return Run(self.device_type, self.job.context, tuple(ranks))


def prepare(document: Document, options: Options) -> Prepared:
    """Choose context and device, and find out here what would otherwise fail on every rank.

    The context is cut to what the document has. 'cuda' is taken where every process gets a GPU.

    Raises:
        RingError: the variant does not exist, or refuses causal attention or this context.
    """
    context = min(options.context, document.longest_context())
    attention = registry.create(options.variant, causal=True, **options.fields)
    attention.plan(context)
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    return Prepared(
        document=document,
        options=options,
        job=Job(
            variant=attention.config.variant,
            fields=options.fields,
            windows=document.windows(context, options.steps, options.seed),
            seed=options.seed,
            size=SIZE,
            learning_rate=LEARNING_RATE,
            epsilon=EPSILON,
        ),
        parameters=sum(p.numel() for p in LanguageModel(SIZE).parameters()),
        device_type="cuda" if gpus >= options.processes else "cpu",
    )
