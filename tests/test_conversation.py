"""Conversations: their ids, what is supervised, packed rows against one conversation a row, and a third stage that learns."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import T5Config, T5ForConditionalGeneration

from vpgtrans.engine.data.coco import CaptionSet, DataError, ImageRecord, RefusalReport
from vpgtrans.engine.data.conversation import INSTRUCTIONS, MAX_ANSWER_TOKENS, conversation_fault, tokenize_entry
from vpgtrans.engine.data.packing import CaptionData, Group, join, pack_update
from vpgtrans.engine.models.seq2seq import Seq2SeqLanguageModel
from vpgtrans.engine.models.vlm import VisionLanguageModel
from vpgtrans.engine.models.vpg import VPG
from vpgtrans.engine.pretrain.tokenizer import train_word_level
from vpgtrans.engine.recipe import ImageData, QFormerConfig, RecipeError, load_recipe
from vpgtrans.kernels.prefix_attention import dense_mask

QUERIES = 5
TEXTS = ["###Human: ###Assistant: what is it? say more.", *INSTRUCTIONS, "a small red circle, a large blue square"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_level(TEXTS)


def entry(**settings) -> ImageData:
    return ImageData(name="talk", captions="filter_cap.json", style="conversation", **settings)


def captioned(answers: list[list[str]]) -> CaptionSet:
    records = [ImageRecord(i, None, texts) for i, texts in enumerate(answers)]
    return CaptionSet("talk", records, RefusalReport("talk"))


def test_the_frame_of_a_conversation(make_llm, tokenizer):
    llm = make_llm("llama", tokenizer)
    data = tokenize_entry(
        entry(instructions=["What is it?"]), captioned([["A red circle.", "A square."]]), llm, 32, seed=0
    )
    words = tokenizer.convert_ids_to_tokens
    assert words(list(data.lead(0))) == ["<s>", "#", "#", "#", "human", ":"]
    question = ["what", "is", "it", "?", "#", "#", "#", "assistant", ":"]
    assert words(data.ids[0][0]) == [*question, "a", "red", "circle", ".", "#", "#", "#"]
    assert words(data.ids[0][1]) == [*question, "a", "square", ".", "#", "#", "#"]
    assert data.unsupervised == {0: [9, 9]}


def test_a_row_by_hand():
    """Two conversations behind one lead and one picture, then a plain caption of another image."""
    data = CaptionData("x", [None] * 2, [[[7, 8, 5, 6], [9, 4, 6]], [[1, 5, 3]]], {0: (1, 2)}, {0: [2, 1]})
    (batch,) = pack_update([Group(0, 0, (0, 1)), Group(1, 0, (0,))], data, 2, 20, 1, 0, fixed_shape=True)
    #                     lead  visual  question answer   q  answer | visual  caption | padding
    assert batch.ids.tolist() == [[1, 2, 0, 0, 7, 8, 5, 6, 9, 4, 6, 0, 0, 1, 5, 3, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 0, 1, 2, 3, 4, 0, 0, 0, 0]]
    assert batch.visual_slots.tolist() == [2, 3, 11, 12]
    assert batch.visual_source.tolist() == [0, 1, 2, 3]
    assert list(zip(batch.predict.tolist(), batch.labels.tolist(), strict=True)) == [
        (5, 5), (6, 6), (8, 4), (9, 6), (12, 1), (13, 5), (14, 3)
    ]  # fmt: skip
    mask = dense_mask(batch.segments)[0, 0]
    seen = [torch.nonzero(row).flatten().tolist() for row in mask[:16]]
    prefix = [0, 1, 2, 3]
    assert seen[:4] == [[0], [0, 1], [0, 1, 2], prefix]
    assert seen[4:8] == [prefix + list(range(4, end)) for end in (5, 6, 7, 8)]
    assert seen[8:11] == [prefix + list(range(8, end)) for end in (9, 10, 11)]
    assert seen[11:16] == [list(range(11, end)) for end in (12, 13, 14, 15, 16)]


def test_a_conversation_that_does_not_fit_in_a_row_is_named():
    data = CaptionData("x", [None], [[[7, 8, 5, 6]]], {0: (1, 2)}, {0: [2]})
    assert pack_update([Group(0, 0, (0,))], data, 2, 8, 1, 0)[0].target_count == 2
    with pytest.raises(DataError, match=r"at least 8 \(2 tokens before the image, 2 visual tokens .* 4\), got 7"):
        pack_update([Group(0, 0, (0,))], data, 2, 7, 1, 0)


CONFIG = QFormerConfig(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, num_query_tokens=QUERIES, dropout=0.0,
    initializer_range=0.2,
)  # fmt: skip


def mixed(llm) -> CaptionData:
    """Plain captions of images 0 and 1, conversations about images 2 to 4 with questions of different lengths."""
    rng = np.random.default_rng(0)

    def words(low: int, high: int) -> list[int]:
        return rng.integers(5, llm.vocabulary_size, rng.integers(low, high)).tolist()

    plain = CaptionData("plain", [None] * 2, [[[1, *words(1, 9), 4] for _ in range(n)] for n in (3, 1)])
    asked = [[words(1, 6) for _ in range(n)] for n in (2, 3, 1)]
    talks = CaptionData(
        "talks", [None] * 3, [[q + words(1, 9) for q in image] for image in asked], dict.fromkeys(range(3), (1, 9, 11)),
        {i: [len(q) for q in image] for i, image in enumerate(asked)},
    )  # fmt: skip
    return join([plain, talks])


def test_joined_sets_keep_what_belongs_to_each_image(make_llm):
    data = mixed(make_llm("llama"))
    assert [data.lead(i) for i in range(5)] == [(), (), *[(1, 9, 11)] * 3]
    asked = [[data.question_tokens(i, k) for k in range(len(data.ids[i]))] for i in range(5)]
    assert asked[:2] == [[0, 0, 0], [0]] and all(
        0 < n < len(ids) for i in (2, 3, 4) for n, ids in zip(asked[i], data.ids[i], strict=True)
    )
    again = join([data, data])
    assert again.lead(7) == (1, 9, 11) and again.lead(5) == () and again.question_tokens(8, 2) == asked[3][2]
    assert [again.counts[i] for i in range(10)] == [len(again.ids[i]) for i in range(10)] == [3, 1, 2, 3, 1] * 2
    assert again.counts.pairs(1, 8, None) == 13 and again.counts.pairs(1, 8, 2) == 11 and again.pair_count == 20


@pytest.mark.parametrize("family", ["opt", "opt-350m", "llama"])
@pytest.mark.parametrize(("row_tokens", "rows"), [(200, 2), (44, 2), (24, 8)])
def test_packed_conversations_equal_one_a_row(family, row_tokens, rows, make_llm):
    """Both styles in one row, several rows, and groups split over rows: loss and every gradient in float64."""
    llm = make_llm(family)
    torch.manual_seed(7)
    model = VisionLanguageModel(VPG(CONFIG, 10), torch.nn.Linear(24, llm.hidden_width), llm).double()
    model.freeze_for("vpg_and_projector", False)
    data = mixed(llm)
    groups = [Group(i, 0, tuple(range(len(data.ids[i])))) for i in (2, 0, 3, 1, 4)]
    features = torch.randn(5, 6, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batches = pack_update(groups, data, QUERIES, row_tokens, rows, llm.special.pad)
    if row_tokens == 200:
        assert len(batches) == 1 and len(batches[0].ids) == 1, "expected both styles in one row"
    packed = sum(model.loss_sum(features[[g.image for g in b.groups]], b) for b in batches)
    plain, targets = torch.zeros((), dtype=torch.float64), 0
    for group in groups:
        for caption in group.captions:
            lead, tail = torch.tensor([data.lead(group.image)], dtype=torch.long), data.ids[group.image][caption]
            tokens, asked = torch.tensor([tail]), data.question_tokens(group.image, caption)
            prompt = model.soft_prompts(features[group.image][None])
            inputs = torch.cat([llm.embed(lead), prompt, llm.embed(tokens)], 1)
            length = inputs.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            logits = llm.logits(llm.hidden_states(inputs, torch.arange(length)[None], causal)[0])
            labels = torch.cat([torch.full((length - len(tail) + asked,), -100), tokens[0, asked:]])
            plain = plain + F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
            targets += int((labels != -100).sum())
    assert sum(b.target_count for b in batches) == targets
    assert packed.item() == pytest.approx(plain.item(), rel=1e-7)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    expected = torch.autograd.grad(plain, [p for _, p in named])
    got = torch.autograd.grad(packed, [p for _, p in named])
    largest = max(g.norm() for g in expected)
    for (name, _), ours, theirs in zip(named, got, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * largest, name  # RoPE is float32 inside transformers


def test_an_answer_is_cut_and_then_does_not_end(make_llm, tokenizer):
    llm = make_llm("llama", tokenizer)
    closing = llm.text_ids("###")
    whole, cut = "red " * (MAX_ANSWER_TOKENS - 3), "red " * (MAX_ANSWER_TOKENS - 2)
    data = tokenize_entry(entry(), captioned([[whole, cut, "blue"]]), llm, 7, seed=0)
    answers = [ids[asked:] for ids, asked in zip(data.ids[0], data.unsupervised[0], strict=True)]
    assert [len(a) for a in answers] == [160, 160, 4]
    assert answers[0][-3:] == closing and answers[1][-3:] != closing and answers[2][1:] == closing
    short = tokenize_entry(entry(max_text_tokens=12), captioned([[whole]]), llm, 7, seed=0)
    assert len(short.ids[0][0]) - short.unsupervised[0][0] == 12
    plain = ImageData(name="x", captions="filter_cap.json")
    assert len(tokenize_entry(plain, captioned([[whole]]), llm, 7, seed=0).ids[0][0]) == 7
    longer = plain.model_copy(update={"max_text_tokens": 9})
    assert len(tokenize_entry(longer, captioned([[whole]]), llm, 7, seed=0).ids[0][0]) == 9


def test_the_instruction_of_an_answer_depends_on_seed_and_image_alone(make_llm, tokenizer):
    llm = make_llm("llama", tokenizer)
    answers = captioned([["blue"]] * 40)
    first = tokenize_entry(entry(), answers, llm, 32, seed=1)
    fewer = CaptionSet("talk", answers.records[30:], answers.refused)
    assert tokenize_entry(entry(), fewer, llm, 32, seed=1).ids == first.ids[30:]
    assert tokenize_entry(entry(), answers, llm, 32, seed=2).ids != first.ids
    expected = {tuple(llm.text_ids(f" {text} ###Assistant: ")) for text in INSTRUCTIONS}
    assert {tuple(i[0][: n[0]]) for i, n in zip(first.ids, first.unsupervised.values(), strict=True)} == expected


def test_what_cannot_hold_conversations_is_refused(make_llm, word_tokenizer):
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=len(word_tokenizer), **sizes))
    with pytest.raises(DataError, match=r"'talk', style: expected caption .* encoder-decoder"):
        tokenize_entry(entry(), captioned([["a"]]), Seq2SeqLanguageModel(t5, word_tokenizer, "t5"), 32, seed=0)
    assert "no token for the '###'" in conversation_fault(make_llm("opt"))
    with pytest.raises(DataError, match="no token for the '###'"):
        tokenize_entry(entry(), captioned([["a"]]), make_llm("opt"), 32, seed=0)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("instructions: [say what it is]", ["instructions: expected none for style caption"]),
        ("style: conversation, instructions: []", ["instructions"]),
        ("style: conversation, instructions: [fine, 'what ### then']", ["instructions.1", "###"]),
        ("style: conversation, instructions: ['  ']", ["instructions.0"]),
        ("style: talk", ["style", "'caption' or 'conversation'"]),
        ("style: conversation, max_text_tokens: 0", ["max_text_tokens"]),
    ],
)
def test_recipe_errors(setting, words, tiny_recipe):
    with pytest.raises(RecipeError) as error:
        load_recipe(tiny_recipe, [f"data.val={{captions: {tiny_recipe}, images: {tiny_recipe.parent}, {setting}}}"])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_third_stage_memorises_its_conversations(tiny_recipe, tiny_world, tmp_path, make_llm):
    """MiniGPT-4's folder as the third stage of a run, through the command; the loss of that stage falls far."""
    from vpgtrans.engine.train import main

    answers = ["a small red circle, a large blue square", "say more.", "it is a blue circle", "small, red"]
    world = [p["caption"] for p in json.loads((tiny_world / "world" / "captions_text.json").read_text())["annotations"]]
    talking = make_llm("llama", train_word_level([*TEXTS, *world]), seed=5)
    talking.model.save_pretrained(tmp_path / "lm")
    talking.tokenizer.save_pretrained(tmp_path / "lm")
    align = tmp_path / "align"
    (align / "image").mkdir(parents=True)
    for number, image in enumerate(sorted((tiny_world / "world" / "images").glob("*.jpg"))[:4]):
        shutil.copy(image, align / "image" / f"{number}.jpg")
    told = [{"image_id": str(number), "caption": answer} for number, answer in enumerate(answers)]
    (align / "filter_cap.json").write_text(json.dumps({"annotations": told}))
    scenes = f"captions: {tiny_world}/world/captions_train.json, images: {tiny_world}/world/images"
    stage = "trains: vpg_and_projector, learning_rate: 1e-2"
    settings = [
        f"target.llm={tmp_path / 'lm'}", "data.transform=eval", "evaluation.generate_images=0",
        "output.log_every_updates=10", "output.checkpoint_every_pairs=null", "qformer={dropout: 0.0}",
        f"data.train=[{{name: scenes, {scenes}}}, {{name: align, captions: {align}, format: minigpt4, style: conversation}}]",
        "stages=[{name: warm_up, trains: projector, learning_rate: 1e-3, pairs: 11, batch_pairs: 11, data: [scenes]},"
        f" {{name: direct, {stage}, pairs: 11, batch_pairs: 11, data: [scenes]}},"
        f" {{name: talk, {stage}, pairs: 720, batch_pairs: 4, data: [align]}}]",
    ]  # fmt: skip
    assert main([str(tiny_recipe), *settings]) == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in logged if e["event"] == "train" and e["stage"] == "talk"]
    assert losses[-1] < 0.4 * losses[0], losses
