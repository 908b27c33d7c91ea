"""A config's fields as rows of text, for the terminal and for the documentation."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from ring_core.config import common_fields


@dataclass(frozen=True)
class FieldRow:
    """One field.

    Attributes:
        default: as Python writes it; 'required' where it must be given.
        common: whether every variant has it.
    """

    name: str
    type: str
    default: str
    description: str
    common: bool


def field_rows(schema: type[BaseModel]) -> list[FieldRow]:
    """The fields of a schema, those of its own before the common ones; of those refused, why."""
    refused = getattr(schema, "refused", {})
    rows = [
        FieldRow(
            name,
            type_text(field.annotation),
            "required"
            if field.is_required()
            else repr(field.get_default(call_default_factory=True)),
            f"Refused: {refused[name]}"
            if name in refused
            else " ".join((field.description or "").split()),
            name in common_fields(),
        )
        for name, field in schema.model_fields.items()
    ]
    return sorted(rows, key=lambda row: row.common)


def kinds(values: Any) -> list[dict[str, Any]]:
    """Of a field's JSON schema what it may hold of several kinds: each with what it takes and what
    it is."""
    if isinstance(values, list):
        return [found for one in values for found in kinds(one)]
    if not isinstance(values, dict):
        return []
    fields = values.get("properties", {})
    if "const" not in fields.get("kind", {}):
        return kinds([values.get(name) for name in ("anyOf", "oneOf", "items")])
    takes = [name for name in fields if name != "kind"]
    about = " ".join(values.get("description", "").replace("``", "").split())
    return [{"kind": fields["kind"]["const"], "takes": takes, "description": about}]


def type_text(annotation: Any) -> str:
    """A type as a reader writes it, without the limits of its values."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(parts[0])
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(type_text, parts)))
    if origin is not None:
        return f"{type_text(origin)}[{', '.join(map(type_text, parts))}]"
    if annotation is Ellipsis:
        return "..."
    if annotation is type(None):
        return "None"
    return getattr(annotation, "__name__", str(annotation))
