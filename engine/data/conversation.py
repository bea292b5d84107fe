"""Conversations about an image, as VL-Vicuna is tuned on in its third stage (arXiv 2305.01278, after MiniGPT-4, arXiv 2304.10592).

    [bos]###Human: <visual> {instruction} ###Assistant: {answer}###

The text before and after the visual tokens and the answer are tokenised apart, as in the authors' code.  Only the answer and the `###`
that closes it are targets.  A later turn of a chat goes on with `Human: {question} ###Assistant: {answer}###`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..recipe import ImageData
from .coco import CaptionSet
from .images import sample_rng
from .packing import CaptionData
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


class Framer:
    """Token ids of one `data` entry's images in its style, and what stands before the visual tokens.

    `max_text_tokens` is `data.max_text_tokens`, for plain captions.  The instruction of an answer depends on `seed`, its image's id and
    its number only.  Raises DataError when the language model cannot take conversations.
    """

    def __init__(self, entry: ImageData, llm: LanguageModel, max_text_tokens: int, seed: int):
        self.llm, self._seed = llm, seed
        self.is_conversation = entry.style == "conversation"
        if not self.is_conversation:
            self.lead: tuple[int, ...] = ()
            self._limit = entry.max_text_tokens or max_text_tokens
            return
        if fault := conversation_fault(llm):
            raise DataError(
                f"data, set {entry.name!r}, style: expected caption for {llm.path!r}, got conversation: {fault}; "
                "set style to caption, or choose another target.llm"
            )
        self.lead = lead_ids(llm)
        self._limit = entry.max_text_tokens or MAX_ANSWER_TOKENS
        self._questions = [question_ids(llm, text.strip()) for text in entry.instructions or INSTRUCTIONS]

    def __call__(self, records: Sequence) -> tuple[list[list[list[int]]], list[list[int]] | None]:
        """Ids of every caption of each image; for conversations also how many of them are the question's."""
        if not self.is_conversation:
            ids = iter(self.llm.all_caption_ids([c for r in records for c in r.captions], self._limit))
            return [[next(ids) for _ in r.captions] for r in records], None
        framed, counts = [], []
        for record in records:
            rng = sample_rng(self._seed, 0, f"instruction/{record.image_id}")
            asked = [self._questions[rng.integers(len(self._questions))] for _ in record.captions]
            answers = [answer_ids(self.llm, a.strip(), self._limit) for a in record.captions]
            framed.append([q + a for q, a in zip(asked, answers, strict=True)])
            counts.append([len(q) for q in asked])
        return framed, counts

    @property
    def vocabulary(self) -> int:
        return len(self.llm.tokenizer)

    def settings(self) -> dict[str, Any]:
        """All that the ids depend on besides the text: two framers with equal settings give equal ids."""
        probe = "A probe: two dogs, 3 cats & a \u00fc"
        text = json.dumps(
            [
                self.llm.text_ids(probe),
                self.llm.caption_ids(probe, 1000),
                sorted(self.llm.tokenizer.get_vocab().items()),
            ]
        )
        settings = {"limit": self._limit, "lead": self.lead, "tokenizer": hashlib.sha256(text.encode()).hexdigest()}
        return {**settings, "questions": self._questions, "seed": self._seed} if self.is_conversation else settings


def tokenize_entry(
    entry: ImageData, captions: CaptionSet, llm: LanguageModel, max_text_tokens: int, seed: int
) -> CaptionData:
    """Token ids of a recipe's `data` entry in its style, in lists; arguments and errors as in `Framer`."""
    framer = Framer(entry, llm, max_text_tokens, seed)
    ids, questions = framer(captions.records)
    if questions is None:
        return CaptionData(captions.name, captions.records, ids)
    leads = dict.fromkeys(range(len(ids)), framer.lead)
    return CaptionData(captions.name, captions.records, ids, leads, dict(enumerate(questions)))
