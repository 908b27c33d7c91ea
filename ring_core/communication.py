"""What every communicator needs beside its transport: buffers, deadlines, counters, retry."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ring_core.attempts import WAIT, Attempts
from ring_core.errors import InputError, RingTimeoutError
from ring_core.groups import rank_and_world

if TYPE_CHECKING:
    from ring_core.protocols import Selection

T = TypeVar("T")

_Key = tuple[torch.device, torch.dtype, int, bool]


@dataclass(frozen=True)
class Moved:
    """Bytes that had been moved at some moment."""

    sent: int
    received: int
    late: Tensor | None

    def bytes(self) -> tuple[int, int]:
        """Sent and received. Where tensors chose what moves, a GPU must have come to that moment;
        this does not wait for it."""
        late = (0, 0) if self.late is None else self.late.tolist()
        return self.sent + late[0], self.received + late[1]


class Counters:
    """What a communicator did since it was made or :meth:`reset`.

    Attributes:
        transfers: that were started. wait_seconds: that this process waited for them.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again from zero."""
        self.transfers, self.wait_seconds = 0, 0.0
        self._sent = self._received = 0
        self._late: Tensor | None = None
        self._total: Tensor | None = None

    @property
    def bytes_sent(self) -> int:
        """Where tensors chose what moves, this waits for their GPU, as :attr:`bytes_received`."""
        return self._settled()[0]

    @property
    def bytes_received(self) -> int:
        return self._settled()[1]

    def moved(self) -> Moved:
        """What had been moved by now; does not wait."""
        return Moved(self._sent, self._received, self._late)

    def add(self, sent: int, received: int) -> None:
        """Count a transfer of so many bytes."""
        self.transfers += 1
        self._sent += sent
        self._received += received

    def add_late(self, moved: Tensor) -> None:
        """Count a transfer of so many bytes, int64 (sent, received), which a GPU may still have to
        find out. Calls of one attention come on one stream."""
        self.transfers += 1
        self._total = moved if self._total is None else self._total + moved
        self._late = self._total
        if moved.is_cuda:
            self._late = torch.empty(2, dtype=torch.int64, pin_memory=True)
            self._late.copy_(self._total, non_blocking=True)

    def _settled(self) -> tuple[int, int]:
        if self._total is not None and self._total.is_cuda:
            torch.cuda.synchronize(self._total.device)
        return self.moved().bytes()


class BufferPool:
    """Flat buffers that calls of all layers of a group take turns with.

    A buffer on a GPU goes only to users of the stream that it was last used on.
    """

    def __init__(self) -> None:
        self._free: dict[_Key, list[Tensor]] = {}

    def take(self, numel: int, like: Tensor) -> Tensor:
        """A flat uninitialised tensor of ``numel`` elements, dtype and device as ``like``'s."""
        free = self._free.setdefault(
            _key(like.device, like.dtype, torch.is_inference_mode_enabled()), []
        )
        large_enough = [i for i, buffer in enumerate(free) if buffer.numel() >= numel]
        if large_enough:
            best = min(large_enough, key=lambda i: free[i].numel())
            return free.pop(best)[:numel]
        # Too small for this request, they would pile up beside those that fit.
        free.clear()
        return torch.empty(numel, dtype=like.dtype, device=like.device)

    def give(self, buffer: Tensor) -> None:
        """Return a buffer that :meth:`take` handed out."""
        whole = buffer if buffer._base is None else buffer._base
        key = _key(whole.device, whole.dtype, whole.is_inference())
        self._free.setdefault(key, []).append(whole)


def _key(device: torch.device, dtype: torch.dtype, inference: bool) -> _Key:
    # Tensors made under inference_mode cannot be written outside of it.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return device, dtype, stream, inference


_pools: WeakKeyDictionary[Any, BufferPool] = WeakKeyDictionary()


