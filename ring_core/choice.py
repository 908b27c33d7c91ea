"""Which kernel or communicator serves: the one named, or of those that do not refuse the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class _Candidate(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def priority(self) -> int: ...


T = TypeVar("T", bound=_Candidate)


@dataclass(frozen=True)
class Choice(Generic[T]):
    """What was taken and why the others were not.

    Attributes:
        taken: the candidate, or None if all refuse.
        refusals: each candidate's reason by name, best priority first; None: it could serve.
    """

    taken: T | None
    refusals: dict[str, str | None]

    @property
    def reasons(self) -> str:
        """Why the refusing candidates refuse, for messages."""
        return "; ".join(f"{name}: {why}" for name, why in self.refusals.items() if why)


def choose(
    candidates: Iterable[T], refusal: Callable[[T], str | None], named: str = "auto"
) -> Choice[T]:
    """The candidate of the highest priority that does not refuse, among those ``named`` allows."""
    allowed = [one for one in candidates if named in ("auto", one.name)]
    allowed.sort(key=lambda one: one.priority, reverse=True)
    refusals = {one.name: refusal(one) for one in allowed}
    taken = next((one for one in allowed if refusals[one.name] is None), None)
    return Choice(taken, refusals)
