"""The text that the demo trains on: bytes, and windows into them."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from ring_core.errors import DocumentError

SHORTEST = 64
"""Bytes under which there is nothing to learn."""


@dataclass(frozen=True)
class Document:
    """A document by name."""

    name: str
    data: bytes

    @property
    def sha256(self) -> str:
        """Digest of the bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    def longest_context(self) -> int:
        """Tokens of the longest window: each needs the byte after it as its label."""
        return len(self.data) - 1

    def windows(self, context: int, count: int, seed: int) -> tuple[bytes, ...]:
        """``count`` runs of ``context + 1`` bytes, from places that ``seed`` draws."""
        places = random.Random(seed)
        starts = [places.randint(0, len(self.data) - context - 1) for _ in range(count)]
        return tuple(self.data[start : start + context + 1] for start in starts)


def load(path: Path | None) -> Document:
    """The file at ``path``, whatever it holds; without one the help text that comes with Python.

    Raises:
        DocumentError: the file cannot be read, or has fewer than 64 bytes.
    """
    if path is None:
        return python_help()
    try:
        document = Document(path.name, path.read_bytes())
    except OSError as error:
        raise DocumentError(f"cannot read --input {path}: {error.strerror}") from error
    if len(document.data) < SHORTEST:
        raise DocumentError(
            f"{path} has {len(document.data)} bytes; the demo needs at least {SHORTEST}, and some "
            "ten thousand to learn anything"
        )
    return document


def python_help() -> Document:
    """Python's help on its own language: every topic of ``help()``, in sorted order."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return Document("Python's language help (pydoc_data.topics)", text.encode())
