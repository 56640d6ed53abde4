"""The `data` section of a recipe: its keys, checked by the available formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from lorakit.data.formats import format_named, formats, formats_of_keys
from lorakit.data.keys import DataKeys, SetKeys

if TYPE_CHECKING:
    Name = str
    Loss = str
else:
    Name = Literal[tuple(form.name for form in formats())]
    Loss = Literal[tuple(dict.fromkeys(loss for form in formats() for loss in form.losses))]


SPLIT = "validation_split is a fraction between 0 and 1, or the name of a split"


def _without_default(schema: dict[str, Any]) -> None:
    """Leave the default out of a key's schema: it is no value that a recipe may have."""
    del schema["default"]


class SetSpec(SetKeys):
    """A data set of a mix: its source, its columns, its weight. A key that it lacks is as in
    `data`, where that key fits the set's format; null is the key's own default."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the set in metrics, tables and messages. By default the last part of name_or_path,
    with the subset where one is named."""
    weight: float | None = Field(None, gt=0)
    """Share of an epoch's rows that come from this set, in proportion to the weights of the others
    (2 and 1, or 0.5 and 0.25): see data.mix. Either every set has a weight, or none."""
    format: Name | None = None
    """Format of the rows. By default classification for that task, else the one that the columns
    suggest."""
    loss_on: Loss | None = None
    """The tokens that are targets, as in data.loss_on."""

    @model_validator(mode="after")
    def _keys_fit_the_format(self) -> SetSpec:
        keys = {key: getattr(self, key) for key in SetKeys.model_fields}
        _check(self, DataKeys.model_construct(**keys), self.format)
        return self

    @model_serializer(mode="wrap")
    def _given_keys(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The keys that are given: all others are those of the section, not defaults."""
        plain: dict[str, Any] = serialise(self)
        return {key: value for key, value in plain.items() if key in self.model_fields_set}


class DataSpec(DataKeys):
    """The source of the rows, and how a row becomes an example."""

    name_or_path: str = Field("", min_length=1, json_schema_extra=_without_default)
    """A data set on the hub, `builtin/…`, a local file, or a local folder with train and validation
    files. Several are named in data.mix instead."""
    mix: tuple[SetSpec, ...] | None = None
    """Several data sets in one run, as [{name_or_path: a.jsonl}, {name_or_path: b.jsonl}]: each
    with its own source, columns and format, while the keys of `data` itself hold for all of them.
    An epoch has as many rows as all training sets together. Without weights it is every row once.
    With weights, a set's share of the epoch's rows (not of its tokens) is its weight divided by the
    sum of the weights, rounded to rows by largest remainder. The rows of a set come in passes, each
    in a new random order, and an epoch goes on where the one before ended: a small set is repeated,
    a large one is spread over several epochs, and the counts of two of its rows never differ by
    more than 1. Packs, and pieces of joined text, count as rows. Every set keeps its own validation
    rows (validation_split: 0 for none), and all of them are evaluated, whatever the weights."""
    format: Name | None = None
    """Format of the rows. By default classification for that task, else the one that the columns
    suggest."""
    loss_on: Loss | None = None
    """The tokens that are targets. prompt-completion: completion (the default) or all. chat,
    sharegpt, alpaca: assistant (the default: every turn of the assistant, with the token that ends
    it), last_assistant (its last turn alone), or all."""

    @field_validator("mix")
    @classmethod
    def _all_have_weights_or_none(
        cls, mix: tuple[SetSpec, ...] | None
    ) -> tuple[SetSpec, ...] | None:
        if mix == ():
            raise ValueError(
                "data.mix is an empty list: name at least one data set, or leave it out"
            )
        without = [number for number, one in enumerate(mix or ()) if one.weight is None]
        if mix and 0 < len(without) < len(mix):
            raise ValueError(
                f"set {without[0]} of data.mix has no weight and others have one: give each a"
                " weight, or none for every row once an epoch"
            )
        return mix

    @model_validator(mode="after")
    def _one_source_or_several(self) -> DataSpec:
        if self.mix is None and not self.name_or_path:
            raise ValueError(
                "missing key `name_or_path` in data: a data set on the hub, builtin/…, a local file"
                " or folder; or `mix`, a list of several"
            )
        if self.mix is not None and self.name_or_path:
            raise ValueError(
                f"data has both name_or_path ({self.name_or_path}) and mix: leave name_or_path out,"
                " and name that set in mix, as - name_or_path: …; or set mix to null"
            )
        return self

    @model_validator(mode="after")
    def _keys_fit_the_format(self) -> DataSpec:
        if self.mix is None and self.validation_split == 0:
            raise ValueError(f"{SPLIT}; not 0: a run needs validation rows")
        # In a mix, a key holds for those sets whose format has it.
        _check(self, self, self.format if self.mix is None else None)
        return self

    @model_serializer(mode="wrap")
    def _without_a_name(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The section, without the name that a mix has in each of its sets."""
        plain: dict[str, Any] = serialise(self)
        if self.mix is not None:
            del plain["name_or_path"]
        return plain

    def sets(self) -> list[DataSpec]:
        """The section of each data set: this one, or one for each set of the mix, in which the keys
        of the section are those that the set lacks."""
        if self.mix is None:
            return [self]
        common = {key: getattr(self, key) for key in DataKeys.model_fields}
        return [DataSpec.model_construct(**common | _given(one), mix=None) for one in self.mix]

    def inherited(self, number: int) -> set[str]:
        """The keys that set `number` of the mix has from the section."""
        if self.mix is None:
            return set()
        return set(DataKeys.model_fields) - set(_given(self.mix[number]))


def _given(one: SetSpec) -> dict[str, Any]:
    """The keys that a set of a mix has itself, null among them."""
    return {key: getattr(one, key) for key in SetKeys.model_fields if key in one.model_fields_set}


def _check(spec: SetKeys, whole: DataKeys, form: str | None) -> None:
    """Raise ValueError for keys of `spec` that do not fit its format `form`. whole: with the other
    keys of a section."""
    split = spec.validation_split
    if isinstance(split, float) and not 0 <= split < 1:
        raise ValueError(f"{SPLIT}; not {split}")
    if isinstance(spec.text_columns, list) and not 1 <= len(spec.text_columns) <= 2:
        raise ValueError("text_columns names one column, or the two of a pair")
    fields = type(spec).model_fields
    for name, forms in formats_of_keys().items():
        if name not in fields or form in (None, *forms):
            continue
        if getattr(spec, name) != fields[name].default:
            raise ValueError(f"{name} is for format: {' or '.join(forms)}, not for {form}")
    if form is not None and spec.loss_on is not None:
        losses = format_named(form).losses
        if spec.loss_on not in losses:
            raise ValueError(f"loss_on of {form} is {' or '.join(losses)}, not {spec.loss_on}")
    for one in formats():
        if (wrong := one.wrong_values(whole)) is not None:
            raise ValueError(wrong)
