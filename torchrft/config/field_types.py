"""What sections and fields are made of: bounds, and the shorthands that TOML and flags may use."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WrapValidator

from torchrft.config import choices


class Section(BaseModel):
    """Strict and frozen: unknown keys, wrong types, NaN and infinity are refused."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


LARGEST = 10**9  # of numbers without a bound of their own
# Beyond these, what is computed from a field overflows somewhere: 32-bit integers, float32, clocks.
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, le=LARGEST)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=LARGEST)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Count = Annotated[int, Field(gt=0, le=10**6)]  # of what is held in memory at the same time
LearningRate = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=1e-5, le=1e3)]  # below, logits overflow
Seconds = Annotated[float, Field(gt=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _list_to_tuple(value: Any) -> Any:
    """TOML has no tuples."""
    return tuple(value) if isinstance(value, list) else value


def _text_to_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def name_to_table(value: Any) -> Any:
    """A plain name may stand for a component without options."""
    return {"name": value} if isinstance(value, str) else value


def exact_int(value: Any) -> Any:
    """Literal compares by ==, so that it takes True for 1 and 2.0 for 2 even in strict mode."""
    if type(value) is not int:
        raise ValueError("must be an integer")
    return value


def _no_null(value: str) -> str:
    # Neither paths nor TOML can hold one. (Undecodable text is refused by the length check.)
    if "\0" in value:
        raise ValueError("must not contain a null character")
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value


PythonFunction = Annotated[str, Field(pattern=r"^.+\.py:\w+$")]
"""A component of the user's own: `path/to/file.py:function`."""
RawText = Annotated[str, Field(min_length=1), AfterValidator(_no_null)]
"""Any text, also blanks: a stop string may be a line break."""
Text = Annotated[RawText, AfterValidator(_not_blank)]
_one_or_more = BeforeValidator(_text_to_list, json_schema_input_type=list[Text] | Text)
TextOrList = Annotated[list[Text], _one_or_more]
"""Several texts; a lone one may stand for a list of one."""
_Rate = Annotated[float, Field(ge=0, lt=1)]
TwoRates = Annotated[tuple[_Rate, _Rate], BeforeValidator(_list_to_tuple)]

if TYPE_CHECKING:
    AdvantageEstimator = str
    PolicyLoss = str
else:
    _estimator = WrapValidator(choices.known_to("advantage_estimator"))
    AdvantageEstimator = Annotated[Literal[choices.ESTIMATORS], _estimator] | PythonFunction
    _loss = WrapValidator(choices.known_to("policy_loss"))
    PolicyLoss = Annotated[Literal[choices.LOSSES], _loss] | PythonFunction
