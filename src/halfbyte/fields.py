"""Frozen dataclasses that people write as YAML or JSON: their types are checked, unknown keys refused."""

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

from halfbyte.errors import RecipeError, listed

Spec = TypeVar("Spec", bound="Fields")


class Fields:
    """Frozen dataclasses that check their field types and convert to and from plain mappings."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            check_type(f"{type(self).__name__}.{item.name}", getattr(self, item.name), hints[item.name])
        self._check()

    def _check(self) -> None:
        """Cross-field rules; raises RecipeError."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping of all fields."""
        return typing.cast("dict[str, Any]", _plain(self))

    @classmethod
    def from_dict(cls: type[Spec], data: Any) -> Spec:
        """The inverse of `to_dict`; missing keys take their defaults.

        Raises:
            RecipeError: when data is not a mapping, a key is unknown or a value has the wrong type.
        """
        if not isinstance(data, dict):
            raise RecipeError(f"{cls.__name__} needs a mapping of its fields, got {type(data).__name__} {data!r}")
        hints = typing.get_type_hints(cls)
        unknown = set(data) - set(hints)
        if unknown:
            raise RecipeError(f"{cls.__name__} has no key {listed(unknown)}; its keys are {listed(hints)}")
        required = {item.name for item in dataclasses.fields(cls) if item.default is item.default_factory is dataclasses.MISSING}  # type: ignore[arg-type]
        if required - set(data):
            raise RecipeError(f"{cls.__name__} needs a value for {listed(required - set(data))}")
        values = {}
        for key, value in data.items():
            nested = next((t for t in (hints[key], *typing.get_args(hints[key])) if _is_spec(t)), None)
            if nested is not None and isinstance(value, dict):
                value = nested.from_dict(value)
            values[key] = _entries(value, hints[key]) if isinstance(value, list) else value
        return cls(**values)

    def replace(self: Spec, **changes: Any) -> Spec:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def _is_spec(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Fields)


def _entries(values: list[Any], hint: Any) -> tuple[Any, ...]:
    """A list of a file as the tuple it stands for, its mappings as the specs that the annotation asks for."""
    spec = next((part for part in typing.get_args(hint) if _is_spec(part)), None)
    return tuple(spec.from_dict(value) if spec is not None and isinstance(value, dict) else value for value in values)


def _plain(value: Any) -> Any:
    if isinstance(value, Fields):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}  # type: ignore[arg-type]
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def check_type(name: str, value: Any, hint: Any) -> None:
    """Refuses (by RecipeError) a value that its annotation does not allow; ints pass as floats, bools never pass as ints."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        origin = typing.get_origin(option)
        if origin is Literal:
            if any(value == allowed and type(value) is type(allowed) for allowed in typing.get_args(option)):
                return
        elif origin is tuple:
            if isinstance(value, tuple) and all(isinstance(entry, typing.get_args(option)[0]) for entry in value):
                return
        elif (option is float and isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, option) and not (option is int and isinstance(value, bool))
        ):
            return
    wanted = " or ".join(_type_words(option) for option in options)
    raise RecipeError(f"{name} must be {wanted}, got {type(value).__name__} {value!r}")


def _type_words(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(repr(allowed) for allowed in typing.get_args(hint))}"
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        return "a tuple of " + ("strings" if kind is str else kind.__name__) + " (in a file: a list)"
    return {type(None): "null", int: "an integer", float: "a number", str: "a string", bool: "true or false"}.get(
        hint, f"a mapping of {getattr(hint, '__name__', hint)} fields"
    )
