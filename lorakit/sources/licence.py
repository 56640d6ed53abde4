"""The licence of a base model."""

from __future__ import annotations

import contextlib

import yaml

from lorakit.sources import catalogue
from lorakit.sources.resolve import Source

CARD = "README.md"


def licence_of(source: Source) -> str | None:
    """The licence of a loaded model, as the hub names it (`apache-2.0`): a builtin's, or that of
    the model card in its folder; None where neither says one."""
    if source.kind == "builtin":
        return catalogue.find(source.used).licence.lower()
    folder = source.folder()
    card = folder / CARD if folder else None
    if card is None or not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    front = None
    with contextlib.suppress(yaml.YAMLError):
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    licence = front.get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) else None
