"""A tokenizer as the keys `tokenizer.*` of a GGUF file.

llama.cpp has two kinds of BPE: over bytes ("gpt2"), whose first split of a text is one of those
that `tokenizer.ggml.pre` names, and SentencePiece's ("llama"), which joins the pair of neighbours
whose token has the highest score. The first split is told by its regular expressions in the
tokenizer itself (src/llama-vocab.cpp has the same ones by name), so a tokenizer with tokens of its
own is known too. Those that llama.cpp would not read as they are are refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import gguf

from lorakit import compat
from lorakit.errors import UsageError
from lorakit.export.gguf.architectures import ELSEWHERE

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = ("ByteLevel", "with its own split")
BYTES = ("ByteLevel", "without")
# {steps before BPE, and model.ignore_merges: tokenizer.ggml.pre}
FIRST_SPLITS = {
    ((WORDS,), False): "gpt-2",
    ((("Digits", "each"), WORDS), False): "smollm",
    ((("Split", rf"{LETTERS}|\p{{N}}|{REST}"), BYTES), False): "qwen2",
    ((("Split", rf"{LETTERS}|\p{{N}}{{1,3}}|{REST}"), BYTES), True): "llama-bpe",
    ((("Split", rf"{LETTERS}|\p{{N}}{{1,3}}|{REST}"), BYTES), False): "dbrx",
}
BLANK = "▁"
# Score of a token that no merge makes: lower than that of all others.
NEVER_MERGED = -1e9


@dataclass(frozen=True)
class TokenizerKeys:
    """values: {method of gguf.GGUFWriter without `add_`: value}. notes: what llama.cpp does
    otherwise, in sentences."""

    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def tokenizer_keys(
    tokenizer: Any, rows: int, ends: set[int], base_bos: int | None
) -> TokenizerKeys:
    """The tokenizer's keys. rows: of the input embedding; ends: tokens that end a text; base_bos:
    the first token by the model's configuration. Raises UsageError for a tokenizer that llama.cpp
    would read otherwise."""
    if not tokenizer.is_fast:
        raise _refused("it is not one of the tokenizers library")
    spec = json.loads(compat.backend(tokenizer).to_str())
    model = spec["model"]
    affixes = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(key) for key in affixes):
        raise _refused(f"its model is {model['type']}, not plain BPE")
    added = {token["id"]: token for token in spec["added_tokens"]}
    for token in added.values():
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            raise _refused(f"its token `{token['content']}` takes in the blanks beside it")
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(names) >= rows:
        raise _refused(f"it has a token {max(names)}, and the model {rows} embeddings")
    types = [_type(number, names, added, model) for number in range(rows)]
    tokens = [names.get(number, f"[PAD{number}]") for number in range(rows)]
    kind = _sentence_piece if model.get("byte_fallback") else _byte_level
    values, note = kind(spec, tokens, types)
    values |= {"token_list": tokens, "token_types": types}
    return TokenizerKeys(values | _special(tokenizer, ends, base_bos), [note] if note else [])


def _refused(reason: str) -> UsageError:
    return UsageError(f"llama.cpp would not read this tokenizer as it is: {reason}", ELSEWHERE)


def _type(number: int, names: dict[int, str], added: dict[int, Any], model: dict[str, Any]) -> int:
    """The token's member of gguf.TokenType."""
    kinds = gguf.TokenType
    if number not in names:
        return int(kinds.UNUSED)
    if model.get("byte_fallback"):
        if names[number] == model.get("unk_token"):
            return int(kinds.UNKNOWN)
        if re.fullmatch("<0x[0-9A-F]{2}>", names[number]):
            return int(kinds.BYTE)
    if number in added:
        return int(kinds.CONTROL if added[number]["special"] else kinds.USER_DEFINED)
    return int(kinds.NORMAL)


# -- BPE over bytes --------------------------------------------------------------------------------


def _byte_level(
    spec: dict[str, Any], tokens: list[str], types: list[int]
) -> tuple[dict[str, Any], str | None]:
    """(keys, what llama.cpp does otherwise)."""
    steps = tuple(map(_step, _in_turn(spec["pre_tokenizer"], "pretokenizers")))
    first = FIRST_SPLITS.get((steps, bool(spec["model"].get("ignore_merges"))))
    if first is None:
        raise _refused("its first split of a text is none that is known to be llama.cpp's")
    normal = [step["type"] for step in _in_turn(spec["normalizer"], "normalizers")]
    if normal not in ([], ["NFC"]):
        raise _refused(f"it changes texts first ({', '.join(normal)})")
    note = (
        "llama.cpp does not normalise texts to NFC, as the tokenizer does: letters and accents that"
        " stand apart are other tokens there"
    )
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": first,
        "token_merges": [" ".join(pair) for pair in _merges(spec)],
        "add_space_prefix": False,
    }, note if normal else None


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    """A step of a pre-tokenizer, as in FIRST_SPLITS; as it is where none of those is like it."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return WORDS
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return BYTES
        case {"type": "Digits", "individual_digits": True}:
            return "Digits", "each"
        case {
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": "Isolated",
            "invert": False,
        }:
            return "Split", regex
    return (json.dumps(step),)


def _in_turn(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json, which may be a sequence of sequences, or none."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for one in part[inner] for step in _in_turn(one, inner)]


def _merges(spec: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs that are joined, the first ones first; files of old tokenizers have them as texts
    with a blank between."""
    pairs = (one.split(" ") if isinstance(one, str) else one for one in spec["model"]["merges"])
    return [(left, right) for left, right in pairs]


