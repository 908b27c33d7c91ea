"""The conformance kit's fixtures, and short hypothesis runs that repeat."""

from hypothesis import settings

from ring_core.testing.fixtures import *  # noqa: F403

settings.register_profile("ring", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("ring")
