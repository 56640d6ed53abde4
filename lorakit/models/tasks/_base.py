"""Task: everything that depends on the task that a model is trained for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lorakit.data.formats import Format, formats_of_task


class Task:
    """A task. Models, batches and tensors are typed Any, since their types would import torch."""

    name: ClassVar[str]
    """The name in recipes."""
    auto_class: ClassVar[str]
    """The transformers class that loads a model for it."""
    peft_type: ClassVar[str]
    """PEFT's name for it."""
    called_elsewhere: ClassVar[tuple[str, ...]] = ()
    """Its names in other tools, in lower case."""
    predicts_tokens: ClassVar[bool]
    """True if each token is predicted from those before it: the model can generate text, and has a
    key-value cache. False if rows have labels, which a head predicts."""
    uncached: ClassVar[Mapping[str, Any]] = {}
    """Arguments of a pass without a key-value cache."""

    @property
    def formats(self) -> list[Format]:
        """The data formats that it can be trained on."""
        return formats_of_task(self.name)

    def head_names(self, model: Any) -> list[str]:
        """Modules of the model that are trained in full."""
        return []

    def class_token(self, config: Any) -> int | None:
        """The token at whose last occurrence in a row the class is read; all rows of a batch must
        have it equally often. None where there is no such token."""
        return None

    def logits_width(self, config: Any) -> int:
        """Size of the last dimension of the logits."""
        raise NotImplementedError

    def row_losses(self, model: Any, batch: Any) -> tuple[Any, Any]:
        """Implementation of `TaskModel.row_losses` for a TaskModel."""
        raise NotImplementedError
