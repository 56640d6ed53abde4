"""Metrics of generated answers against accepted ones: exact match and F1 as SQuAD counts them, and
BLEU.

Every metric takes answers [questions] and the references of each [questions][at least one], both
texts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from lorakit.errors import UsageError

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], float]

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of the answers that are one of their references once both are normalised; 0 to 1.

    Rajpurkar et al., arXiv 1606.05250, section 6.1; normalisation as in their evaluation script.
    """
    return _mean_of_best(
        lambda answer, reference: float(normalised(answer) == normalised(reference)),
        answers,
        references,
    )


def f1(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over the answers of the best F1 of answer and reference as bags of words, normalised; 0
    to 1.

    Rajpurkar et al., arXiv 1606.05250, section 6.1. Where one of the two has no words left (a
    reference "A"), they agree or not, as in the script of SQuAD 2.0 (arXiv 1806.03822); the first
    script gave 0 even to a right answer.
    """
    return _mean_of_best(_words_f1, answers, references)


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of sacrebleu with its defaults (tokenizer 13a, case counts, exponential
    smoothing); 0 to 100.

    Papineni et al., ACL 2002; Post, arXiv 1804.08771. Questions may have different numbers of
    references. Raises UsageError when sacrebleu is not installed.
    """
    most = max(map(len, references))
    # sacrebleu wants the first reference of every answer, then the second …, with None where there
    # are fewer.
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    return float(_sacrebleu().corpus_bleu(list(answers), streams).score)


METRICS: dict[str, Metric] = {"exact_match": exact_match, "f1": f1, "bleu": bleu}
DEFAULT_METRICS = ("exact_match", "f1")


def choose_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """{name: metric} in the order of `names`. Raises UsageError for a name that there is not, and
    for what is not installed."""
    for name in names:
        if name not in METRICS:
            near = get_close_matches(name, METRICS, 1)
            remedy = f"Did you mean `{near[0]}`? " if near else ""
            raise UsageError(
                f"there is no metric `{name}`",
                f"{remedy}Metrics of answers are {', '.join(METRICS)}.",
            )
    if "bleu" in names:
        _sacrebleu()  # better told now than after an hour of generation
    return {name: METRICS[name] for name in names}


def normalised(text: str) -> str:
    """`text` in lower case, without ASCII punctuation and English articles, its words one space
    apart."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def _words_f1(answer: str, reference: str) -> float:
    given, expected = Counter(normalised(answer).split()), Counter(normalised(reference).split())
    if not given or not expected:
        return float(given == expected)
    return 2 * (given & expected).total() / (given.total() + expected.total())


def _mean_of_best(
    score: Callable[[str, str], float], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    best = [
        max(score(answer, text) for text in texts)
        for answer, texts in zip(answers, references, strict=True)
    ]
    return sum(best) / len(best)


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise UsageError(
            "the metric `bleu` needs sacrebleu", 'Install it with `pip install "lorakit[eval]"`.'
        ) from error
    return sacrebleu
