"""Checkpoints of a training job, written while it goes on, from which any number of ranks go on."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.stateful import Stateful

from ring_core.errors import CheckpointError

T = TypeVar("T")

logger = logging.getLogger("ring_attention_distributed")

_STEP = re.compile(r"step-(\d+)")
_LAST = ".metadata"  # torch writes it last, once all ranks' files are there, and renames it


class Checkpoints:
    """The last checkpoints of a model and its optimiser in a folder that all ranks see.

    They are written by torch.distributed.checkpoint in the background: :meth:`save` returns once
    the state is copied. One counts when all of it is on disk; what a killed job left unfinished is
    removed by the next. Sharded parameters (FSDP2) are put together anew for any number of ranks.
    All ranks of the default process group make one, and call its methods alike.

    Args:
        folder: made if need be. model, optimizer: what is saved.
        also: further objects with ``state_dict`` and ``load_state_dict``, such as a schedule or a
            data loader.
        keep: so many complete checkpoints stay.
        timeout: seconds that ranks wait for each other while they write or read.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        optimizer: Any,
        also: Mapping[str, Stateful] | None = None,
        *,
        keep: int = 2,
        timeout: float = 600.0,
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"keep={keep}: at least one checkpoint has to stay")
        if "training" in (also or {}):
            raise CheckpointError("also: 'training' names the model and its optimiser")
        self._folder, self._keep = Path(folder), keep
        self._state: dict[str, Any] = {**(also or {}), "training": _Training(model, optimizer)}
        # A group of their own: the thread that writes talks while the model's layers do.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._writing: Future[Any] | None = None
        self._at_first(self._prepare)

    def load(self) -> int:
        """Take over the newest complete checkpoint.

        Returns:
            The number that it was saved under; 0 where there is none.

        Raises:
            CheckpointError: it cannot be read.
        """
        step = self._at_first(lambda: max(self._whole(), default=0))
        if step:
            with _told(f"cannot go on from {self._path(step)}, as this model and optimiser"):
                load(self._state, checkpoint_id=self._path(step), process_group=self._group)
            logger.info("going on from %s", self._path(step))
        return step

    def save(self, step: int) -> None:
        """Begin to write the state after ``step`` steps; first waits for the one before.

        Raises:
            CheckpointError: the one before, or this one, cannot be written; or there is one of this
                step.
        """
        if step < 1:
            raise CheckpointError(f"step={step}: a checkpoint is of the state after 1 step or more")
        self.finish()
        if self._at_first(self._path(step).exists):
            raise CheckpointError(
                f"{self._path(step)} is there already: go on from it with load(), or give another "
                "folder"
            )
        with _told(f"cannot save {self._path(step)}"):
            writing = async_save(
                self._state, checkpoint_id=self._path(step), process_group=self._group
            )
        assert isinstance(writing, Future)
        self._writing = writing

    def finish(self) -> None:
        """Wait until what was begun is written, and remove the oldest beyond ``keep``.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        with _told(f"cannot save into {self._folder}"):
            writing.result()
        self._at_first(self._remove_old)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def _found(self) -> dict[int, Path]:
        """Checkpoints in the folder by step, finished or not."""
        names = {path: _STEP.fullmatch(path.name) for path in self._folder.iterdir()}
        return {int(name[1]): path for path, name in names.items() if name}

    def _whole(self) -> dict[int, Path]:
        return {step: path for step, path in self._found().items() if (path / _LAST).exists()}

    def _prepare(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._found().values():
            if not (path / _LAST).exists():
                logger.info("removing %s: the job that wrote it was ended", path)
                _remove(path)

    def _remove_old(self) -> None:
        whole = self._whole()
        for step in sorted(whole)[: -self._keep]:
            _remove(whole[step])

    def _at_first(self, do: Callable[[], T]) -> T:
        """What rank 0, which alone looks into the folder, came to; its error on every rank."""
        came: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                came[0] = do()
            except OSError as error:
                came[1] = f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(came, src=0, group=self._group)
        if came[1] is not None:
            raise CheckpointError(f"rank 0 cannot use {self._folder}: {came[1]}")
        result: T = came[0]
        return result


class _Training(Stateful):
    """A model and its optimiser under names that do not depend on how they are sharded."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self._model, self._optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def _remove(path: Path) -> None:
    """First what makes it count: a job may be ended in the middle."""
    (path / _LAST).unlink(missing_ok=True)
    shutil.rmtree(path)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """torch's error of some ranks as one of this library's, on all."""
    try:
        yield
    except CheckpointException as error:
        each = "; ".join(
            f"rank {rank}: {type(why[0]).__name__}: {why[0]}"
            for rank, why in error.failures.items()
        )
        raise CheckpointError(f"{what}: {each}") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{what}: {error}") from error
