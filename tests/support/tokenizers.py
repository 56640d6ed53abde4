"""Tokenizers of the usual makes, each trained on the spot on a few lines: what tells them apart is
what they do around a text, at its beginning and with what they do not know."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

LINES = [
    "def f(x):\n    if x:\n        return x\n\n\n    return 0\n",
    "The film was good, the plot was not. How many hens are there?\n",
    "1 + 1 = 2; 17 times 3 is 51.\tA tab, and  two blanks.\n",
    "Été, naïve, über; 今日は映画を見た。 🎬🍿 <b>bold</b>\n\n",
    "a fine warm film and a dull slow one, and the answer is: 42\n",
    '{"name": "Anna", "tags": ["x", "y"]}\n',
]
BOS, EOS, UNK = "<s>", "</s>", "<unk>"
SPECIAL = [UNK, BOS, EOS]


def _frame(backend: Tokenizer, frame: str) -> None:
    """frame: `$A`, with the names of special tokens around it."""
    names = {name for name in frame.split() if name != "$A"}
    pair = (
        frame
        + " "
        + " ".join(
            name.replace("$A", "$B") for name in frame.split()[frame.startswith((BOS, "[CLS]")) :]
        )
    )
    pair = " ".join(name if ":" in name else f"{name}:0" for name in pair.split())
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(f"{name}:0" for name in frame.split()),
        pair=pair,
        special_tokens=[(name, backend.token_to_id(name)) for name in sorted(names)],
    )


def wrapped(backend: Tokenizer, frame: str = "$A", **names: str) -> Any:
    """The tokenizer for transformers. frame: as of `_frame`."""
    if frame != "$A":
        _frame(backend, frame)
    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK} | names
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **names
    )  # type: ignore[no-untyped-call]


def byte_level(frame: str = "$A", prefix: bool = False) -> Any:
    """As GPT-2's and Llama 3's: bytes, nothing is unknown. prefix: RoBERTa's way of a blank in
    front."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return wrapped(backend, frame)


def llama(frame: str = f"{BOS} $A", legacy: bool = True) -> Any:
    """As Llama's of SentencePiece: blanks are letters, no words are told apart before merging,
    bytes for what is unknown.

    legacy: a blank before each piece between special tokens; else before the first alone.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=220, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    vocabulary = {
        name: i for i, name in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))])
    }
    for name in sorted(state["vocab"], key=state["vocab"].get):
        vocabulary.setdefault(name, len(vocabulary))
    merges = [tuple(merge) for merge in state["merges"]]
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL]
    )
    return wrapped(backend, frame)


def unigram(frame: str = f"$A {EOS}", splits: bool = True) -> Any:
    """As T5's, which closes every text. splits: at white space, of which it keeps nothing but that
    it was there."""
    backend = Tokenizer(models.Unigram())
    space = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space]) if splits else space
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    letters = sorted(set("".join(LINES)) - {" "})
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=SPECIAL,
        unk_token=UNK,
        initial_alphabet=letters,
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    return wrapped(backend, frame)


def word_piece(frame: str = "[CLS] $A [SEP]") -> Any:
    """As BERT's without capital letters: what was written can not always be told."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(
        LINES,
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False),
    )
    names = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
    }
    return wrapped(backend, frame, unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]", **names)


def word_level(frame: str = "$A") -> Any:
    """Words between blanks, as the tests' tiny models have them."""
    words = sorted({word for line in LINES for word in line.split()})
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token=UNK)
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(backend, frame)


MAKES: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "byte-level with BOS": lambda: byte_level(f"{BOS} $A"),
    "byte-level with BOS and EOS": lambda: byte_level(f"{BOS} $A {EOS}"),
    "byte-level with a blank in front": lambda: byte_level(prefix=True),
    "llama legacy": llama,
    "llama": lambda: llama(legacy=False),
    "llama without BOS": lambda: llama("$A"),
    "llama with EOS": lambda: llama(f"{BOS} $A {EOS}", legacy=False),
    "unigram of words": unigram,
    "unigram": lambda: unigram(splits=False),
    "word piece": word_piece,
    "word level": word_level,
    "word level with BOS": lambda: word_level(f"{BOS} $A"),
}
# Those that can write any text at all.
EXACT = [name for name in MAKES if name.startswith(("byte-level", "llama"))]