class RingCommunicationMixin:
    """Paired buffers, deadlines, counters and agreed retry for a communicator; it brings the
    transport.

    Attributes:
        group: the process group. rank, world: this process's place in it.
        timeout: seconds that a wait may take.
        counters: bytes, transfers and waiting time so far.
        buffers: the group's pool, shared by all its communicators.
    """

    selects: ClassVar[bool] = False

    def __init__(self, group: Any, timeout: float) -> None:
        self.group = group
        self.rank, self.world = rank_and_world(group)
        self.timeout = timeout
        self.counters = Counters()
        self.buffers = _pools.setdefault(group, BufferPool())

    def among(self, selection: Selection) -> Self:
        """This one: it moves all rows. A class that ``selects`` overrides this."""
        return self

    def pair(self, numels: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
        """One buffer per tensor of a transfer: keys and values never share memory."""
        return [
            self.buffers.take(numel, tensor) for numel, tensor in zip(numels, like, strict=True)
        ]

    def start(self, ops: Sequence[dist.P2POp], operation: Callable[[], str]) -> list[Any]:
        """Start sends and receives; :meth:`wait_for` waits for what this returns.

        Raises:
            RingTimeoutError: one failed at once; names this rank and ``operation``.
        """
        try:
            return dist.batch_isend_irecv(list(ops)) if ops else []
        except RuntimeError as error:
            raise RingTimeoutError(
                f"rank {self.rank} of {self.world}: {operation()} failed to start: {error}"
            ) from error

    def wait_for(self, works: Sequence[Any], operation: Callable[[], str]) -> None:
        """Wait for ``works`` until the deadline, and count the time.

        Raises:
            RingTimeoutError: a work failed or is late; names this rank and ``operation``.
        """
        started = time.perf_counter()
        deadline = started + self.timeout
        try:
            for work in works:
                work.wait(timedelta(seconds=max(0.001, deadline - time.perf_counter())))
        except RuntimeError as error:
            waited = time.perf_counter() - started
            late = waited >= self.timeout * 0.99
            reason = f"not done after timeout={self.timeout:g} s" if late else f"failed: {error}"
            raise RingTimeoutError(
                f"rank {self.rank} of {self.world}: {operation()} {reason}. The process group "
                "cannot be used any more; look at the named peer's log first."
            ) from error
        finally:
            self.counters.wait_seconds += time.perf_counter() - started

    def retried(
        self, operation: str, attempt: Callable[[Self], T], *, retries: int, backoff: float = 0.5
    ) -> T:
        """What ``attempt`` returns on this rank, when it has ended well on all ranks of the group.

        When it ended, well or not, the ranks meet. Where transfers failed on some of them, all try
        again from the start on a fresh process group; the caller's own survives. All ranks call
        this alike and in the same order. One rank alone just runs ``attempt``.

        Args:
            operation: for messages; alike on all ranks.
            attempt: is given a communicator like this one, over a process group of the library's
                own, which counts into this one's counters. It has ``timeout`` seconds, of which a
                wait may take three quarters: the rest is for the ranks to meet. It leaves what it
                starts from unchanged; its transfers fail as those of :meth:`start` and
                :meth:`wait_for` do.
            retries: attempts after the first.
            backoff: seconds before the second attempt, then twice as long each time.

        Raises:
            InputError: ``retries`` or ``backoff`` is negative.
            RingTimeoutError: transfers failed (RingTimeoutError, CommunicatorError) in the last
                attempt too; says what each rank met, the same on all.
            RankFailedError: names the ranks that raised anything else, that did not come in time,
                or that are at another operation; or the store of the group is gone.
            CommunicatorError: the group has no store, through which ranks meet.
            Exception: any other, as ``attempt`` raised it on this rank.
        """
        if retries < 0 or backoff < 0:
            raise InputError(f"retries={retries}, backoff={backoff:g}: neither may be negative")
        if self.world == 1:
            return attempt(self)

        def over(group: Any) -> T:
            communicator = self.over(group, WAIT * self.timeout)
            communicator.counters = self.counters
            return attempt(communicator)

        # A GPU's transfers have come when its stream has come to their end.
        gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        return Attempts[T](
            self.group,
            operation,
            device=device,
            timeout=self.timeout,
            retries=retries,
            backoff=backoff,
        ).run(over)

    def over(self, group: Any, timeout: float) -> Self:
        """A communicator like this one over another process group, for :meth:`retried`; a class
        that is made by more than a group and a timeout overrides it."""
        return type(self)(group, timeout)
