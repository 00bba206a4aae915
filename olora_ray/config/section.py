"""Base of all sections of a config."""

from collections.abc import Iterator
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

LARGEST = 2**31 - 1
"""Largest number of a config: what is computed from such numbers stays within 64 bits."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown fields, numbers have bounds, field docstrings are the help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, serialize_by_alias=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """YAML reads yes, on and true as true, which Python takes for 1."""
        switch = next((each for each in _leaves(value) if isinstance(each, bool)), None)
        if switch is not None and info.field_name is not None:
            kinds = set(_kinds(cls.model_fields[info.field_name].annotation))
            if kinds & {int, float} and bool not in kinds:
                raise ValueError(f"expected a number, not {str(switch).lower()}")
        return value

    @model_validator(mode="after")
    def _numbers_have_bounds(self) -> Self:
        for name, value in self:
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and abs(number) > LARGEST:
                    raise ValueError(f"{name}: {number!r} is larger than {LARGEST}, the largest number in a config")
        return self


def _leaves(value: object) -> Iterator[object]:
    """A value, or all that is in a list or mapping of them."""
    if isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


def _kinds(annotation: Any) -> Iterator[type]:
    """The types that a field takes; of a Literal those of its values, of a list those of its entries."""
    if get_origin(annotation) is Literal:
        yield from map(type, get_args(annotation))
    elif inner := get_args(annotation):
        for each in inner:
            yield from _kinds(each)
    elif isinstance(annotation, type):
        yield annotation


AnySection = TypeVar("AnySection", bound=Section)
