"""Metrics of answers: by hand where SQuAD's rules matter, by their properties, and BLEU by its
definition."""

from __future__ import annotations

import builtins
import math
import random
from collections import Counter
from typing import Any

import pytest

from lorakit.errors import UsageError
from lorakit.training.answer_metrics import (
    METRICS,
    bleu,
    choose_metrics,
    exact_match,
    f1,
    normalised,
)

WORDS = ["the", "hens", "lay", "two", "eggs", "a", "day", "in", "boxes", "of", "six"]


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 12))) for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Panthers' defense.", "panthers defense"),
        (" an\tapple\n", "apple"),
        ("Theatre, Anatomy and A.I.", "theatre anatomy and ai"),
        ("$3.5 (million)", "35 million"),
        ("the-end", "theend"),  # punctuation goes before articles, as in the script
        ("a the An", ""),
        ("„Größe“ ½", "„größe“ ½"),  # ASCII punctuation alone
    ],
)
def test_answers_are_normalised_as_by_squads_script(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_exact_match_takes_the_best_reference_and_the_mean_of_the_answers() -> None:
    answers = ["The Broncos.", "24–10", "Denver", "levi's stadium"]
    references = [
        ["broncos", "Denver Broncos"],
        ["24 10"],
        ["Broncos", "Panthers"],
        ["in Levi's Stadium", "Levis stadium"],
    ]
    assert exact_match(answers, references) == 2 / 4


def test_f1_counts_words_that_answer_and_reference_share() -> None:
    # 2 of 3 words given are right, 2 of 2 expected are there; of the other reference none.
    assert f1(["Denver Broncos team"], [["Panthers", "the Denver Broncos"]]) == pytest.approx(
        2 * (2 / 3) * 1 / (2 / 3 + 1)
    )
    assert f1(["no no yes"], [["no yes yes"]]) == pytest.approx(2 / 3)  # a bag of words, not a set
    assert f1(["x y", "z"], [["x y"], ["q"]]) == 1 / 2
    assert f1(["A", "an A b", ""], [["a"], ["The"], ["x"]]) == pytest.approx(1 / 3)


def test_an_exact_match_has_an_f1_of_1_and_metrics_stay_within_their_range() -> None:
    rng = random.Random(0)
    answers = ["", "the", *sentences(60, 1)]
    references = [[rng.choice(answers) for _ in range(rng.randint(1, 4))] for _ in answers]
    for answer, accepted in zip(answers, references, strict=True):
        exact, words = exact_match([answer], [accepted]), f1([answer], [accepted])
        assert exact in (0, 1)
        assert exact <= words <= 1
        assert (
            exact_match([answer], [[*accepted, answer]]) == f1([answer], [[*accepted, answer]]) == 1
        )


def corpus_bleu(answers: list[str], references: list[list[str]]) -> float:
    """BLEU-4 as Papineni et al. define it, over words parted by spaces; every order has a match."""
    matches, totals, length, closest = [0] * 4, [0] * 4, 0, 0
    for answer, accepted in zip(answers, references, strict=True):
        words, others = answer.split(), [text.split() for text in accepted]
        length += len(words)
        closest += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        for order in range(4):
            given, *allowed = (
                Counter(zip(*(text[i:] for i in range(order + 1)), strict=False))
                for text in [words, *others]
            )
            most = Counter[Any]()
            for grams in allowed:
                most |= grams
            matches[order] += (given & most).total()
            totals[order] += given.total()
    penalty = min(1.0, math.exp(1 - closest / length))
    return (
        100
        * penalty
        * math.exp(sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / 4)
    )


def test_bleu_is_that_of_the_paper_with_any_number_of_references_a_question() -> None:
    pytest.importorskip("sacrebleu")
    rng = random.Random(3)
    answers, pool = sentences(40, 5), sentences(90, 4)
    references = [
        [
            *rng.sample(pool, rng.randint(0, 3)),
            " ".join(text.split()[:-1] + ["six"] * rng.randint(0, 2)),
        ]
        for text in answers
    ]
    assert len(set(map(len, references))) > 1
    assert bleu(answers, references) == pytest.approx(corpus_bleu(answers, references), abs=1e-6)
    assert bleu(answers, [[text] for text in answers]) == pytest.approx(100)
    assert bleu(answers, [[*texts, texts[0]] for texts in references]) == pytest.approx(
        bleu(answers, references)
    )
    # the brevity penalty
    assert bleu([text.split()[0] for text in answers], [[text] for text in answers]) < 5


def test_metrics_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(choose_metrics(["f1", "exact_match"])) == ["f1", "exact_match"]
    with pytest.raises(UsageError, match="Did you mean `exact_match`"):
        choose_metrics(["f1", "exact_mach"])
    with pytest.raises(UsageError, match=", ".join(METRICS)):
        choose_metrics(["perplexity"])

    real = builtins.__import__

    def without_sacrebleu(name: str, *arguments: Any, **keys: Any) -> Any:
        if name == "sacrebleu":
            raise ImportError(name)
        return real(name, *arguments, **keys)

    monkeypatch.setattr(builtins, "__import__", without_sacrebleu)
    with pytest.raises(UsageError, match=r'pip install "lorakit\[eval\]"'):
        choose_metrics(["bleu"])
    assert choose_metrics(["f1"])
