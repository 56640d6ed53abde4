"""Tokenizers: loading them, and saving them as the base has them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lorakit import compat
from lorakit.files import read_json, write_json
from lorakit.models.fetching import loading, origin
from lorakit.models.spec import ModelSpec
from lorakit.sources.resolve import Source

TOKENIZER_CONFIG = "tokenizer_config.json"
# Files of a tokenizer, besides the vocabulary files that its class names.
TOKENIZER_FILES = {
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
}
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES |= {
    CHAT_TEMPLATE,
    "chat_template.json",
    "additional_chat_templates/*.jinja",
}
# Class names of transformers 4 in files, and their names in transformers 5.
CLASS_NAMES = {"PreTrainedTokenizerFast": "TokenizersBackend"}


def load_tokenizer(source: Source, spec: ModelSpec) -> Any:
    """The model's tokenizer, unchanged; its `name_or_path` is the folder that holds its files."""
    with loading(source, spec):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **origin(source, spec))
    folder = source.folder(spec.revision)
    if folder is not None:
        tokenizer.name_or_path = str(folder)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save tokenizer and chat template into `folder`: copies of the files that the tokenizer was
    loaded from, where they exist.

    transformers' own saving drops settings that the tokenizer's class does not know and writes the
    state of the last call, so it only supplies files that are missing. transformers may choose a
    tokenizer class by the model's configuration; a folder without one gets the class that was
    chosen for the base.
    """
    if tokenizer.is_fast:
        compat.backend(tokenizer).no_padding()
        compat.backend(tokenizer).no_truncation()
    tokenizer.save_pretrained(folder)
    origin = Path(tokenizer.name_or_path or os.devnull)
    if not origin.is_dir():
        return
    written = read_json(folder / TOKENIZER_CONFIG)
    names = TOKENIZER_FILES.union(tokenizer.vocab_files_names.values())
    for file in sorted(file for name in names for file in origin.glob(name) if file.is_file()):
        copy = folder / file.relative_to(origin)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    if isinstance(tokenizer.chat_template, str):
        _keep_template(tokenizer.chat_template, folder)
    settings, chosen = read_json(folder / TOKENIZER_CONFIG), written["tokenizer_class"]
    named = settings.get("tokenizer_class", "")
    same = chosen in (named, named.removesuffix("Fast"), CLASS_NAMES.get(named))
    if not same and not (folder / "config.json").exists():
        write_json(folder / TOKENIZER_CONFIG, settings | {"tokenizer_class": chosen})


def _keep_template(template: str, folder: Path) -> None:
    """Make `template` the chat template of the tokenizer in `folder`, unless it is already. A
    recipe may name another than the base's."""
    file, settings = folder / CHAT_TEMPLATE, read_json(folder / TOKENIZER_CONFIG)
    there = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if there == template:
        return
    (folder / "chat_template.json").unlink(missing_ok=True)
    file.write_text(template, encoding="utf-8")
    if settings.pop("chat_template", None) is not None:
        write_json(folder / TOKENIZER_CONFIG, settings)
