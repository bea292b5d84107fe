"""CIDEr-D of captions, equal to the official coco-caption tool's number.

CIDEr-D (Vedantam, Zitnick, Parikh 2015, "CIDEr: Consensus-based Image Description Evaluation") compares the n-grams of
a candidate with those of each reference by a clipped cosine of tf-idf vectors, n = 1 to 4. What the official tool does
beyond the paper, and this does too: term frequency is the plain count; the document frequency counts the images of the
evaluated set in whose references an n-gram occurs, and is at least 1; the length penalty, a Gaussian of sigma 6, uses
the number of *bigrams*; the mean over n and references is multiplied by 10.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from .ptb_tokenizer import ptb_tokenize

K = TypeVar("K")
Ngram = tuple[str, ...]

LONGEST_NGRAM = 4
LENGTH_SIGMA = 6.0


def cider(
    references: Mapping[K, Sequence[str]], candidates: Mapping[K, str], tokenized: bool = False
) -> tuple[float, dict[K, float]]:
    """CIDEr-D over a set: (mean over images, per-image scores), on the scale where 1.0 is printed as "100" in papers.

    references: image id -> its captions, at least one each; candidates: image id -> one caption, the same ids.
    tokenized: the captions are already tokens joined by spaces; otherwise `ptb_tokenize` splits them.

    The score depends on the evaluated set, through its document frequencies: with a single image every idf is
    log(1 / 1) = 0 and so is the score.

    Raises ValueError for ids that do not match, an empty set or an image without references, and TypeError for
    captions that are not strings.
    """
    check_caption_sets(references, candidates)
    split = caption_splitter(tokenized)
    reference_counts = {image: [_ngram_counts(split(text)) for text in references[image]] for image in candidates}
    document_frequency: Counter[Ngram] = Counter()
    for counts in reference_counts.values():
        document_frequency.update(set().union(*counts))
    log_images = math.log(len(reference_counts))
    idf = {ngram: log_images - math.log(images) for ngram, images in document_frequency.items()}

    scores = {}
    for image, text in candidates.items():
        candidate = _TfIdf(_ngram_counts(split(text)), idf, log_images)
        similarities = [_similarity(candidate, _TfIdf(r, idf, log_images)) for r in reference_counts[image]]
        scores[image] = 10.0 * math.fsum(similarities) / len(similarities)
    return math.fsum(scores.values()) / len(scores), scores


class _TfIdf:
    """Tf-idf weights of one caption, its norm for each n, and its length in bigrams."""

    def __init__(self, counts: Counter[Ngram], idf: Mapping[Ngram, float], unseen_idf: float) -> None:
        self.weights: list[dict[Ngram, float]] = [{} for _ in range(LONGEST_NGRAM)]
        squares = [0.0] * LONGEST_NGRAM
        self.bigrams = 0
        for ngram, count in counts.items():
            order = len(ngram) - 1
            weight = count * idf.get(ngram, unseen_idf)
            self.weights[order][ngram] = weight
            squares[order] += weight * weight
            if order == 1:
                self.bigrams += count
        self.norms = [math.sqrt(square) for square in squares]


def _similarity(candidate: _TfIdf, reference: _TfIdf) -> float:
    """Clipped cosine, averaged over n, times the length penalty."""
    total = 0.0
    for order in range(LONGEST_NGRAM):
        norm = candidate.norms[order] * reference.norms[order]
        if norm == 0.0:
            continue
        weights = reference.weights[order]
        dot = 0.0
        for ngram, weight in candidate.weights[order].items():
            other = weights.get(ngram)
            if other is not None:
                dot += min(weight, other) * other
        total += dot / norm
    difference = candidate.bigrams - reference.bigrams
    return total / LONGEST_NGRAM * math.exp(-(difference * difference) / (2.0 * LENGTH_SIGMA * LENGTH_SIGMA))


def _ngram_counts(words: Sequence[str]) -> Counter[Ngram]:
    counts: Counter[Ngram] = Counter()
    for n in range(1, LONGEST_NGRAM + 1):
        counts.update(zip(*(words[start:] for start in range(n)), strict=False))
    return counts


def caption_splitter(tokenized: bool) -> Callable[[str], list[str]]:
    """The words that CIDEr and BLEU count: tokens, split again at the no-break spaces that a token may hold."""
    if tokenized:
        return str.split
    return lambda text: " ".join(ptb_tokenize(text)).split()


def check_caption_sets(references: Mapping[K, Sequence[str]], candidates: Mapping[K, str]) -> None:
    """Refuse what cannot be scored, naming the ids.

    Raises ValueError or TypeError, as `cider` says.
    """
    missing = [image for image in references if image not in candidates]
    if missing:
        raise ValueError(
            f"candidates: {_some(missing)} of {len(references)} images with references have no caption; "
            "caption them, or score a subset by passing only its references"
        )
    extra = [image for image in candidates if image not in references]
    if extra:
        raise ValueError(f"references: {_some(extra)} have a candidate but no references; drop them or add references")
    if not references:
        raise ValueError("references: expected at least one image, got an empty set; nothing can be scored")
    for image, captions in references.items():
        is_list = isinstance(captions, Sequence) and not isinstance(captions, str)
        if not is_list or not all(isinstance(caption, str) for caption in captions):
            raise TypeError(
                f"references[{image!r}]: expected a list of caption strings, got {repr(captions)[:80]}; "
                "wrap a single caption in a list, and drop what is not text"
            )
        if not captions:
            raise ValueError(f"references[{image!r}]: expected at least one caption, got none; drop the image")
    for image, caption in candidates.items():
        if not isinstance(caption, str):
            raise TypeError(
                f"candidates[{image!r}]: expected one caption string, got {type(caption).__name__}; "
                "unwrap lists before scoring"
            )


def _some(ids: Sequence[object]) -> str:
    shown = ", ".join(repr(one) for one in ids[:5])
    return f"{len(ids)} ({shown}{', …' if len(ids) > 5 else ''})"
