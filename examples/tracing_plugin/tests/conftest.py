"""The conformance kit's fixtures: a pool of processes for the whole test run."""

from ring_core.testing.fixtures import *  # noqa: F403
