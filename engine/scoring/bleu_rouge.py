"""BLEU-1 to BLEU-4 and ROUGE-L of captions, equal to the official coco-caption tool's numbers.

BLEU (Papineni et al. 2002) in the tool's form: clipped n-gram matches and lengths are summed over the whole set; the
reference length of an image is the one closest to the candidate's (the shorter of two equally close); 1e-15 is added
to every numerator and 1e-9 to every denominator, so per-image values differ from exact fractions in the tenth digit.

ROUGE-L (Lin 2004) in the tool's form: the best precision and the best recall of the longest common subsequence, each
over the references on its own, joined in an F-measure with beta 1.2, averaged over images. The tool splits at single
spaces here, so an empty caption counts as one empty word, and equals another empty caption.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

from .cider import caption_splitter, check_caption_sets
from .ptb_tokenizer import ptb_tokenize

K = TypeVar("K")

LONGEST_NGRAM = 4
ROUGE_BETA = 1.2
_TINY = 1e-15
_SMALL = 1e-9


def bleu(
    references: Mapping[K, Sequence[str]], candidates: Mapping[K, str], tokenized: bool = False
) -> tuple[tuple[float, float, float, float], dict[K, tuple[float, float, float, float]]]:
    """(BLEU-1..4 of the set, BLEU-1..4 of each image); arguments and errors as `cider`."""
    check_caption_sets(references, candidates)
    split = caption_splitter(tokenized)
    total_matches, total_guesses = [0] * LONGEST_NGRAM, [0] * LONGEST_NGRAM
    total_length, total_reference_length = 0, 0
    per_image = {}
    for image, text in candidates.items():
        words = split(text)
        reference_words = [split(reference) for reference in references[image]]
        matches, guesses = _clipped_matches(words, reference_words)
        reference_length = min((abs(len(r) - len(words)), len(r)) for r in reference_words)[1]
        per_image[image] = _bleu_scores(matches, guesses, len(words), reference_length)
        for order in range(LONGEST_NGRAM):
            total_matches[order] += matches[order]
            total_guesses[order] += guesses[order]
        total_length += len(words)
        total_reference_length += reference_length
    return _bleu_scores(total_matches, total_guesses, total_length, total_reference_length), per_image


def rouge_l(
    references: Mapping[K, Sequence[str]], candidates: Mapping[K, str], tokenized: bool = False
) -> tuple[float, dict[K, float]]:
    """(mean ROUGE-L, per-image values); arguments and errors as `cider`."""
    check_caption_sets(references, candidates)

    def split(text: str) -> list[str]:
        return (text if tokenized else " ".join(ptb_tokenize(text))).split(" ")

    scores = {}
    for image, text in candidates.items():
        words = split(text)
        precision = recall = 0.0
        for reference in references[image]:
            reference_words = split(reference)
            common = _common_subsequence_length(words, reference_words)
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(reference_words))
        scores[image] = 0.0
        if precision and recall:
            scores[image] = (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)
    return math.fsum(scores.values()) / len(scores), scores


def _bleu_scores(
    matches: Sequence[int], guesses: Sequence[int], length: int, reference_length: int
) -> tuple[float, float, float, float]:
    ratio = (length + _TINY) / (reference_length + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for order in range(LONGEST_NGRAM):
        product *= (matches[order] + _TINY) / (guesses[order] + _SMALL)
        scores.append(product ** (1 / (order + 1)) * penalty)
    return scores[0], scores[1], scores[2], scores[3]


def _clipped_matches(words: list[str], reference_words: list[list[str]]) -> tuple[list[int], list[int]]:
    """For n = 1..4: n-grams of `words` found in a reference, each at most as often as in one; and all there are."""
    matches, guesses = [], []
    for n in range(1, LONGEST_NGRAM + 1):
        most: Counter[tuple[str, ...]] = Counter()
        for reference in reference_words:
            most |= _ngrams(reference, n)
        counts = _ngrams(words, n)
        matches.append(sum(min(count, most[ngram]) for ngram, count in counts.items()))
        guesses.append(max(0, len(words) - n + 1))
    return matches, guesses


def _ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _common_subsequence_length(first: list[str], second: list[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]
