"""A table of options: the fields of a structure, with their types, ranges, defaults and help."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta, inspect

from gpt2onnx.errors import OptionError

from ..models import limits
from ..models.messages import shown

# float32 holds logits multiplied or divided by numbers in this range.
SMALLEST, LARGEST = 1e-30, 1e30

Count = Annotated[int, Meta(ge=0)]
Length = Annotated[int, Meta(ge=1)]
Rows = Annotated[int, Meta(ge=1, le=limits.SEQUENCES)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
# transformers takes -1 for a token that never comes.
TokenIdOrNone = Annotated[int, Meta(ge=-1, lt=2**31)]
Ids = Annotated[Sequence[TokenIdOrNone], Meta(max_length=limits.OPTION_IDS)]
Words = Annotated[Sequence[TokenId], Meta(min_length=1)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Share = Annotated[float, Meta(gt=0, le=1)]
Penalty = Annotated[float, Meta(ge=SMALLEST, le=LARGEST)]
Exponent = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
NotNegative = Annotated[float, Meta(ge=0, le=LARGEST)]
Factor = Annotated[float, Meta(gt=0, le=LARGEST)]
Text = Annotated[str, Meta(min_length=1)]

# Generation options of transformers that change tokens and aren't implemented, with the value that changes none.
NOT_SUPPORTED = {
    "dola_layers": None,
    "force_words_ids": None,
    "remove_invalid_values": False,
    "token_healing": False,
    "watermarking_config": None,
}
# What callers of transformers give and nothing here depends on.
NEEDLESS = frozenset(
    {"attention_mask", "pad_token_id", "return_dict_in_generate", "synced_gpus", "use_cache", "use_model_defaults"}
)


def about(
    help: str,  # noqa: A002
    *,
    sampling: bool = False,
    example: str = "",
    off: object = None,
    repeated: bool = False,
) -> Meta:
    """A field's help, and the other attributes of its `Option`; `off` is the value for None."""
    extra = {"sampling": sampling, "example": example, "off": off, "repeated": repeated}
    return Meta(description=help, extra=extra)


@dataclass(frozen=True)
class Option:
    """A row of the table.

    Attributes:
        name: transformers' name of it.
        type: Python type with its range, for msgspec.
        default: where neither the bundle nor the caller gives it.
        off: value that None stands for.
        help: a sentence.
        sampling: whether it applies to sampling alone, so that giving it turns sampling on.
        example: how it is written on a command line, where that isn't plain.
        repeated: whether a command line gives its texts one by one.
        holder: a structure with a `value` of that type.
    """

    name: str
    type: Any
    default: Any
    off: Any
    help: str
    sampling: bool
    example: str
    repeated: bool
    holder: Any

    def checked(self, value: Any) -> Any:
        """The value, converted to the option's type.

        Raises:
            OptionError: it is of another type or out of range.
        """
        # In a structure, whose type msgspec prepares once. It looks up other types by Python code, and would swallow a Ctrl-C there.
        try:
            return msgspec.convert({"value": value}, self.holder).value
        except (msgspec.ValidationError, ValueError) as error:
            if (converted := _without_numpy(value)) is not value:
                return self.checked(converted)
            raise OptionError(f"{self.name} must be {self.wanted}, not {shown(value)}", self.name) from error

    def takes(self, value: Any) -> bool:
        """Whether the value is in range."""
        try:
            self.checked(value)
        except OptionError:
            return False
        return True

    @property
    def kinds(self) -> list[inspect.Type]:
        """The types that it takes, None aside."""
        return [kind for kind in _alternatives(inspect.type_info(self.type)) if not isinstance(kind, inspect.NoneType)]

    @property
    def takes_list(self) -> bool:
        """Whether a value may be a list."""
        return any(isinstance(kind, inspect.CollectionType | inspect.TupleType) for kind in self.kinds)

    @property
    def wanted(self) -> str:
        """Type and range in words."""
        words = [_in_words(kind, self.example) for kind in self.kinds]
        return words[0].replace("such texts", "texts") if len(words) == 1 else " or ".join(words)


def table(options: type[msgspec.Struct]) -> tuple[Option, ...]:
    """The rows of a structure whose fields are annotated by `about`."""
    rows = []
    hints = get_type_hints(options, include_extras=True)
    for field in msgspec.structs.fields(options):
        (meta,) = (each for each in hints[field.name].__metadata__ if each.description)
        extra, kind = dict(meta.extra), hints[field.name]
        off = extra.pop("off")
        off = field.default if off is None else off
        holder = msgspec.defstruct(field.name, [("value", kind)])
        rows.append(Option(field.name, kind, field.default, off, meta.description, **extra, holder=holder))
    return tuple(rows)


def _without_numpy(value: Any) -> Any:
    """The value with Python's numbers and lists in place of NumPy's; the value itself where it has none."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if not isinstance(value, list | tuple):
        return value
    converted = [_without_numpy(each) for each in value]
    return value if all(one is other for one, other in zip(converted, value, strict=True)) else converted


def as_tuple(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """Ids as an option has them, as a tuple."""
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, Sequence) else (ids,)


def _alternatives(kind: inspect.Type) -> list[inspect.Type]:
    if isinstance(kind, inspect.Metadata):
        return _alternatives(kind.type)
    return list(kind.types) if isinstance(kind, inspect.UnionType) else [kind]


def _in_words(kind: inspect.Type, example: str) -> str:
    """A type and its range, as an error names them."""
    if isinstance(kind, inspect.IntType):
        if kind.lt is not None:
            return "a token id"
        return f"a whole number from {kind.ge}" + ("" if kind.le is None else f" to {kind.le}")
    if isinstance(kind, inspect.FloatType):
        least = f"from {kind.ge:g}" if kind.gt is None else f"above {kind.gt:g} and up"
        return f"a number {least} to {kind.le:g}"
    if isinstance(kind, inspect.BoolType):
        return "true or false"
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(map(repr, kind.values))
    if isinstance(kind, inspect.DictType):
        return "an object"
    if isinstance(kind, inspect.StrType):
        return "a text that isn't empty" if kind.min_length else "a text"
    most = ""
    if isinstance(kind, inspect.CollectionType):
        (item,) = _alternatives(kind.item_type)
        most = "" if kind.max_length is None else f"at most {kind.max_length:,} "
        if isinstance(item, inspect.IntType | inspect.StrType):
            return f"a list of {most}{'token ids' if isinstance(item, inspect.IntType) else 'such texts'}"
        most = most and f" with {most}entries"
    return f"a list such as {_in_json(example)}{most}"


def _in_json(example: str) -> str:
    """A command line's example of a list as JSON has it."""
    if "=" in example:
        return str([json.loads(f"[{pair.replace('=', ',')}]") for pair in example.split(",")])
    return example if example.startswith("[") else f"[{example}]"
