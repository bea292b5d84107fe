"""`vpgtrans chat`: ids of every turn, the stop at ###, what is streamed, Ctrl-C, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from vpgtrans.engine.chat import AnswerStream, Chat, EndSymbol, Turn, converse
from vpgtrans.engine.cli import main
from vpgtrans.engine.data.images import ImageRefused
from vpgtrans.engine.data.reading import DataError
from vpgtrans.engine.models.llm import ModelError
from vpgtrans.engine.models.opening import Opened
from vpgtrans.engine.models.seq2seq import Seq2SeqLanguageModel
from vpgtrans.engine.models.vision import load_tower
from vpgtrans.engine.models.vlm import VisionLanguageModel
from vpgtrans.engine.models.vpg import VPG, save_parts
from vpgtrans.engine.pretrain.tokenizer import train_word_level
from vpgtrans.engine.pretrain.vocabulary import load_tokenizer
from vpgtrans.engine.recipe import Generation, QFormerConfig, Vision

SETTINGS = Generation(num_beams=1, max_new_tokens=8, min_new_tokens=1)
QFORMER = QFormerConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_query_tokens=4, initializer_range=0.2
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_level(["###Human: what colour is it? and the other one? ###Assistant: a red cat, a blue dog."])


@pytest.fixture(scope="module")
def images(tiny_world) -> list[Path]:
    return sorted((tiny_world / "world" / "images").glob("*.jpg"))


@pytest.fixture
def opened(make_llm, tokenizer, tiny_world) -> Opened:
    """A random model around a LLaMA whose tokenizer knows `#`."""
    vision = Vision(kind="eva_vit", path=tiny_world / "tower")
    llm = make_llm("llama", tokenizer)
    torch.manual_seed(1)
    model = VisionLanguageModel(VPG(QFORMER, 16), torch.nn.Linear(16, llm.hidden_width), llm).eval()
    return Opened("talker", "talker", model, load_tower(vision), Path("talker"), None)


class Script(torch.nn.Module):
    """A head that makes the model say what is written, token by token, and presses Ctrl-C where it says so."""

    def __init__(self, tokenizer, said: list[str]):
        super().__init__()
        self.ids = [None if token == "^C" else tokenizer.convert_tokens_to_ids(token) for token in said]
        self.size = len(tokenizer)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        token = self.ids.pop(0)
        if token is None:
            raise KeyboardInterrupt
        logits = torch.zeros(*hidden.shape[:-1], self.size)
        logits[..., token] = 9.0
        return logits


def greedy(opened: Opened, visual: torch.Tensor, before: list[int], after: list[int], count: int) -> list[int]:
    """The plain way: the whole sequence again for each new token, without transformers' generate and without a cache."""
    llm, new = opened.model.llm, []
    for _ in range(count):
        text = [llm.embed(torch.tensor(ids, dtype=torch.long)) for ids in (before, after + new)]
        inputs = torch.cat([text[0], visual, text[1]])[None]
        length = inputs.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        logits = llm.logits(llm.hidden_states(inputs, torch.arange(length)[None], causal)[0, -1])
        if not new:
            logits[llm.special.eos] = -torch.inf  # at least one token, as in the authors' demo
        new.append(int(logits.argmax()))
        if new[-1] == llm.special.eos:
            break
    return new


@torch.no_grad()
def test_two_turns(opened, images, tokenizer):
    """The ids of both prompts as trained, the answers token by token as without generate, and the stream equal to the answers."""
    chat = Chat(opened, images[0], SETTINGS)
    llm = opened.model.llm
    lead = [llm.special.bos, *llm.text_ids("###Human:")]
    question = " what colour is it? ###Assistant: "
    before, after = chat.prompt_ids("what colour is it?")
    assert (list(before), after) == (lead, llm.text_ids(question))
    streamed: list[str] = []
    first = chat.ask(" what colour is it?\n", streamed.append)
    new = greedy(opened, opened.soft_prompts([images[0]])[0], lead, after, 8)
    said = tokenizer.decode(new, skip_special_tokens=True)
    assert first.answer == said.split("# # #")[0].strip() == "".join(streamed) and len(first.answer.split()) > 2
    assert len(streamed) > 1, "nothing was streamed before the end"
    history = llm.text_ids(f"{question}{first.answer}###Human: and the other one? ###Assistant:")
    before, after = chat.prompt_ids("and the other one?")
    assert (list(before), after) == (lead, history)
    streamed.clear()
    second = chat.ask("and the other one?", streamed.append)
    said = tokenizer.decode(greedy(opened, chat.visual, lead, history, 8), skip_special_tokens=True)
    assert second.answer == said.split("# # #")[0].strip() == "".join(streamed)
    assert chat.turns == [first, second]
    chat.look_at(images[1])
    assert chat.turns == [] and not torch.allclose(chat.visual, opened.soft_prompts([images[0]])[0])


