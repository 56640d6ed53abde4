"""Tokenising: over tokenizers of all makes and texts of all kinds, tokens decode to the text, and a
sequence begins once."""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForSequenceClassification,
    ByT5Tokenizer,
    CanineTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForSequenceClassification,
)

from lorakit.data.batches import collate
from lorakit.data.choice import choose
from lorakit.data.examples import Examples
from lorakit.data.labels import count_labels
from lorakit.data.load import Rows
from lorakit.data.lost import listed_lost, lost_characters
from lorakit.data.reading import Reader
from lorakit.data.spec import DataSpec
from lorakit.data.table import Table
from lorakit.data.tokenise import Tokeniser, prompt_tokens
from lorakit.errors import RecipeError
from lorakit.models.task_model import TaskModel
from lorakit.models.tasks import task_named
from tests.support.tiny import write_jsonl
from tests.support.tokenizers import BOS, EOS, EXACT, LINES, MAKES, byte_level, llama, unigram

Call = Callable[..., str]
PLAIN = [
    "",
    " ",
    "a",
    " a",
    "a ",
    "  two",
    "\tx",
    "\n",
    "\n\n",
    "x\n",
    "\r\n",
    "a\x00b",
    "0017",
    "A B",
    ":",
    "=4",
    "##ing",
]
PLAIN += ["return x", "    return x", "the  answer", "\u00a0x", "<0x41>", "Ġa", "[SEP] x"]
LETTERS = ["🎬", "👩‍👩‍👧", "\u200d", "今日は", "é", "e\u0301", "\u0301"]
SPECIAL = ["</s>", "<s>", "what</s>"]
HARD = PLAIN + LETTERS + SPECIAL
PIECES = [
    *LINES,
    "\n",
    "\n\n",
    "  \n",
    "\t\n",
    "x",
    "</s>\n",
    "<s>",
    "a\r\n",
    "🎬🎬🎬\n",
    "e\u0301\n",
    "\u0301\n",
    " " * 12,
    "a" * 16,
]


@pytest.fixture(scope="module")
def made() -> Callable[[str], Any]:
    """A tokenizer of a make, built once."""
    kept: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in kept:
            kept[name] = MAKES[name]()
        return kept[name]

    return get


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "lorakit"):
        yield caplog


def plain(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def decoded(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def read(
    data: list[dict[str, Any]], tokenizer: Any, length: int = 64, config: Any = None, **keys: Any
) -> Examples:
    table = Table.from_list(data)
    task = keys.pop("task", "causal-lm")
    lines = keys.pop("lines", False)
    spec = DataSpec.model_validate({"name_or_path": "./data", **keys})
    labels = count_labels(table, spec) if task == "sequence-classification" else None
    chosen = choose(spec, task, table.column_names)
    return Reader(labels, chosen, tokenizer, length, lambda *_: None, config).train(
        Rows(table, table, lines)
    )


def tokens(examples: Examples) -> list[list[int]]:
    return [examples.tokens[a:b].tolist() for a, b in pairwise(examples.offsets)]


# -- how a text begins and ends --------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKES)
def test_prompts_are_what_the_tokenizer_makes_of_them_left_open(
    name: str, made: Callable[[str], Any]
) -> None:
    tokenizer = made(name)
    rules = Tokeniser(tokenizer)
    for text in HARD:
        (ids,) = prompt_tokens(tokenizer, [text])
        if not text.startswith(BOS):
            assert ids + rules.end == tokenizer(text)["input_ids"], text
    assert [name for name in MAKES if Tokeniser(made(name)).end] == [
        "byte-level with BOS and EOS",
        "llama with EOS",
        "unigram of words",
        "unigram",
        "word piece",
    ]


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in MAKES
        if "with BOS" in name or name in ("llama", "llama legacy", "llama with EOS")
    ],
)
def test_the_beginning_is_there_once_whoever_writes_it(
    name: str, made: Callable[[str], Any]
) -> None:
    tokenizer = made(name)
    rules, begin = Tokeniser(tokenizer), tokenizer.bos_token_id
    for text in ("a fine film", f"{BOS}a fine film", f"{BOS}", ""):
        rows = [
            *rules.prompts([text]),
            *rules.documents([text]),
            rules.completed([text], ["x"])[0].ids,
        ]
        rows += [ids for ids, _ in rules.running([text], lambda _: None)]
        for ids in rows:
            assert ids[0] == begin, text
            assert ids.count(begin) == 1, text
    assert rules.prompts([f"{BOS}{BOS}a"])[0].count(begin) == 2  # as written


