"""Process groups: what the caller gave, as a group, and this process's rank in it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ring_core.errors import InputError


def resolve(group: Any) -> Any | None:
    """The ProcessGroup behind ``group``: itself, a 1-D DeviceMesh's, or for None the default one.

    None where torch.distributed is not up and no group was given: one process.

    Raises:
        InputError: the mesh is not 1-D, or this process is not in the group.
    """
    if group is None:
        return distributed_c10d._get_default_group() if dist.is_initialized() else None
    if hasattr(group, "mesh") and hasattr(group, "get_group"):
        if group.ndim != 1:
            raise InputError(
                f"group is a {group.ndim}-D DeviceMesh {tuple(group.shape)}; "
                "name one dimension of it, as in mesh['cp']"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise InputError(
            f"group is {group!r}; it must be a ProcessGroup that this process belongs to, a 1-D "
            "DeviceMesh, or None for the default group"
        )
    return group


def rank_and_world(group: Any | None) -> tuple[int, int]:
    """This process's rank in the group and the number of ranks; (0, 1) without a group."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def ranks_of(group: Any) -> list[int]:
    """Global ranks of the group's members; of all without one."""
    resolved = resolve(group)
    return [0] if resolved is None else dist.get_process_group_ranks(resolved)


def by_name(name: str) -> Any:
    """The group of that name in this process; used when a pickled attention comes back.

    Raises:
        InputError: there is no such group here.
    """
    try:
        return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type,unused-ignore]
    except (RuntimeError, KeyError) as error:
        raise InputError(
            f"this attention was pickled with process group {name!r}, which does not exist in this "
            "process; create the group first, or build the attention with group=None"
        ) from error
