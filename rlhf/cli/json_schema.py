"""The whole configuration as a JSON Schema (draft 2020-12), for editors and pages.

Beside the standard's keywords an option has ``x-unit`` and ``x-section``, where it has them.
"""

import dataclasses
import types
import typing
from enum import Enum
from typing import Any

from conf.options import MISSING, OptionInfo, default_of, info_of
from conf.preparation import STEPS
from conf.schema import Config
from conf.stages import STAGES
from rlhf.cli.options import is_group, plain_doc
from rlhf.cli.presets import choices, stage_schema

Schema = dict[str, Any]

_PLAIN = {str: "string", bool: "boolean", int: "integer", float: "number"}


def json_schema() -> Schema:
    """The schema. A configuration is an object of groups; `stage` is one of the stages' objects,
    told apart by its name.
    """
    definitions: dict[str, Schema] = {}
    root = _object(Config, definitions)
    variants = []
    for schema, cls in STAGES.items():
        definition = _object(cls, definitions)
        presets = [name for name in choices("stage") if stage_schema(name) == schema]
        definition["properties"]["name"]["enum"] = presets
        definition["required"] = ["name"]
        definitions[cls.__name__] = definition
        variants.append(_reference(cls.__name__))
    root["properties"]["stage"] = {"description": "The stage and its options.", "oneOf": variants}
    definitions["DataConfig"]["properties"]["pipeline"]["items"] = _step(definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "rlhf-toolkit",
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


def _reference(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _group(cls: type, definitions: dict[str, Schema]) -> Schema:
    """A reference to the definition of a dataclass, which is made when it is first needed."""
    if cls.__name__ not in definitions:
        definitions[cls.__name__] = _object(cls, definitions)
    return _reference(cls.__name__)


def _object(cls: type, definitions: dict[str, Schema]) -> Schema:
    properties: dict[str, Schema] = {}
    required = []
    for field in dataclasses.fields(cls):
        if is_group(field.type):
            properties[field.name] = _group(field.type, definitions)
            continue
        default = default_of(field)
        properties[field.name] = _option(field.type, info_of(field), default, definitions)
        if default == MISSING:
            required.append(field.name)
    schema = {
        "type": "object",
        "description": plain_doc(cls),
        "properties": properties,
        "additionalProperties": False,
    }
    if required:
        schema["required"] = required
    return schema


def _option(
    annotation: Any, info: OptionInfo, default: Any, definitions: dict[str, Schema]
) -> Schema:
    schema = {"description": info.doc, **_type(annotation, info, definitions)}
    if default != MISSING:
        schema["default"] = _plain(default)
    if info.unit is not None:
        schema["x-unit"] = info.unit
    if info.section is not None:
        schema["x-section"] = info.section
    return schema


def _type(annotation: Any, info: OptionInfo, definitions: dict[str, Schema]) -> Schema:
    """The keywords of a type and a range."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is types.UnionType:
        (inner,) = (arg for arg in args if arg is not types.NoneType)
        return {"anyOf": [_type(inner, info, definitions), {"type": "null"}]}
    if origin is list:
        schema: Schema = {"type": "array"}
        if info.filled:
            schema["minItems"] = 1
        return {**schema, "items": _type(args[0], OptionInfo(doc=""), definitions)}
    if origin is dict:
        values = _type(args[1], OptionInfo(doc=""), definitions)
        return {"type": "object", "additionalProperties": values}
    if is_group(annotation):
        return _group(annotation, definitions)
    if annotation is Any:
        return {}
    if issubclass(annotation, Enum):
        return {"enum": [member.value for member in annotation]}
    return {"type": _PLAIN[annotation], **_range(info)}


def _range(info: OptionInfo) -> Schema:
    if info.choices:
        return {"enum": list(info.choices)}
    limits = {
        "exclusiveMinimum": info.above,
        "minimum": info.at_least,
        "exclusiveMaximum": info.below,
        "maximum": info.at_most,
        "minLength": 1 if info.filled else None,
    }
    return {keyword: limit for keyword, limit in limits.items() if limit is not None}


def _plain(value: Any) -> Any:
    """A default as JSON holds it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _step(definitions: dict[str, Schema]) -> Schema:
    """A step of data.pipeline: its name, or an object with the name and its options."""
    variants: list[Schema] = [{"enum": list(STEPS)}]
    for name, cls in STEPS.items():
        definition = _object(cls, definitions)
        definition["properties"] = {"step": {"const": name}, **definition["properties"]}
        definition["required"] = ["step", *definition.get("required", [])]
        definitions[f"step_{name}"] = definition
        variants.append(_reference(f"step_{name}"))
    return {"anyOf": variants}