@pytest.mark.parametrize("name", MAKES)
def test_documents_begin_as_the_tokenizer_begins_a_text_and_end_once(
    name: str, made: Callable[[str], Any]
) -> None:
    tokenizer = made(name)
    rules, end = Tokeniser(tokenizer), tokenizer.eos_token_id
    for text in HARD:
        (ids,) = rules.documents([text])
        own = plain(tokenizer, text)
        begun = own if own[: len(rules.begin)] == rules.begin else rules.begin + own
        assert ids == (begun if begun and begun[-1] == end else [*begun, end])


# -- completions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKES)
def test_completions_decode_to_the_text_behind_any_prompt(
    name: str, made: Callable[[str], Any]
) -> None:
    """All prompts and completions of hard texts; tokenizers that keep everything write it character
    by character, others lose no more than they lose of the text in one piece, or say so."""
    tokenizer = made(name)
    rules, end = Tokeniser(tokenizer), tokenizer.eos_token_id
    pairs = list(itertools.product(HARD, HARD))
    found = rules.completed(
        [prompt for prompt, _ in pairs], [completion for _, completion in pairs]
    )
    for (prompt, completion), row in zip(pairs, found, strict=True):
        assert row.ids[: row.first] == rules.prompts([prompt])[0], (prompt, completion)
        closed = plain(tokenizer, completion)[-1:] == [end]  # where the text spells it out
        tail = row.ids[row.first :]
        assert tail[-1] == end
        assert not closed or tail[-2:] != [end, end], "closed twice"
        tail = tail if closed else tail[:-1]
        head = plain(tokenizer, prompt)
        if name in EXACT:
            assert row.exact
            # what begins a text has the tokenizer's own blank in front, which not every decoder
            # takes away
            if prompt:
                text = decoded(tokenizer, head + tail)
                assert text in (decoded(tokenizer, head) + completion, prompt + completion), (
                    prompt,
                    completion,
                )
        elif row.exact:
            whole = decoded(tokenizer, plain(tokenizer, prompt + completion))
            assert decoded(tokenizer, head + tail) in (
                whole,
                decoded(tokenizer, head) + completion,
                prompt + completion,
            )


@pytest.mark.parametrize("legacy", [True, False])
def test_sums_have_no_blank_before_their_answer(legacy: bool) -> None:
    tokenizer = llama(legacy=legacy)
    found = Tokeniser(tokenizer).completed(
        ["17=", "x:", "x: ", "x:"], ["42", " 42", "42", "\n    return x"]
    )
    for row, text in zip(found, ["17=42", "x: 42", "x: 42", "x:\n    return x"], strict=True):
        assert decoded(tokenizer, row.ids) == f"{BOS} {text}{EOS}"


@pytest.mark.parametrize("make", [ByT5Tokenizer, CanineTokenizer])
def test_tokenizers_in_python_are_read_the_same_way(make: Any) -> None:
    tokenizer = make()
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    rules = Tokeniser(tokenizer)
    pairs = list(itertools.product(PLAIN + LETTERS, PLAIN + LETTERS))
    found = rules.completed(
        [prompt for prompt, _ in pairs], [completion for _, completion in pairs]
    )
    for (prompt, completion), row in zip(pairs, found, strict=True):
        assert row.ids[: row.first] == rules.prompts([prompt])[0]
        assert decoded(tokenizer, row.ids[len(rules.begin) : -1]) == prompt + completion
    lines = [*LINES, "\n"] * 20
    parts = list(rules.running(lines, lambda _: None, 300))
    assert len(parts) > 5
    assert [token for ids, _ in parts for token in ids] == rules.begin + plain(
        tokenizer, "".join(lines)
    )
    assert sum(len(counts) for _, counts in parts) == len(lines)


