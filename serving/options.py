"""Generation options of a request: derived from the runtime's table."""

from typing import Annotated, Any, Literal, Union

from msgspec import inspect
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from ..models import limits
from ..runtime.options import BY_NAME, OPTIONS

# Each costs time in every step.
_MAX_STRINGS, _MAX_LETTERS = 16, 1000
_MAX_IDS = 1000
MAX_LOGPROBS = 100
_MAX_GRAMMAR = 100_000  # letters


def _whole(value: Any) -> Any:
    """5 for 5.0: JSON has one kind of number, and some clients write all with a point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)  # after an int's range, which the schema otherwise lacks
# `http.reference` publishes the vocabulary's size as its limit.
TokenId = Annotated[int, Field(ge=0, lt=2**31, json_schema_extra={"format": "token-id"}), WHOLE]
Count = Annotated[int, Field(ge=0, lt=2**31), WHOLE]
Sequences = Annotated[int, Field(ge=1, le=limits.SEQUENCES), WHOLE]

# Some clients send these for none.
_EMPTY: dict[str, Any] = {"stop": "", "logit_bias": {}}
# OpenAI has other names for these: max_tokens and n.
_RENAMED = ("max_new_tokens", "max_length", "num_return_sequences")
_RANGES: dict[str, Any] = {
    "stop": Annotated[str, Field(max_length=_MAX_LETTERS)]
    | Annotated[list[Annotated[str, Field(min_length=1, max_length=_MAX_LETTERS)]], Field(max_length=_MAX_STRINGS)],
    "seed": Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE],
    "logprobs": Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE],
    "prompt_lookup": Annotated[int, Field(ge=0, le=_MAX_IDS), WHOLE],
    "json_schema": dict[str, Any] | Annotated[str, Field(min_length=1, max_length=_MAX_GRAMMAR)],
    "grammar": Annotated[str, Field(min_length=1, max_length=_MAX_GRAMMAR)],
}


class Strict(BaseModel):
    """A body without unknown fields, strings for numbers, or NaN. A field that is null counts as not given."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra={"additionalProperties": {"type": "null"}}
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        return (
            {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else fields
        )


def _annotation(kind: inspect.Type) -> Any:
    """pydantic's form of a type with its range."""
    if isinstance(kind, inspect.Metadata):
        return _annotation(kind.type)
    if isinstance(kind, inspect.UnionType):
        return Union[tuple(map(_annotation, kind.types))]  # noqa: UP007  # a tuple of types
    if isinstance(kind, inspect.IntType):
        lt = None if kind.le is not None else kind.lt or 2**31
        return Annotated[int, Field(ge=kind.ge, le=kind.le, lt=lt), WHOLE]
    if isinstance(kind, inspect.FloatType):
        return Annotated[float, Field(gt=kind.gt, ge=kind.ge, le=kind.le)]
    if isinstance(kind, inspect.StrType):
        return Annotated[str, Field(min_length=kind.min_length, max_length=_MAX_LETTERS)]
    if isinstance(kind, inspect.TupleType):  # JSON has lists only
        items: Any = tuple(map(_annotation, kind.item_types))
        return Annotated[tuple[items], Field(strict=False)]
    if isinstance(kind, inspect.CollectionType):
        most = _MAX_STRINGS if isinstance(kind.item_type, inspect.StrType) else _MAX_IDS
        item: Any = _annotation(kind.item_type)
        return Annotated[list[item], Field(min_length=kind.min_length, max_length=most)]
    if isinstance(kind, inspect.LiteralType):
        return Literal[kind.values]
    return {inspect.BoolType: bool, inspect.NoneType: None}[type(kind)]


_FIELDS: Any = {
    option.name: (
        (_RANGES.get(option.name) or _annotation(inspect.type_info(option.type))) | None,
        Field(None, description=option.help),
    )
    for option in OPTIONS
    if option.name not in _RENAMED
}
GenerationOptions = create_model("GenerationOptions", __base__=Strict, **_FIELDS)


def given_options(body: BaseModel) -> dict[str, Any]:
    """The given generation options of a body, by name."""
    return {name: value for name in BY_NAME if (value := getattr(body, name, None)) not in (None, _EMPTY.get(name))}
