"""The conformance kit: what a variant's own tests subclass, and the processes they run in.

In ``conftest.py``::

    from ring_core.testing.fixtures import *  # noqa: F403

In a test module::

    from ring_core.testing import Conformance

    class TestMine(Conformance):
        variant = "mine"
"""

from __future__ import annotations

from ring_core.testing.case import Case, Result, expected_of, visible_of
from ring_core.testing.conformance import Conformance
from ring_core.testing.pairs import check_pairs, times_computed
from ring_core.testing.pool import RankError, RankPool, Worker

__all__ = [
    "Case",
    "Conformance",
    "RankError",
    "RankPool",
    "Result",
    "Worker",
    "check_pairs",
    "expected_of",
    "times_computed",
    "visible_of",
]