# -- running text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("size", [1, 300])
def test_running_text_in_parts_has_the_tokens_of_the_whole(
    name: str, size: int, made: Callable[[str], Any]
) -> None:
    tokenizer = made(name)
    rules, rng, many = Tokeniser(tokenizer), random.Random(size), 0
    for _ in range(8):
        lines = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 150))).splitlines(
            keepends=True
        )
        done: list[int] = []
        parts = list(rules.running(lines, done.append, size))
        ids = [token for part, _ in parts for token in part]
        whole = plain(tokenizer, "".join(lines))
        assert ids == (whole if whole[: len(rules.begin)] == rules.begin else rules.begin + whole)
        counts = [count for _, part in parts for count in part]
        assert (len(counts), sum(counts), sum(done)) == (len(lines), len(ids), len(lines))
        many += len(parts)
    assert many > 30, "nothing was cut"


def test_tokens_are_counted_to_the_line_they_begin_in() -> None:
    tokenizer = byte_level()
    lines = ["a film\n", "\n", "\n", "  x\n", "今日は\n"]
    ((ids, counts),) = Tokeniser(tokenizer).running(lines, lambda _: None)
    texts = [tokenizer.decode(part) for part in np.split(ids, np.cumsum(counts)[:-1])]
    # A token that reaches over the end of a line is of the line it begins in.
    assert "".join(texts) == "".join(lines)
    assert texts[0].startswith("a film")
    assert texts[-1] == "今日は\n"


@pytest.mark.parametrize("name", ["byte-level with BOS", "llama", "llama legacy"])
def test_lines_of_a_file_are_one_text(name: str, made: Callable[[str], Any]) -> None:
    tokenizer = made(name)
    lines = LINES[0].splitlines(keepends=True) * 3
    found = read([{"text": line} for line in lines], tokenizer, 16, lines=True)
    stream = [token for piece in tokens(found) for token in piece]
    assert stream == [tokenizer.bos_token_id, *plain(tokenizer, "".join(lines))][: len(stream)]
    assert sum(map(len, tokens(found))) >= 2 * len(lines)
    apart = [token for line in lines for token in plain(tokenizer, line)]
    assert apart != stream[1:], "blank lines and blanks make no difference: the test has no power"
    alone = read([{"text": line} for line in lines], tokenizer, 64, lines=True, packing=False)
    assert tokens(alone) == Tokeniser(tokenizer).documents(lines)


def test_packed_documents_each_begin_and_end(made: Callable[[str], Any]) -> None:
    tokenizer = made("llama")
    rows = [{"text": "a fine film"}, {"text": f"{BOS}a dull one"}, {"text": "42" + EOS}]
    ids = [token for piece in tokens(read(rows, tokenizer, 64)) for token in piece]
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 3
    assert [ids[0], ids[-1]] == [tokenizer.bos_token_id, tokenizer.eos_token_id]


@pytest.mark.parametrize("name", MAKES)
def test_long_prompts_give_the_tokens_of_the_whole_text(
    name: str, made: Callable[[str], Any]
) -> None:
    """The boundary is looked at by itself; where a token reaches across, the completion has tokens
    of its own."""
    tokenizer = made(name)
    rng = random.Random(0)
    prompts = [
        "".join(rng.choices([*PIECES, "a fine film ", "the answer", " is: "], k=9))
        for _ in range(300)
    ]
    completions = [
        "".join(rng.choices([*PIECES, "42", " a film", "film was good"], k=4)) for _ in prompts
    ]
    natural = 0
    for prompt, completion, found in zip(
        prompts, completions, Tokeniser(tokenizer).completed(prompts, completions), strict=True
    ):
        head, whole = plain(tokenizer, prompt), plain(tokenizer, prompt + completion)
        tail = [token for token in found.ids[found.first :] if token != tokenizer.eos_token_id]
        if whole[: len(head)] == head and decoded(tokenizer, whole).lstrip(" ") == (
            prompt + completion
        ).lstrip(" "):
            natural += 1
            assert tail == [
                token for token in whole[len(head) :] if token != tokenizer.eos_token_id
            ]
    assert natural > 50 or name not in EXACT


