"""The `data` section of a recipe: its keys, checked by the available formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from lorakit.data.formats import format_named, formats, formats_of_keys
from lorakit.data.keys import DataKeys

if TYPE_CHECKING:
    Name = str
    Loss = str
else:
    Name = Literal[tuple(form.name for form in formats())]
    Loss = Literal[tuple(dict.fromkeys(loss for form in formats() for loss in form.losses))]


class DataSpec(DataKeys):
    """The source of the rows, and how a row becomes an example."""

    format: Name | None = None
    """Format of the rows. By default classification for that task, else the one that the columns
    suggest."""
    loss_on: Loss | None = None
    """The tokens that are targets. prompt-completion: completion (the default) or all. chat,
    sharegpt, alpaca: assistant (the default: every turn of the assistant, with the token that ends
    it), last_assistant (its last turn alone), or all."""

    @model_validator(mode="after")
    def _keys_fit_the_format(self) -> DataSpec:
        if isinstance(self.validation_split, float) and not 0 < self.validation_split < 1:
            split = self.validation_split
            raise ValueError(
                "validation_split is a fraction between 0 and 1, or the name of a split; not"
                f" {split}"
            )
        if isinstance(self.text_columns, list) and not 1 <= len(self.text_columns) <= 2:
            raise ValueError("text_columns names one column, or the two of a pair")
        for name, forms in formats_of_keys().items():
            default = type(self).model_fields[name].default
            if self.format not in (None, *forms) and getattr(self, name) != default:
                raise ValueError(
                    f"{name} is for format: {' or '.join(forms)}, not for {self.format}"
                )
        if self.format is not None and self.loss_on is not None:
            losses = format_named(self.format).losses
            if self.loss_on not in losses:
                fitting = " or ".join(losses)
                raise ValueError(f"loss_on of {self.format} is {fitting}, not {self.loss_on}")
        for form in formats():
            if (wrong := form.wrong_values(self)) is not None:
                raise ValueError(wrong)
        return self
