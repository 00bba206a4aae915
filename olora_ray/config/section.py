"""Base of all sections of a config."""

from typing import Self, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

LARGEST = 2**31 - 1
"""Largest number of a config: what is computed from such numbers stays within 64 bits."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown fields, numbers have bounds, field docstrings are the help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, serialize_by_alias=True, allow_inf_nan=False
    )

    @model_validator(mode="after")
    def _numbers_have_bounds(self) -> Self:
        for name, value in self:
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and abs(number) > LARGEST:
                    raise ValueError(f"{name}: {number!r} is larger than {LARGEST}, the largest number in a config")
        return self


AnySection = TypeVar("AnySection", bound=Section)
