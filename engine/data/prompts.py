"""Text prompts of each task, as the reference evaluates with them (BLIP-2, arXiv 2301.12597, and LAVIS's configurations).

The prompt follows the visual tokens. Training on captions and captioning use none.
"""

from __future__ import annotations

CAPTION_PROMPT = ""
QUESTION_PROMPT = "Question: {} Answer:"  # OPT, LLaMA and other decoder-only LLMs
SHORT_QUESTION_PROMPT = "Question: {} Short answer:"  # Flan-T5


def vqa_prompt(question: str, encoder_decoder: bool) -> str:
    """The prompt that asks `question` (already through `preprocess_question`); `encoder_decoder`: Flan-T5's wording.

    Raises:
        TypeError: question is not a string. ValueError: question is empty.
    """
    if not isinstance(question, str):
        raise TypeError(f"question: expected a string, got {type(question).__name__}; pass one question at a time")
    if not question.strip():
        raise ValueError(f"question: expected some text, got {question!r}; leave empty questions out")
    return (SHORT_QUESTION_PROMPT if encoder_decoder else QUESTION_PROMPT).format(question)
