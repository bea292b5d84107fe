"""`vpgtrans chat MODEL --image FILE`: a conversation about an image, in the format of VL-Vicuna's third stage (data/conversation.py).

    [bos]###Human: <visual> q1 ###Assistant: a1###Human: q2 ###Assistant: ...

The ids of a turn are those that it would have in training.  An answer ends at `###`, at EOS, after --max-new-tokens, or with Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .captioning import placement
from .data.conversation import END, answer_ids, conversation_fault, lead_ids, question_ids
from .data.images import ImageRefused, check_image
from .data.reading import DataError
from .models.llm import ModelError
from .models.opening import open_model
from .recipe import Generation

if TYPE_CHECKING:
    from .models.causal import CausalLanguageModel
    from .models.opening import Opened

EXIT_INTERRUPTED = 130
TOP_P = 0.9  # of sampling, as in the authors' demo
COMMANDS = "/image FILE another picture, /reset forget what was said, /quit leave; Ctrl-C ends an answer"
_TAIL_TOKENS = 16  # enough for `###` in single bytes
# Whitespace, or a character of a script that is written without it.
_WORD_END = re.compile(r"\s|[\u2e80-\U0010ffff]")

EndedBy = Literal["end_symbol", "eos", "max_new_tokens", "interrupted"]


@dataclass(frozen=True)
class Turn:
    """One question and its answer, without the `###` that ends it."""

    question: str
    answer: str
    ended_by: EndedBy


class EndSymbol(StoppingCriteria):
    """Finds the `###` that ends an answer, by its ids in each way that the tokenizer has of writing it, and in the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]):
        self.tokenizer, self.ends = tokenizer, frozenset(ends)
        written = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (END, f" {END}"))
        self.ways = sorted({tuple(ids) for ids in written})

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """input_ids (beams, new tokens) -> (beams,) bool, whether each has ended."""
        return torch.tensor([self.found(row) for row in input_ids.tolist()], device=input_ids.device)

    def found(self, ids: list[int]) -> bool:
        """Whether generated ids hold the end symbol."""
        return self._place(ids) is not None or END in self._decode(ids[-_TAIL_TOKENS:])

    def text(self, ids: list[int]) -> str:
        """The answer in generated ids: up to EOS or the end symbol, without white space around it."""
        stop = next((at for at, token in enumerate(ids) if token in self.ends), len(ids))
        place = self._place(ids[:stop])
        return self._decode(ids[:place] if place is not None else ids[:stop]).split(END)[0].strip()

    def ended_by(self, ids: list[int]) -> EndedBy:
        """What ended generated ids that were not interrupted."""
        before = next((ids[:at] for at, token in enumerate(ids) if token in self.ends), None)
        if self._place(ids if before is None else before) is not None or END in self._decode(before or ids):
            return "end_symbol"
        return "max_new_tokens" if before is None else "eos"

    def begun(self, ids: list[int]) -> int:
        """How many ids at the end of generated ids may be the beginning of an end symbol."""
        return max((n for way in self.ways for n in range(1, len(way)) if tuple(ids[-n:]) == way[:n]), default=0)

    def _place(self, ids: list[int]) -> int | None:
        found = (at for at in range(len(ids)) if any(tuple(ids[at : at + len(way)]) == way for way in self.ways))
        return next(found, None)

    def _decode(self, ids: list[int]) -> str:
        # cleaning up would change words that are already on the screen
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class AnswerStream(BaseStreamer):
    """Hands out the text of an answer in whole words as its ids arrive; all that it hands out makes up `EndSymbol.text` of all ids."""

    def __init__(self, symbol: EndSymbol, write: Callable[[str], None]):
        self.symbol, self.write = symbol, write
        self.ids: list[int] = []
        self._shown = 0

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()
        if not self.symbol.found(self.ids):
            self._show(_whole_words(self.symbol.text(self.ids[: len(self.ids) - self.symbol.begun(self.ids)])))

    def end(self) -> None:
        self._show(self.symbol.text(self.ids))

    def _show(self, text: str) -> None:
        if len(text) > self._shown:
            self.write(text[self._shown :])
            self._shown = len(text)


def _whole_words(text: str) -> str:
    """The text without its last word, which further ids may go on with."""
    ends = [match.end() for match in _WORD_END.finditer(text.rstrip("\ufffd"))]
    return text[: ends[-1]].rstrip() if ends else ""


