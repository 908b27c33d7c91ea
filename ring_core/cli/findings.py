"""What a check of this machine found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        status: 'problem' keeps the library from working here; a 'warning' does not.
        remedy: what to do, in one line, for anything that is not ok.
    """

    topic: str
    status: Literal["ok", "warning", "problem"]
    text: str
    remedy: str = ""


def ok(topic: str, text: str) -> Finding:
    """As it should be."""
    return Finding(topic, "ok", text)


def warning(topic: str, text: str, remedy: str) -> Finding:
    """Works, but not as well as it could, or not as one might expect."""
    return Finding(topic, "warning", text, remedy)


def problem(topic: str, text: str, remedy: str) -> Finding:
    """Does not work."""
    return Finding(topic, "problem", text, remedy)