# -- BPE of SentencePiece --------------------------------------------------------------------------


def _sentence_piece(
    spec: dict[str, Any], tokens: list[str], types: list[int]
) -> tuple[dict[str, Any], str | None]:
    """As `_byte_level`. In tokens that stand for themselves blanks become blanks again."""
    if spec["model"].get("ignore_merges"):
        raise _refused("it takes whole words first (ignore_merges)")
    prefix, note = _prefix(spec)
    plain = {
        token: number
        for number, token in enumerate(tokens)
        if types[number] == gguf.TokenType.NORMAL
    }
    for number, kind in enumerate(types):
        if kind == gguf.TokenType.USER_DEFINED:
            tokens[number] = tokens[number].replace(BLANK, " ")
    merges = [pair for pair in _merges(spec) if "".join(pair) in plain]
    scores: dict[int, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(plain[left + right], -float(rank))
    _check_scores(merges, plain, scores)
    return {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_scores": [scores.get(number, NEVER_MERGED) for number in range(len(tokens))],
        "add_space_prefix": prefix,
    }, note


def _prefix(spec: dict[str, Any]) -> tuple[bool, str | None]:
    """(True if a blank is put before a text, what llama.cpp does otherwise)."""
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    normal = _in_turn(spec["normalizer"], "normalizers")
    steps = _in_turn(spec["pre_tokenizer"], "pretokenizers")
    if not steps and normal == [{"type": "Prepend", "prepend": BLANK}, replaces]:
        return True, None
    between = [
        {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        }
    ]  # splits nothing: no blank is left
    if normal == [replaces] and steps in ([], between):
        return False, None
    match normal, steps:
        case [], [{"type": "Metaspace", "replacement": "▁", "split": False, **rest}]:
            scheme = rest["prepend_scheme"]
            if scheme == "never":
                return False, None
            where = "a text that begins with a blank"
            if scheme == "first":
                where += " and a text after a special token"
            return True, f"llama.cpp puts a blank before {where}, as the tokenizer does not"
    raise _refused("what it does with blanks is not known to be what llama.cpp does")


def _check_scores(
    merges: list[tuple[str, str]], numbers: dict[str, int], scores: dict[int, float]
) -> None:
    """Raise UsageError unless joining the neighbours whose token scores highest, as llama.cpp does
    with any two that make a token, is joining the pair that comes first among the merges."""
    last = 0.0
    for left, right in merges:
        score = scores[numbers[left + right]]
        if score > last:
            raise _refused("pairs that make one token stand apart in the order of its merges")
        last = score
    joined = set(merges)
    for token in numbers:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in numbers and right in numbers and (left, right) not in joined:
                raise _refused(f"it does not join `{left}` and `{right}`, as llama.cpp would")


# -- special tokens --------------------------------------------------------------------------------


def _special(tokenizer: Any, ends: set[int], base_bos: int | None) -> dict[str, Any]:
    """Special tokens, the chat template, and the tokens that stand around every text."""
    others = sorted(ends - {tokenizer.eos_token_id})
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(others), None)
    if eos is None:
        raise _refused("it has no end token")
    bos = next(one for one in (tokenizer.bos_token_id, base_bos, eos) if one is not None)
    text = tokenizer("a", add_special_tokens=False).input_ids
    framed = tokenizer("a").input_ids
    around = next(
        (
            (first, last)
            for first in (False, True)
            for last in (False, True)
            if framed == [bos] * first + text + [eos] * last
        ),
        None,
    )
    if around is None:
        raise _refused("it puts other tokens than its first and its end token around a text")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": one} for name, one in template.items()]
    values = {
        # Without them llama.cpp takes numbers of its own, whatever tokens these are here.
        "bos_token_id": bos,
        "eos_token_id": eos,
        "eot_token_id": next((one for one in others if one != eos), None),
        "unk_token_id": tokenizer.unk_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "add_bos_token": around[0],
        "add_eos_token": around[1],
        "chat_template": template,
    }
    return {key: value for key, value in values.items() if value is not None}