class Chat:
    """A conversation about one image with an opened model; turns are kept and told to the model again.

    temperature: 0 for the likeliest answer, above for sampling.  Raises ModelError where the model cannot hold a conversation.
    """

    def __init__(self, opened: Opened, image: Path, settings: Generation, temperature: float = 0.0):
        llm = opened.model.llm
        if fault := conversation_fault(llm):
            raise ModelError(f"{opened.name}: cannot chat, because {fault}; use `vpgtrans caption --prompt`")
        self.opened = opened
        self.llm: CausalLanguageModel = llm  # type: ignore[assignment]
        self.turns: list[Turn] = []
        ends = sorted({llm.special.eos, *llm.ends} - {llm.special.newline})  # an answer may have several lines
        self.symbol = EndSymbol(llm.tokenizer, ends)
        self.config = llm.generation_config(settings)
        self.config.eos_token_id = ends
        if temperature > 0:
            self.config.update(do_sample=True, temperature=temperature, top_p=TOP_P, top_k=0)
        self.look_at(image)

    def look_at(self, image: Path) -> None:
        """Another picture; what was said about the last one is forgotten.  Raises ImageRefused, and then nothing changes."""
        self.visual = self.opened.soft_prompts([image])[0]
        self.image = image
        self.turns.clear()

    def prompt_ids(self, question: str) -> tuple[tuple[int, ...], list[int]]:
        """Ids before and after the visual tokens for the next answer; turns that no longer fit are left out, the oldest first.

        Raises DataError for a question that is empty, holds `###`, or is too long by itself.
        """
        asked = question.strip()
        if not asked or END in asked:
            raise DataError(f"question: expected some text without {END!r}, which ends a turn, got {question!r}")
        lead, room = lead_ids(self.llm), self._room()
        for start in range(len(self.turns) + 1):
            after: list[int] = []
            for number, turn in enumerate(self.turns[start:]):
                after += question_ids(self.llm, turn.question, number == 0) + answer_ids(self.llm, turn.answer)
            after += question_ids(self.llm, asked, start == len(self.turns))
            if len(lead) + len(after) <= room:
                del self.turns[:start]
                return lead, after
        raise DataError(
            f"question: expected at most {room} tokens with its frame, got {len(lead) + len(after)}; "
            "ask in fewer words, or lower --max-new-tokens"
        )

    def _room(self) -> float:
        """Tokens of text that the positions of the language model leave beside visual tokens and answer."""
        positions = getattr(self.llm.model.config, "max_position_embeddings", None)
        return positions - self.opened.model.queries - self.config.max_new_tokens if positions else float("inf")

    def ask(self, question: str, write: Callable[[str], None] = lambda text: None) -> Turn:
        """The answer to a question, which `write` gets word by word (with beams: at the end).  Ctrl-C ends it and keeps what is there."""
        before, after = self.prompt_ids(question)
        stream = AnswerStream(self.symbol, write)
        more: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([self.symbol])}
        if self.config.num_beams == 1:
            more["streamer"] = stream
        ended_by: EndedBy
        try:
            stream.ids = self.llm.generate_after(before, self.visual, after, self.config, **more)
            ended_by = self.symbol.ended_by(stream.ids)
        except KeyboardInterrupt:
            ended_by = "interrupted"
        stream.end()
        turn = Turn(question.strip(), self.symbol.text(stream.ids), ended_by)
        self.turns.append(turn)
        return turn


def main(options: argparse.Namespace) -> int:
    """Talk, or with --prompt ask and leave; returns 0, or 130 after Ctrl-C.  DataError or ImageRefused before anything is loaded."""
    if options.json and not options.prompt:
        raise DataError("--json: expected a --prompt for each turn, because nothing else can be read by a program")
    if options.temperature < 0:
        raise DataError(f"--temperature: expected 0 or more, got {options.temperature}")
    settings = Generation(num_beams=options.num_beams, max_new_tokens=options.max_new_tokens, min_new_tokens=1)
    image = Path(options.image)
    check_image(image)
    opened = open_model(options.model, *placement(options.device, options.precision))
    chat = Chat(opened, image, settings, options.temperature)
    if not options.prompt:
        return converse(chat)
    turns: list[Turn] = []
    for question in options.prompt:
        if options.json:
            turns.append(chat.ask(question))
        else:
            print(f"Human: {question}\nAssistant: ", end="", flush=True)
            turns.append(chat.ask(question, _write))
            print(flush=True)
        if turns[-1].ended_by == "interrupted":
            break
    if options.json:
        used = {**settings.model_dump(include={"num_beams", "max_new_tokens"}), "temperature": options.temperature}
        shown = {
            "model": str(options.model),
            "image": str(image),
            "generation": used,
            "turns": [asdict(t) for t in turns],
        }
        print(json.dumps(shown, indent=1))
    return EXIT_INTERRUPTED if turns[-1].ended_by == "interrupted" else 0


def converse(chat: Chat, read: Callable[[str], str] = input) -> int:
    """Turns from the terminal until /quit or the end of input; returns 0."""
    print(f"{chat.opened.name}, {chat.image}\n{COMMANDS}", flush=True)
    while True:
        try:
            line = read("Human: ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n(/quit to leave)")
            continue
        if line == "/quit":
            return 0
        if line.startswith("/"):
            _command(chat, line)
        elif line:
            _turn(chat, line)


def _command(chat: Chat, line: str) -> None:
    name, _, rest = line.partition(" ")
    if name == "/reset":
        chat.turns.clear()
        print("(forgotten)")
    elif name == "/image" and rest.strip():
        try:
            chat.look_at(Path(rest.strip().strip("'\"")).expanduser())
        except ImageRefused as error:
            print(f"({error}; still looking at {chat.image})")
        else:
            print(f"(looking at {chat.image}; what was said is forgotten)")
    else:
        print(f"({COMMANDS})")


def _turn(chat: Chat, question: str) -> None:
    before = len(chat.turns)
    try:
        print("Assistant: ", end="", flush=True)
        turn = chat.ask(question, _write)
    except DataError as error:
        print(f"\n({error})")
        return
    print(" (interrupted)" if turn.ended_by == "interrupted" else "", flush=True)
    if left_out := before + 1 - len(chat.turns):
        print(f"(the first {left_out} turns no longer fit and were left out)")


def _write(text: str) -> None:
    print(text, end="", flush=True, file=sys.stdout)