# -- what is said of rows --------------------------------------------------------------------------

LONG = [{"prompt": "a ", "completion": "fine film " * n} for n in (1, 30, 2, 40)]


def test_cut_rows_are_counted_dropped_or_refused(
    made: Callable[[str], Any], said: pytest.LogCaptureFixture
) -> None:
    tokenizer = made("byte-level")
    assert len(read(LONG, tokenizer, 20)) == 4
    assert (
        "2 of 4 training rows have more than 20 tokens (the first is row 2) and are cut"
        in said.text
    )
    said.clear()
    found = read(LONG, tokenizer, 20, truncation="drop")
    assert found.row_ids.tolist() == [1, 3]
    assert (
        "2 of 4 training rows have more than 20 tokens (the first is row 2) and are left out"
        in said.text
    )
    assert all(ids[-1] == tokenizer.eos_token_id for ids in tokens(found))
    with pytest.raises(
        RecipeError, match=r"row 2 has .* tokens, and max_seq_length is 20"
    ) as caught:
        read(LONG, tokenizer, 20, truncation="error")
    assert caught.value.problems[0].key == "data.truncation"
    said.clear()
    assert len(read(LONG, tokenizer, 2000, truncation="error")) == 4
    assert not said.records


@pytest.mark.parametrize("name", ["word piece", "unigram"])
def test_long_texts_of_a_classifier_are_counted_dropped_or_refused(
    name: str, made: Callable[[str], Any], said: pytest.LogCaptureFixture
) -> None:
    tokenizer = made(name)
    rows = [{"text": "a fine film " * n, "label": n % 2} for n in (1, 30, 2, 41)]
    found = read(rows, tokenizer, 20, task="sequence-classification")
    assert [len(ids) for ids in tokens(found)][1::2] == [20, 20]
    assert (
        tokens(found)[1] == tokenizer(rows[1]["text"], truncation=True, max_length=20)["input_ids"]
    )
    assert (
        "2 of 4 training rows have more than 20 tokens (the first is row 2) and are cut"
        in said.text
    )
    found = read(rows, tokenizer, 20, task="sequence-classification", truncation="drop")
    assert found.labels is not None
    assert (found.row_ids.tolist(), found.labels.tolist()) == ([1, 3], [1, 0])
    with pytest.raises(RecipeError, match="row 2 has"):
        read(rows, tokenizer, 20, task="sequence-classification", truncation="error")


def test_packed_text_has_no_rows_to_drop(made: Callable[[str], Any]) -> None:
    with pytest.raises(RecipeError, match="cut into pieces and loses nothing"):
        read([{"text": "a"}], made("byte-level"), truncation="drop")
    assert (
        len(
            read(
                [{"text": "a"}, {"text": "film " * 9}],
                made("byte-level"),
                8,
                truncation="drop",
                packing=False,
            )
        )
        == 1
    )


def test_special_tokens_in_columns_are_said_and_those_of_templates_are_not(
    made: Callable[[str], Any], said: pytest.LogCaptureFixture
) -> None:
    tokenizer = made("llama")
    rows = [{"q": "one", "a": "1"}, {"q": "two </s> three", "a": "2"}]
    read(rows, tokenizer, prompt="<s>Q: {q}", completion="{a}</s>")
    assert (
        "1 of 2 training rows (the first is row 2) hold text that the tokenizer reads as a special"
        " token" in said.text
    )
    said.clear()
    read(rows[:1] * 2, tokenizer, prompt="<s>Q: {q}", completion="{a}</s>")
    assert not said.records


