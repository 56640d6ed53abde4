"""Task: all that differs between models that are trained for one thing or another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lorakit.data.formats import Format, formats_of_task


class Task:
    """A task. Models, batches and tensors are not named by their types, which would import
    torch."""

    name: ClassVar[str]
    """The name in recipes."""
    auto_class: ClassVar[str]
    """The class of transformers that loads a model for it."""
    peft_type: ClassVar[str]
    """PEFT's name for it."""
    called_elsewhere: ClassVar[tuple[str, ...]] = ()
    """Names that other tools have for it, in lower case."""
    predicts_tokens: ClassVar[bool]
    """True if each token is predicted from those before it: the model can write, and has a
    key-value cache. False if rows have labels, which a head gives."""
    uncached: ClassVar[Mapping[str, Any]] = {}
    """Arguments of a pass that goes through no key-value cache."""

    @property
    def formats(self) -> list[Format]:
        """The formats of data that it is trained on."""
        return formats_of_task(self.name)

    def head_names(self, model: Any) -> list[str]:
        """Modules of the model that are trained in full."""
        return []

    def class_token(self, config: Any) -> int | None:
        """The token at whose last place in a row the class is read, which rows of a batch must have
        equally often; None where there is none."""
        return None

    def logits_width(self, config: Any) -> int:
        """Numbers that the model gives for each thing that it predicts."""
        raise NotImplementedError

    def row_losses(self, model: Any, batch: Any) -> tuple[Any, Any]:
        """`TaskModel.row_losses` of a TaskModel."""
        raise NotImplementedError
