"""Chat templates of the usual makes, each beside a writer in Python that knows which part of a
conversation the assistant writes; and conversations for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.support.tokenizers import byte_level

Messages = Sequence[dict[str, Any]]
Part = tuple[str, bool]
"""A part of a text, and whether the assistant writes it."""

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] +"
    " '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] +"
    " '\\n\\n' %}{% set turns = messages[1:] %}{% else %}{% set first = '' %}"
    "{% set turns = messages %}{% endif %}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' +"
    " (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content']"
    " + '\\n\\n' %}{% set turns = messages[1:] %}{% else %}{% set system = '' %}"
    "{% set turns = messages %}{% endif %}{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') +"
    " message['content'] + '[/INST]' }}{% else %}"
    "{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
# No token ends a turn.
PLAIN = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Qwen 3's: thinking is left out of all answers but those after the last question, which have at
# least an empty block.
THINKING = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
    "{%- if m.role != 'assistant' %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- else %}"
    "{%- set content = m.content %}{%- set thought = '' %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}{%- if loop.index0 > ns.last %}"
    "{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
]


def chat_tokenizer(template: str | None = CHATML) -> Any:
    """A byte-level tokenizer that begins every text, with the special tokens of all templates."""
    tokenizer = byte_level("<s> $A")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


def write_chatml(messages: Messages) -> Iterator[Part]:
    for m in messages:
        by = m["role"] == "assistant"
        yield f"<|im_start|>{m['role']}\n", False
        yield m["content"] + "<|im_end|>", by
        yield "\n", False


def write_llama_3(messages: Messages) -> Iterator[Part]:
    yield "<s>", False
    for m in messages:
        yield f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False
        yield m["content"].strip() + "<|eot_id|>", m["role"] == "assistant"


def _folded(messages: Messages) -> Messages:
    """The system message in front of the first question."""
    if messages[0]["role"] != "system":
        return messages
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def write_gemma(messages: Messages) -> Iterator[Part]:
    yield "<s>", False
    for m in _folded([m | {"content": m["content"].strip()} for m in messages]):
        by = m["role"] == "assistant"
        yield f"<start_of_turn>{'model' if by else 'user'}\n", False
        yield m["content"] + "<end_of_turn>", by
        yield "\n", False


def write_mistral(messages: Messages) -> Iterator[Part]:
    yield "<s>", False
    for m in _folded(messages):
        if m["role"] == "user":
            yield f"[INST] {m['content']}[/INST]", False
        else:
            yield f" {m['content'].strip()}</s>", True


def write_plain(messages: Messages) -> Iterator[Part]:
    """Where no token ends a turn, its line does, and the end-of-sequence token ends the last."""
    for m in messages:
        by = m["role"] == "assistant"
        yield m["role"].upper() + ":", False
        yield f" {m['content']}\n", by
    if messages[-1]["role"] == "assistant":
        yield "</s>", True


WRITERS: dict[str, tuple[str, Callable[[Messages], Iterator[Part]]]] = {
    "chatml": (CHATML, write_chatml),
    "llama-3": (LLAMA_3, write_llama_3),
    "gemma": (GEMMA, write_gemma),
    "mistral": (MISTRAL, write_mistral),
    "no end of turn": (PLAIN, write_plain),
}
WORDS = (
    *("the film", "was", "good.", "How many", "hens?", "17", "naïve", "今日は", "🎬🍿", "x"),
    *("<b>bold</b>", "def f(x):\n    return x", "assistant", "ASSISTANT:", "user\n", "1. a\n2. b"),
    *("{{ braces }}", "{% if %}", "'quotes'", "\ttab"),
)


def conversations(number: int = 60) -> list[list[dict[str, Any]]]:
    """Seeded conversations: one to five turns, with and without a system message, of one word to
    many, some with the same answer twice, and some that end in a question."""
    rng = random.Random(0)

    def text() -> str:
        found = " ".join(rng.choices(WORDS, k=rng.choice((1, 2, 5, 12))))
        return rng.choice(("", "", " ", "\n")) + found + rng.choice(("", "", " ", "\n\n"))

    found = []
    for _ in range(number):
        messages: list[dict[str, Any]] = []
        if rng.random() < 0.4:
            messages.append({"role": "system", "content": text().strip()})
        for _ in range(rng.randint(1, 5)):
            messages.append({"role": "user", "content": text()})
            messages.append({"role": "assistant", "content": text()})
        if rng.random() < 0.2:
            messages[-1]["content"] = messages[-2]["content"]
        if rng.random() < 0.1 and len(messages) > 3:
            messages.append({"role": "user", "content": text()})
        found.append(messages)
    return found


def ids_and_targets(tokenizer: Any, parts: Iterator[Part]) -> tuple[list[int], list[bool]]:
    """The tokens of a text in parts, and which of them hold a character of the assistant's, by the
    characters that the Rust library says a token stands for."""
    text, by = "", list[bool]()
    for part, whose in parts:
        text += part
        by += [whose] * len(part)
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, [any(by[start:end]) for start, end in encoding.offsets]