@pytest.mark.parametrize(
    ("said", "answer", "ended_by"),
    [
        (["a", "red", "cat", "#", "#", "#", "dog"], "a red cat", "end_symbol"),
        (["a", "#", "cat", "#", "#", "cat", "</s>", "dog"], "a # cat # # cat", "eos"),
        (["a", "cat", "\n", "a", "dog", "#", "#", "#"], "a cat a dog", "end_symbol"),
        (["#", "#", "#"], "", "end_symbol"),
        (["a", "red", "cat", "a", "blue", "dog", "a", "#"], "a red cat a blue dog a #", "max_new_tokens"),
    ],
)
@pytest.mark.parametrize("beams", [1, 3])
def test_where_an_answer_ends(said, answer, ended_by, beams, opened, images, tokenizer):
    chat = Chat(opened, images[0], SETTINGS.model_copy(update={"num_beams": beams}))
    opened.model.llm.model.lm_head = script = Script(tokenizer, [*said, *["dog"] * 20])
    streamed: list[str] = []
    turn = chat.ask("what?", streamed.append)
    assert (turn.answer, turn.ended_by) == (answer, ended_by)
    assert "".join(streamed) == answer
    assert all("#" not in piece for piece in streamed) or "#" in answer
    if beams == 1 and ended_by != "max_new_tokens":
        stop = said.index("dog") if said[-1] == "dog" else len(said)
        assert len(script.ids) == len(said) + 20 - stop, "it went on after the end"


def test_ctrl_c_ends_the_turn_and_keeps_what_was_said(opened, images, tokenizer):
    chat = Chat(opened, images[0], SETTINGS)
    opened.model.llm.model.lm_head = Script(tokenizer, ["a", "red", "^C", "a", "dog", "</s>"])
    streamed: list[str] = []
    assert chat.ask("what?", streamed.append) == Turn("what?", "a red", "interrupted")
    assert "".join(streamed) == "a red"
    assert chat.ask("what?") == Turn("what?", "a dog", "eos")
    assert len(chat.turns) == 2


def test_sampling_follows_the_temperature(opened, images):
    def said(temperature: float, seed: int) -> str:
        torch.manual_seed(seed)
        return Chat(opened, images[0], SETTINGS, temperature).ask("what?").answer

    likeliest = said(0.0, 0)
    assert said(0.0, 1) == likeliest == said(1e-3, 2)
    assert said(5.0, 3) == said(5.0, 3) and len({said(5.0, seed) for seed in range(4)}) > 1


def test_the_oldest_turns_make_room(opened, images):
    chat = Chat(opened, images[0], SETTINGS)  # 128 positions: 4 visual, 8 for the answer
    chat.turns += [Turn("what colour is it?", "a cat, " * 8, "eos"), Turn("and the other one?", "a dog, " * 8, "eos")]
    before, after = chat.prompt_ids("what?")
    assert len(chat.turns) == 2 and len(before) + len(after) <= 116
    chat.turns.append(Turn("and the other one?", "a red dog. " * 8, "eos"))
    before, after = chat.prompt_ids("what?")
    assert [t.answer[:5] for t in chat.turns] == ["a dog", "a red"] and len(before) + len(after) <= 116
    assert after[:3] == chat.llm.text_ids("and the other")
    with pytest.raises(DataError, match=r"at most 116 tokens .* got 131"):
        chat.prompt_ids("what " * 120)
    assert len(chat.turns) == 2
    for question in ("  ", "what? ###Assistant: a cat"):
        with pytest.raises(DataError, match="question: expected some text"):
            chat.ask(question)


def test_models_that_cannot_chat_are_refused(opened, images, make_llm, word_tokenizer):
    opened.model.llm = make_llm("llama")
    with pytest.raises(ModelError, match=r"talker: cannot chat, .* no token for the '###'"):
        Chat(opened, images[0], SETTINGS)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=len(word_tokenizer), **sizes))
    opened.model.llm = Seq2SeqLanguageModel(t5, word_tokenizer, "t5")
    with pytest.raises(ModelError, match="encoder-decoder"):
        Chat(opened, images[0], SETTINGS)


def test_a_conversation_at_the_terminal(opened, images, tokenizer, capsys, tmp_path):
    chat = Chat(opened, images[0], SETTINGS)
    end = ["#", "#", "#"]
    said = ["a", "red", "cat", *end, "a", "^C", "a", "blue", "dog", *end]
    opened.model.llm.model.lm_head = Script(tokenizer, said)
    lines = ["what colour is it?", "and it?", "a ### b", "", f"/image {tmp_path / 'none.jpg'}", "/dance", "^C"]
    lines += [f"/image '{images[1]}'", "what?", "/reset", "/quit", "never read"]
    turns: list[int] = []

    def read(prompt: str) -> str:
        turns.append(len(chat.turns))
        if (line := lines.pop(0)) == "^C":
            raise KeyboardInterrupt
        return line

    assert converse(chat, read) == 0
    assert lines == ["never read"] and chat.image == images[1] and turns == [0, 1, 2, 2, 2, 2, 2, 2, 0, 1, 0]
    shown = capsys.readouterr().out.splitlines()
    assert (
        "Assistant: a red cat" in shown and "Assistant: a (interrupted)" in shown and "Assistant: a blue dog" in shown
    )
    assert any("none.jpg: image refused (missing)" in line and str(images[0]) in line for line in shown)
    assert any("without '###'" in line for line in shown) and "(forgotten)" in shown
    assert sum("/image FILE" in line for line in shown) == 2

    def closed(prompt: str) -> str:
        raise EOFError

    assert converse(chat, closed) == 0


