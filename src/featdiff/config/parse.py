"""Errors of pydantic in one line."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError

from featdiff.config.reading import ConfigError, closest, legible
from featdiff.config.values import Params

P = TypeVar("P", bound=Params)


def _is_class(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _walk(annotation: Any, location: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """The keys of ``location`` as they stand in the file (pydantic puts members of unions among them), and the
    names allowed where the last of them stands (none where any name is)."""
    keys: list[str] = []
    allowed: list[str] = []
    for part in location:
        while get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        if get_origin(annotation) in (Union, UnionType):
            if named := [member for member in get_args(annotation) if Tag(part) in getattr(member, "__metadata__", ())]:
                annotation = named[0]
                continue
            classes = [member for member in get_args(annotation) if _is_class(member)]
            if len(classes) == 1:  # or null, of which a location says nothing
                annotation = classes[0]
            else:
                tagged = [member for member in classes if part in get_args(member.model_fields["source"].annotation)]
                if not tagged:
                    break
                annotation = tagged[0]
                continue
        keys.append(str(part))
        allowed = list(annotation.model_fields) if _is_class(annotation) else []
        if str(part) in allowed:
            annotation = annotation.model_fields[str(part)].annotation
        else:
            annotation = get_args(annotation)[-1] if get_origin(annotation) in (dict, list) else None
    return keys, allowed


def parse(cls: type[P], data: Any, source: str) -> P:
    """``data`` as ``cls``; raises ConfigError with one line naming ``source``, key, found and expected."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        keys, allowed = _walk(cls, first["loc"])
        key, found = ".".join(legible(part) for part in keys if part != "[key]") or "(top level)", first["input"]
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            said = f"unknown key; {closest(keys[-1], allowed)}"
            found = keys[-1]
        elif first["type"] == "missing":
            said, found = "missing", "nothing"
        elif first["type"] == "float_type" and isinstance(found, str) and any(map(str.isdigit, found)):
            said += ", without quotes and with a decimal point before any exponent"
        alike = [other for other in others if _walk(cls, other["loc"])[0] == keys]  # other members of one union
        said = " or ".join([said, *(other["msg"] for other in alike)])
        shown = "" if isinstance(found, (dict, BaseModel)) else f" (found {legible(repr(found))})"
        rest = f" [and {len(others) - len(alike)} more]" if len(others) > len(alike) else ""
        raise ConfigError(f"{source}: {key}: {said}{shown}; edit {source}{rest}") from None
