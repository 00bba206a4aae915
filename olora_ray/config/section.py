"""The base class of all config sections, and the types of single fields."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Protocol,
    Self,
    TypeVar,
    get_args,
    get_origin,
    runtime_checkable,
)

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from olora_ray.config.tables import FORMATS, Table

if TYPE_CHECKING:
    from typing_extensions import TypeIs

LARGEST = 2**31 - 1
"""Largest number in a config, so that products of two such numbers fit in 64 bits."""


def is_auto(value: object) -> "TypeIs[Literal['auto']]":
    """True if a field, or its value, is still to be decided."""
    return value == "auto"


class Section(BaseModel):
    """Base of all sections: immutable, without unknown fields, with bounded numbers; field docstrings are the help."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        serialize_by_alias=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        # YAML reads yes and on as true, and pydantic would accept true as 1: `rank: yes` would be rank 1.
        switch = next((each for each in _leaves(value) if isinstance(each, bool)), None)
        if switch is not None and info.field_name is not None:
            kinds = set(_kinds(cls.model_fields[info.field_name].annotation))
            if kinds & {int, float} and bool not in kinds:
                raise ValueError(f"expected a number, not {str(switch).lower()}")
        return value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        shown = handler(schema)
        properties = handler.resolve_ref_schema(shown).get("properties", {})
        for name, field in cls.model_fields.items():
            if field.description:
                properties[field.alias or name]["description"] = described(field)
        return shown

    @model_validator(mode="after")
    def _numbers_have_bounds(self) -> Self:
        for name, value in self:
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and abs(number) > LARGEST:
                    raise ValueError(
                        f"{name}: {number!r} is out of range; use a number up to {LARGEST}"
                    )
        return self


def _leaves(value: Any) -> Iterator[object]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        yield value
        return
    for each in value:
        yield from _leaves(each)


def _kinds(annotation: Any) -> Iterator[type]:
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        yield from map(type, inner)
    elif isinstance(annotation, type) and not inner:
        yield annotation
    else:
        for each in inner:
            yield from _kinds(each)


AnySection = TypeVar("AnySection", bound=Section)


# Types of single fields: bounds, patterns of names, paths and addresses.


PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_-])?$"
MODEL_NAME = r"^\w([\w .-]*\w)?$"
METRICS = r"^(/.*\.prom|https?://.+|env:.+|file:/[^/].*)$"
EXPERIMENT = r"^[^\x00-\x1f\x7f]+$"
HUB_NAME = r"^[A-Za-z0-9][\w-]*/\w[\w.-]*$"
LONGEST_NAME = 200
"""Largest size in bytes of a name that becomes a file name: file systems allow 255, and lock files add up to 44."""


def _fits_a_file(name: str) -> str:
    size = len(name.encode())
    if size > LONGEST_NAME:
        raise ValueError(
            f"the name has {size} bytes, but files with this name allow {LONGEST_NAME}; shorten it"
        )
    return name


def extended(name: str, end: str) -> str:
    """Return `name-end`, with `name` cut if the result would be longer than LONGEST_NAME."""
    return f"{name[: LONGEST_NAME - len(end) - 1]}-{end}"


FileName = Annotated[str, Field(pattern=NAME), AfterValidator(_fits_a_file)]
ModelName = Annotated[str, Field(pattern=MODEL_NAME), AfterValidator(_fits_a_file)]
AliasName = Annotated[str, Field(pattern=NAME, max_length=255)]  # MLflow's own limit
# MLflow itself checks for 500 characters, but its column in PostgreSQL and MySQL has 256.
ExperimentName = Annotated[str, Field(pattern=EXPERIMENT, max_length=256)]


_ONE_SLASH = re.compile(r"(?!models:)([A-Za-z][\w.+-]+):/(?!/)")
"""Start of an address that lacks a slash; without this check `s3:/bucket` would be a folder `s3:` here."""


def _straight(path: str) -> str:
    match = _ONE_SLASH.match(path)
    if match:
        slashes = "///" if match[1] == "file" else "//"
        raise ValueError(
            f"an address needs {slashes} after the colon; use {match[1]}:{slashes}{path[match.end() :]}"
        )
    if "://" in path and ".." in path.partition("?")[0].split("/"):
        raise ValueError("an address must not contain '..'; write the resolved address")
    return path


def _without_options(path: str) -> str:
    if "://" not in path or path.startswith("file://"):
        return path
    for sign in "?#%":
        if sign in path:
            raise ValueError(
                f"this address must not contain {sign!r}; remove it, and set the object store's server in the"
                " environment variables AWS_ENDPOINT_URL and AWS_REGION on all nodes"
            )
    return path


REFER = "store it in an environment variable or a file of one line, and set the field to env:NAME or file:/PATH"


def _refers(address: str) -> str:
    if not re.match(r"env:.|file:/[^/]", address):
        raise ValueError(
            f"an address is a secret here, because a config is copied into checkpoints and MLflow; {REFER}"
        )
    return address


def _no_address(command: str) -> str:
    if "://" in command:
        raise ValueError(
            "an address may be a secret, and a config is copied into checkpoints and MLflow; use $NAME"
        )
    return command


Reference = Annotated[str, AfterValidator(_refers)]
Command = Annotated[str, AfterValidator(_no_address)]
Place = Annotated[str, AfterValidator(_straight)]
"""A path, or a URI without '..', which object stores interpret differently."""
Folder = Annotated[Place, AfterValidator(_without_options)]
"""A path or URI to which names are appended, so it has no options (`?...`)."""