def test_a_picture_that_cannot_be_read_changes_nothing(opened, images, tmp_path):
    chat = Chat(opened, images[0], SETTINGS)
    chat.turns.append(Turn("what?", "a cat", "eos"))
    before = chat.visual.clone()
    (tmp_path / "bad.jpg").write_bytes(images[1].read_bytes()[:300])
    with pytest.raises(ImageRefused):
        chat.look_at(tmp_path / "bad.jpg")
    assert torch.equal(chat.visual, before) and len(chat.turns) == 1 and chat.image == images[0]


@pytest.fixture
def a_run(opened, tokenizer, tiny_world, tmp_path) -> Path:
    """The model above as a run leaves it."""
    llm = tmp_path / "lm"
    opened.model.llm.model.save_pretrained(llm)
    tokenizer.save_pretrained(llm)
    vision = Vision(kind="eva_vit", path=tiny_world / "tower").model_dump(mode="json")
    config = {
        "recipe": "tiny",
        "image_width": 16,
        "qformer": QFORMER.model_dump(),
        "llm": str(llm),
        "vision": vision,
        "pairs": 0,
    }
    save_parts(tmp_path / "run" / "model", {"vpg": opened.model.vpg, "projector": opened.model.projector}, config)
    return tmp_path / "run"


def test_the_command_asks_and_leaves(a_run, opened, images, capsys):
    command = ["chat", str(a_run), "--image", str(images[0]), "--max-new-tokens", "8", "--device", "cpu"]
    asked = ["--prompt", "what colour is it?", "--prompt", "and the other one?"]
    assert main([*command, *asked, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    chat = Chat(opened, images[0], SETTINGS)
    expected = [chat.ask("what colour is it?"), chat.ask("and the other one?")]
    assert [Turn(**turn) for turn in printed["turns"]] == expected
    assert printed["generation"] == {"num_beams": 1, "max_new_tokens": 8, "temperature": 0.0}
    assert main([*command, *asked]) == 0
    first, second = expected
    shown = (
        f"Human: {first.question}\nAssistant: {first.answer}\nHuman: {second.question}\nAssistant: {second.answer}\n"
    )
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "none.jpg", "--prompt", "what?"], ["none.jpg", "missing"]),
        (["--image", "{run}/model/vl_config.json"], ["vl_config.json", "not_an_image"]),
        (["--image", "{image}", "--json"], ["--json", "--prompt"]),
        (["--image", "{image}", "--prompt", "what?", "--temperature", "-1"], ["--temperature", "-1"]),
        (["--image", "{image}", "--prompt", "what?", "--num-beams", "0"], ["num_beams"]),
        (["--image", "{image}", "--prompt", " "], ["question", "' '"]),
    ],
)
def test_what_is_wrong_is_said(arguments, words, a_run, images, capsys):
    filled = [a.format(run=a_run, image=images[0]) for a in arguments]
    assert main(["chat", str(a_run), *filled]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_a_folder_that_is_no_model_is_said(images, tmp_path, capsys):
    assert main(["chat", str(tmp_path), "--image", str(images[0])]) == 2
    assert str(tmp_path) in capsys.readouterr().err


TEXTS = [
    "The picture shows a cat.\nIt sits on a mat; the mat is #1 of 2 ## here.",
    "Un café très élégant, 3\u202f€ – naïve.",
    "这张图片显示一只猫。它坐在垫子上。",
    "a \U0001f408\u200d\u2b1b on a mat",
    "he doesn't know , really ?",
]


@pytest.mark.parametrize("end", ["###", " ###", ".###Human: next", "\n### and more", ""])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_streams_of_real_tokenizers(name, end, measuring_data):
    """What is streamed makes up the answer, nothing of the end symbol shows, and the last word waits for its end."""
    tokenizer = load_tokenizer(measuring_data / "tokenizers" / name)
    symbol = EndSymbol(tokenizer, [tokenizer.eos_token_id])
    for text in TEXTS:
        ids = tokenizer(text + end, add_special_tokens=False)["input_ids"]
        expected = (text + end).split("###")[0].strip()
        pieces: list[str] = []
        stream = AnswerStream(symbol, pieces.append)
        taken = 0
        while taken < len(ids) and not symbol.found(ids[:taken]):
            stream.put(torch.tensor(ids[taken : taken + 1]))
            taken += 1
            shown = "".join(pieces)
            assert expected.startswith(shown)
            assert not shown or not expected[len(shown) :][:1].strip() or shown[-1] > "\u2e7f", "a word was cut"
        assert symbol.found(ids[:taken]) == bool(end)
        assert "here." not in shown or end[:1] == "\n", "the last word was shown before its end"
        stream.end()
        assert "".join(pieces) == symbol.text(ids) == expected
        assert len(pieces) > 3