def test_what_a_tokenizer_can_not_write_is_said(
    made: Callable[[str], Any], said: pytest.LogCaptureFixture
) -> None:
    read(
        [{"prompt": "a", "completion": "film"}, {"prompt": "a ", "completion": "film"}],
        made("word level"),
    )
    assert (
        "in 1 of 2 training rows (the first is row 1) the tokenizer can not write prompt and"
        " completion next to" in said.text
    )


LOST = "the text that is trained on is not that of the data: the tokenizer loses its "


@pytest.mark.parametrize("name", MAKES)
def test_what_a_tokenizer_loses_of_a_text_is_said_once(
    name: str, made: Callable[[str], Any], said: pytest.LogCaptureFixture
) -> None:
    data = Table.from_list(
        [{"text": line} for line in ("a fine film\n", "a\tdull one\n", "the film  was good\n") * 3]
    )
    spec = DataSpec(name_or_path="./data")
    chosen = choose(spec, "causal-lm", data.column_names)
    reader, rows = Reader(None, chosen, made(name), 64, lambda *_: None), Rows(data, data, True)
    reader.train(rows)
    reader.validation(rows)
    found = [record.message for record in said.records if record.message.startswith(LOST)]
    loses = name in ("unigram of words", "word piece") or name.startswith("word level")
    assert found == ([f"{LOST}line breaks, tabs, blanks in a row"] if loses else [])


def test_capitals_and_what_is_shown_of_many_losses(
    made: Callable[[str], Any], said: pytest.LogCaptureFixture
) -> None:
    read([{"text": "A Fine film, été"}], made("word piece"))
    assert f"{LOST}capital letters, 'é'" in said.text
    assert not lost_characters(made("word piece"), ["a film"])
    assert not lost_characters(made("word piece"), [])
    assert listed_lost(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_what_is_lost_at_the_beginning_of_a_text_alone_is_not_said(
    made: Callable[[str], Any],
) -> None:
    """Llama's tokenizer takes away a blank there, which its decoder gives back to a text without
    one."""
    code = "def f(x):\n    if x:\n        return x\n"
    tokenizer = made("llama")
    assert tokenizer.decode(tokenizer(code, add_special_tokens=False)["input_ids"]) == code
    for texts in ([code], ["  return x"], ["  return x", code], ["   ", "  film\n\n  film"]):
        assert lost_characters(tokenizer, texts) == []
    words = made("unigram of words")  # which loses them wherever they are
    assert lost_characters(words, [code]) == ["line breaks", "blanks in a row"]
    assert lost_characters(words, ["  a film\n\n  film"]) == ["line breaks", "blanks in a row"]


def test_of_thousands_of_characters_the_most_frequent_losses_are_found(
    made: Callable[[str], Any],
) -> None:
    rare = "".join(chr(0x4E00 + i) for i in range(1000))
    texts = [rare, *(f"A Fine film\n{i}" for i in range(20))]
    assert lost_characters(made("word piece"), texts) == ["capital letters", "line breaks"]


@pytest.mark.parametrize("name", MAKES)
def test_what_a_tokenizer_loses_of_prompts_and_completions_is_said_in_the_same_words(
    name: str, made: Callable[[str], Any], said: pytest.LogCaptureFixture
) -> None:
    rows = [{"q": "fine film", "a": "a dull  film"}, {"q": "warm film", "a": "a slow  film"}] * 3
    read(rows, made(name), prompt="the {q}\n", completion="{a}")
    found = [record.message for record in said.records if record.message.startswith(LOST)]
    loses = name in ("unigram of words", "word piece") or name.startswith("word level")
    assert found == ([f"{LOST}line breaks, blanks in a row"] if loses else [])


@pytest.mark.parametrize("packing", [True, False])
def test_unknown_tokens_are_counted(
    packing: bool, made: Callable[[str], Any], said: pytest.LogCaptureFixture
) -> None:
    tokenizer = made("word level")
    read([{"text": "a fine film"}, {"text": "a zebra film <unk> here"}], tokenizer, packing=packing)
    # 3 + 1 and 5 + 1 tokens; `zebra` and `here` are unknown, and <unk> is what is written.
    assert "2 of 10 training tokens (20.00%) are the tokenizer's unknown token" in said.text
    said.clear()
    read([{"text": "a fine film"}], tokenizer, packing=packing)
    assert "unknown" not in said.text
    tokenizer = byte_level()
    tokenizer.unk_token = tokenizer.eos_token  # as GPT-2's
    read([{"text": "a zebra"}], tokenizer, packing=packing)
    assert "unknown" not in said.text


def test_unknown_tokens_of_prompts_and_completions_are_counted(
    made: Callable[[str], Any], said: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "a fine ", "completion": "film"},
        {"prompt": "a zebra <unk> ", "completion": "here"},
    ]
    read(rows, made("word level"))
    # 3 + 1 and 4 + 1 tokens, the ends of the completions included.
    assert "2 of 9 training tokens (22.22%) are the tokenizer's unknown token" in said.text


