"""Lemmatised predictions, as the authors' OK-VQA evaluation scores them.

The annotators' answers of OK-VQA are lemmatised; a model's `surfers` would miss their `surfer`. The reference (LAVIS,
BLIP-2's zero-shot evaluation) runs spaCy's `en_core_web_sm` over each predicted answer and puts the lemma in place of
every noun and verb; the other tokens stay, all joined by single spaces. The VQA accuracy is then the official one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from .files import Id, ScoreError
from .record import library_versions

SPACY_MODEL = "en_core_web_sm"
LEMMATISED = ("NOUN", "VERB")


def lemmatiser_unsupported_reason() -> str | None:
    """Why answers cannot be lemmatised here, with the remedy; None where they can. Imports nothing."""
    if importlib.util.find_spec("spacy") is None:
        return f"spaCy is not installed; run: pip install spacy && python -m spacy download {SPACY_MODEL}"
    if importlib.util.find_spec(SPACY_MODEL) is None:
        return f"spaCy's model {SPACY_MODEL} is not installed; run: python -m spacy download {SPACY_MODEL}"
    return None


def load_lemmatiser() -> tuple[Any, str]:
    """(spaCy's pipeline, what it is: versions and the lemmatised parts of speech).

    Raises ScoreError with the remedy when spaCy or its model is missing or does not load.
    """
    reason = lemmatiser_unsupported_reason()
    if reason is not None:
        raise ScoreError(f"--lemmatise: {reason}; or leave --lemmatise out")
    try:
        import spacy

        pipeline = spacy.load(SPACY_MODEL)
    except Exception as error:  # a spaCy built for another numpy, a model for another spaCy: many types
        raise ScoreError(
            f"--lemmatise: spaCy's {SPACY_MODEL} does not load ({type(error).__name__}: {error}); "
            f"run: python -m spacy download {SPACY_MODEL}"
        ) from error
    versions = library_versions(("spacy", SPACY_MODEL))
    return pipeline, f"spacy {versions['spacy']}, {SPACY_MODEL} {versions[SPACY_MODEL]}: {' and '.join(LEMMATISED)}"


def lemmatise(answers: Mapping[Id, str], pipeline: Any) -> dict[Id, str]:
    """Question id -> answer with the lemma in place of each noun and verb, tokens joined by single spaces."""
    lemmatised = {
        answer: " ".join(token.lemma_ if token.pos_ in LEMMATISED else token.text for token in pipeline(answer))
        for answer in set(answers.values())
    }
    return {question: lemmatised[answer] for question, answer in answers.items()}
