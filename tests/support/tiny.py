"""Words, tokenizers and files of tiny models and data."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    PreTrainedTokenizerFast,
)

GOOD = ["good", "fine", "lovely", "funny", "great", "warm", "bright"]
BAD = ["bad", "dull", "awful", "flat", "weak", "cold", "slow"]
FILLER = ["film", "plot", "cast", "scene", "joke", "song", "a", "the", "and", "is", "was", "of"]
OTHERS = [
    "in",
    "it",
    "how",
    "many",
    "are",
    "left",
    "hens",
    "eggs",
    "boxes",
    "there",
    "Question:",
    "Answer:",
    ".",
    "?",
]
WORDS = [*GOOD, *BAD, *FILLER, *OTHERS, *map(str, range(10))]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}


def tokenizer(pair: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pair:
        special = [("[CLS]", VOCABULARY["[CLS]"]), ("[SEP]", VOCABULARY["[SEP]"])]
        backend.post_processor = TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="[PAD]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            model_max_length=64,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]", model_max_length=128
    )


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