@dataclass(frozen=True)
class NameIn:
    """Accept the names of a table, and the words in `also`."""

    table: Table
    also: tuple[str, ...] = ()
    more: Callable[[], str] | None = None
    """Returns what the members add to the field's docstring, for people who read the help."""

    def names(self) -> tuple[str, ...]:
        return (*self.also, *self.table.names())

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "enum": [*self.names()]}

    def _check(self, name: str) -> str:
        if name not in self.also and not self.table.knows(name):
            message = self.table.unknown(name, self.also)
            raise PydanticCustomError("unknown_name", "{message}", {"message": message})
        return name


@runtime_checkable
class RowFormat(Protocol):
    """The part of a format that the config reads (data/formats/format.py)."""

    names: tuple[str, ...]
    makes: str

    @property
    def has_turns(self) -> bool: ...

    def is_chat(self, wanted: bool) -> bool: ...

    def takes(self, chat: Literal["auto"] | bool) -> bool: ...


def described(field: FieldInfo) -> str:
    """Return a field's docstring, with what the members of its table add."""
    words = field.description or ""
    for limit in field.metadata:
        if isinstance(limit, NameIn) and limit.more:
            words = f"{words} {limit.more()}"
    return words


def row_format(name: str) -> RowFormat:
    return FORMATS.load(name, RowFormat)  # type: ignore[type-abstract]


def fields_of_formats() -> str:
    shown = [f"{name} {{{', '.join(row_format(name).names)}}}" for name in FORMATS.own]
    return f"{', '.join(shown)}."


Role = Literal["developer", "system", "user", "assistant", "tool"]
"""A role of a message."""
Markup = Literal["guanaco", "llama2", "llama3", "chatml", "instruction", "glaive"]
"""Another tool's way to write a chat as one text (data/formats/markup.py)."""
ALWAYS = {
    "chat": "always chats",
    "completion": "prompts with a completion",
    "text": "always plain text",
    "ids": "used as they are",
    "pair": "preference pairs",
    "rating": "answers with a rating",
}
"""The type of a format's examples, in the words of a message."""


class Source(Section):
    """One source of rows: a file, a folder, a glob or a hub dataset."""

    path: Place
    """File, folder or glob (jsonl, json, parquet, csv, tsv, txt; .gz ...), hf://ORG/NAME?split=..., s3:// or gs://. A
    glob with a set format may have no file yet, if another source has one."""
    format: Annotated[str, NameIn(FORMATS, also=("auto",), more=fields_of_formats)] = "auto"
    """Format of the rows, which decides the columns to read. auto: the first rows decide the format and its fields. The
    fields are:"""
    fields: dict[str, str] = {}
    """Columns for fields of the format, e.g. {prompt: question}; {NAME: none} ignores one. auto detects the others. A
    path leads into a column (answers.text.0), and a text with braces is a template (Translate: {translation.en})."""
    roles: dict[str, Role] = {}
    """Names of roles in the turns of messages and sharegpt rows, e.g. {Customer: user, Agent: assistant}."""
    labels: dict[str, tuple[str, ...]] = {}
    """Names for the numbers of a column from 0 on, e.g. {label: [negative, positive]}. Files of Hugging Face datasets
    have their own."""
    system: Annotated[str, Field(min_length=1)] | None = None
    """System message for chats that have none."""
    markup: Literal["auto", "none"] | Markup = "auto"
    """The markup in which each text is a whole chat (guanaco: ### Human: ... ### Assistant: ...). The text becomes
    messages, for the model's own chat template. auto: the first of which a text has a mark, if most of the first rows
    are such chats; none: train the texts as they are."""
    weight: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    """Number of uses of each row per epoch. 0.5 uses half of the rows, selected by a hash of their position."""
    only: tuple[str, ...] = ()
    """Files of the folder or glob to use, as full paths or URIs; empty: all files."""
    chat: Literal["auto"] | bool = "auto"
    """true: prompt_completion rows go through the chat template. false: prompt and completion are joined as they are.
    auto: true if the model has a chat template."""

    @model_validator(mode="after")
    def _fits_the_format(self) -> "Source":
        said = self.roles or self.system or self.markup not in ("auto", "none")
        if is_auto(self.format) or (is_auto(self.chat) and not said):
            return self
        problem = self.unfit(self.format)
        if problem:
            raise ValueError(problem)
        return self

    def unfit(self, format: str) -> str | None:
        """Return the problem if this source sets something that rows of this format do not have."""
        rows = row_format(format)
        is_chat = rows.is_chat(self.chat is not False)
        fits = {
            "markup": format == "messages" or self.markup in ("auto", "none"),
            "roles": rows.has_turns or not self.roles,
            "system": is_chat or not self.system,
            "chat": rows.takes(self.chat),
        }
        for name, is_right in fits.items():
            if not is_right:
                return (
                    f"{name}: rows of format {format} are {ALWAYS[rows.makes]}, and have no use for it; remove it, or"
                    " set another format"
                )
        return None

    def has_no_questions(self) -> bool:
        """True if the rows are plain text; a format that is still to be detected is not known to be."""
        return not is_auto(self.format) and row_format(self.format).makes == "text"
