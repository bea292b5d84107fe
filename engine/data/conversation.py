"""Conversations about an image, as VL-Vicuna is tuned on in its third stage (arXiv 2305.01278, after MiniGPT-4, arXiv 2304.10592).

    [bos]###Human: <visual> {instruction} ###Assistant: {answer}###

The text before and after the visual tokens and the answer are tokenised apart, as in the authors' code.  Only the answer and the `###`
that closes it are targets.  A later turn of a chat goes on with `Human: {question} ###Assistant: {answer}###`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..recipe import ImageData
from .coco import CaptionSet
from .images import sample_rng
from .packing import CaptionData, tokenize
from .reading import DataError

if TYPE_CHECKING:
    from ..models.llm import LanguageModel

END = "###"
BEFORE_IMAGE = "###Human: "
AFTER_IMAGE = " {} ###Assistant: "
NEXT_TURN = "Human: {} ###Assistant: "
MAX_ANSWER_TOKENS = 160  # the authors' max_txt_len, which counts the closing ###
INSTRUCTIONS = (
    "Tell me what this picture shows, with its details.",
    "What can be seen here? Go through the image carefully.",
    "Please write a detailed account of this photo.",
    "Can you explain to me what is in the image?",
)


def lead_ids(llm: LanguageModel) -> tuple[int, ...]:
    """BOS and the text before the visual tokens."""
    return (llm.special.bos, *llm.text_ids(BEFORE_IMAGE))


def question_ids(llm: LanguageModel, question: str, is_first: bool = True) -> list[int]:
    """Ids of a question up to where its answer starts; the first one follows the visual tokens, others an answer's `###`."""
    return llm.text_ids((AFTER_IMAGE if is_first else NEXT_TURN).format(question))


def answer_ids(llm: LanguageModel, answer: str, max_tokens: int | None = None) -> list[int]:
    """Ids of an answer and its `###`, cut to `max_tokens`; a cut answer has no `###`, since it does not end there."""
    return llm.text_ids(answer + END)[:max_tokens]


def conversation_fault(llm: LanguageModel) -> str | None:
    """Why a language model cannot be tuned on conversations or chat; None where it can."""
    if llm.is_encoder_decoder:
        return "it is an encoder-decoder, and conversations are packed for decoder-only models"
    unknown = llm.tokenizer.unk_token_id
    if unknown is not None and unknown in llm.text_ids(END):
        return f"its tokenizer has no token for the {END!r} that ends a turn"
    return None


def tokenize_entry(
    entry: ImageData, captions: CaptionSet, llm: LanguageModel, max_text_tokens: int, seed: int
) -> CaptionData:
    """Token ids of a recipe's `data` entry in its style; `max_text_tokens` is `data.max_text_tokens`, for plain captions.

    The instruction of an answer depends on `seed`, its image's id and its number only.
    Raises DataError when the language model cannot take conversations.
    """
    if entry.style == "caption":
        return tokenize(captions, llm, entry.max_text_tokens or max_text_tokens)
    if fault := conversation_fault(llm):
        raise DataError(
            f"data, set {entry.name!r}, style: expected caption for {llm.path!r}, got conversation: {fault}; "
            "set style to caption, or choose another target.llm"
        )
    questions = [question_ids(llm, text.strip()) for text in entry.instructions or INSTRUCTIONS]
    limit = entry.max_text_tokens or MAX_ANSWER_TOKENS
    ids: list[list[list[int]]] = []
    unsupervised: dict[int, list[int]] = {}
    for image, record in enumerate(captions.records):
        rng = sample_rng(seed, 0, f"instruction/{record.image_id}")
        asked = [questions[rng.integers(len(questions))] for _ in record.captions]
        ids.append([q + answer_ids(llm, a.strip(), limit) for q, a in zip(asked, record.captions, strict=True)])
        unsupervised[image] = [len(q) for q in asked]
    lead = lead_ids(llm)
    return CaptionData(captions.name, captions.records, ids, dict.fromkeys(range(len(ids)), lead), unsupervised)