def test_unknown_tokens_of_a_classifier_are_counted_and_nothing_else_is_said(
    made: Callable[[str], Any], said: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": "A Fine film\n", "label": "x"}, {"text": "a \u4e00 [UNK] film", "label": "y"}]
    examples = read(rows, made("word piece"), task="sequence-classification")
    share = f"1 of {len(examples.tokens)} training tokens"
    assert [
        record.message
        for record in said.records
        if share in record.message and "unknown token" in record.message
    ]
    assert LOST not in said.text
    said.clear()
    read(
        [rows[0], {"text": "a plot", "label": "y"}],
        made("word piece"),
        task="sequence-classification",
    )
    assert not said.records


def test_a_row_of_no_tokens_is_named_before_training(made: Callable[[str], Any]) -> None:
    rows = [{"text": "good", "label": 1}, {"text": "", "label": 0}]
    with pytest.raises(
        RecipeError, match="row 2 has no text in `text` that the tokenizer has a token for"
    ) as caught:
        read(rows, made("byte-level"), task="sequence-classification")
    assert caught.value.problems[0].key == "data.text_columns"
    # BERT reads [CLS] [SEP]
    assert len(read(rows, made("word piece"), task="sequence-classification")) == 2
    assert len(read(rows, made("llama"), task="sequence-classification")) == 2


def test_rows_of_a_classifier_without_text_are_counted(
    made: Callable[[str], Any],
    said: pytest.LogCaptureFixture,
) -> None:
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(["good", " \n", "bad", ""])]
    read(rows, made("word piece"), task="sequence-classification")
    assert "2 of 4 training rows (the first is row 2) have an empty text" in said.text
    said.clear()
    pairs = [{"sentence1": "good", "sentence2": "", "label": i % 2} for i in range(4)]
    read(pairs, made("word piece"), task="sequence-classification")  # half of a pair may be empty
    assert "empty" not in said.text


def test_a_token_without_an_embedding_is_named_before_training(made: Callable[[str], Any]) -> None:
    tokenizer = MAKES["byte-level"]()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    config = GPT2Config(vocab_size=rows)
    data = [{"prompt": "say ", "completion": "ok"}, {"prompt": "<tool> ", "completion": "ok"}]
    with pytest.raises(
        RecipeError, match=rf"row 2 has the token `<tool>` \(id {rows}\).* {rows} rows"
    ) as caught:
        read(data, tokenizer, config=config)
    assert caught.value.problems[0].key == "model.name_or_path"
    assert len(read(data, tokenizer, config=GPT2Config(vocab_size=rows + 1))) == 2


# -- classes that are read at the last end-of-sequence token ---------------------------------------

SIZES: dict[str, Any] = {
    "d_model": 32,
    "decoder_start_token_id": 2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def _bart(words: int) -> Any:
    heads = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    }
    sizes = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "max_position_embeddings": 64,
        "num_labels": 3,
    }
    return BartForSequenceClassification(BartConfig(vocab_size=words, **SIZES, **heads, **sizes))


def _t5(words: int) -> Any:
    sizes = {
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "num_labels": 3,
    }
    return T5ForSequenceClassification(T5Config(vocab_size=words, **SIZES, **sizes))


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("build", [_bart, _t5])
def test_texts_that_spell_the_end_out_are_classified_as_alone(
    build: Callable[[int], Any], pair: bool
) -> None:
    """BART and T5 refuse a batch whose rows have different numbers of end-of-sequence tokens."""
    tokenizer = unigram() if build is _t5 else llama(f"{BOS} $A {EOS}", legacy=False)
    torch.manual_seed(0)
    model = build(len(tokenizer)).eval()
    texts = ["a fine film", "a </s> dull one", "42 </s></s>", "x", "warm </s>"]
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(texts)]
    keys: dict[str, Any] = {}
    if pair:
        rows = [row | {"other": text} for row, text in zip(rows, texts[::-1], strict=True)]
        keys = {"text_columns": ["text", "other"]}
    found = read(rows, tokenizer, config=model.config, task="sequence-classification", **keys)
    batch = collate(found, np.arange(len(rows)), 0)
    together, _ = TaskModel(model, tokenizer, task_named("sequence-classification"), []).row_losses(
        batch
    )
    with torch.inference_mode():
        for row, ids in enumerate(tokens(found)):
            assert (
                ids
                == tokenizer(*[rows[row][name] for name in keys.get("text_columns", ["text"])])[
                    "input_ids"
                ]
            )
            alone = model(
                input_ids=torch.tensor([ids]), labels=torch.tensor([rows[row]["label"]])
            ).loss
            torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


def test_a_text_without_the_token_that_a_class_is_read_at_is_refused() -> None:
    tokenizer = llama()
    rows = [{"text": "fine</s>", "label": 1}, {"text": "dull", "label": 0}]
    with pytest.raises(
        RecipeError, match=r"row 2 has no `</s>` \(id 2\), at which the model reads the class"
    ):
        read(rows, tokenizer, config=_bart(len(tokenizer)).config, task="sequence-classification")


# -- whole runs ------------------------------------------------------------------------------------

CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}{%"
    " endfor %} [answer]"
)


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama whose tokenizer begins a text and puts a blank in front."""
    folder, tokenizer = tmp_path_factory.mktemp("small"), llama()
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(folder: Path, model: Path, rows: list[dict[str, Any]], more: str = "") -> Path:
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "validation.jsonl", rows)
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{name_or_path: {model}, task: causal-lm}}\ndata: {{name_or_path:"
        f" {folder}{more}}}\nmethod: {{name: vanilla, r: 2}}\ntrain: {{max_steps: 1, precision:"
        f" fp32, eval_on_start: true, learning_rate: 1e-9}}\noutput_dir: {folder / 'run'}\n"
    )
    return path


def test_a_run_trains_and_answers_with_one_beginning(
    small_llama: Path, tmp_path: Path, call: Call
) -> None:
    """The loss before the first step is that of plain transformers on `<s>Q:…</s>`."""
    rows = [{"q": f"{a}+1=", "a": str(a + 1)} for a in range(4)]
    path = recipe(tmp_path, small_llama, rows, ", prompt: '<s>Q: {q}', completion: '{a}'")
    call("train", path)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(small_llama), llama()
    total = count = 0.0
    for row in rows:
        prompt = plain(tokenizer, f"<s>Q: {row['q']}")
        answer = [*(plain(tokenizer, f"<s>Q: {row['q']}{row['a']}")[len(prompt) :]), 2]
        assert prompt.count(1) == 1
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.inference_mode():
            total += float(model(torch.tensor([prompt + answer]), labels=labels).loss) * len(answer)
        count += len(answer)
    first = next(line["eval_loss"] for line in lines if "eval_loss" in line)
    assert first == pytest.approx(total / count, rel=1e-5)
    for prompt, options in (("<s>what", []), ("what", []), ("what", ["--chat"])):
        found = json.loads(
            call(
                "generate",
                tmp_path / "run",
                "--prompt",
                prompt,
                "--max-new-tokens",
                2,
                "--json",
                *options,
            )
        )
        text = "<s>[user] what [answer]" if options else "<s>what"
        assert found["texts"][0]["prompt_tokens"] == len(plain(tokenizer, text))
