"""Against transformers' `Blip2ForConditionalGeneration` with random weights: loss, every gradient, and generated ids, family by family."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from vpgtrans.engine.cli import main
from vpgtrans.engine.data.coco import CaptionSet, ImageRecord, RefusalReport
from vpgtrans.engine.data.conversation import tokenize_entry
from vpgtrans.engine.data.images import load_pixels, normalise
from vpgtrans.engine.data.packing import CaptionData, Group
from vpgtrans.engine.export.language_model import without_projections
from vpgtrans.engine.models.llm import LanguageModel, wrap
from vpgtrans.engine.models.vision import eva_vit
from vpgtrans.engine.models.vlm import VisionLanguageModel
from vpgtrans.engine.models.vpg import VPG
from vpgtrans.engine.recipe import Generation, ImageData, QFormerConfig

WIDTH, LAYERS, HEADS, QUERIES, IMAGE = 32, 2, 4, 5, 28
LN_VISION_EPS = 1e-5
COMMON = {
    "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
OPT = {
    "hidden_size": WIDTH, "ffn_dim": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": 128,
    "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {
    "d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": HEADS, "dropout_rate": 0.0, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 2, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu",
}  # fmt: skip
TEXT_CONFIGS = {
    "opt": (OPTConfig, {**OPT, "word_embed_proj_dim": WIDTH}),
    "opt-350m": (OPTConfig, {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": (LlamaConfig, GROUPED),
    "mistral": (MistralConfig, {**GROUPED, "sliding_window": 64}),
    "gemma": (GemmaConfig, {**GROUPED, "head_dim": 8}),
    "qwen2": (Qwen2Config, GROUPED),
    "qwen3": (Qwen3Config, {**GROUPED, "head_dim": 8}),
    "phi3": (Phi3Config, GROUPED),
    "t5": (T5Config, T5),
    "t5-tied": (T5Config, {**T5, "tie_word_embeddings": True}),
}  # fmt: skip
CAPTIONS = (
    "a small red circle left of a large blue square",
    "there is a large green star",
    "a ring above a red star on black",
    "one large circle",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words with sentencepiece's mark, the specials of all the tiny configs, a newline and `###`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    asked = {"question:", "what", "colour", "answer:", "###Human:", "###Assistant:", "###"}
    words = sorted({w for caption in CAPTIONS for w in caption.split()} | asked)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "\n", "<image>", *("▁" + w for w in words), *"abcdefgh"]
    raw = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    raw.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>", "<image>"])
    raw.add_tokens(["\n"])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def build(family: str, tokenizer) -> tuple[Blip2ForConditionalGeneration, VisionLanguageModel, torch.nn.Module]:
    """transformers' model with random weights, ours around the same language model, and the tower."""
    torch.manual_seed(0)
    kind, sizes = TEXT_CONFIGS[family]
    config = Blip2Config(
        vision_config={
            "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": IMAGE,
            "patch_size": 14, "layer_norm_eps": LN_VISION_EPS, "attention_dropout": 0.0,
        },
        qformer_config={
            "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 40, "cross_attention_frequency": 2,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        text_config=kind(vocab_size=len(tokenizer), **sizes).to_dict(),
        num_query_tokens=QUERIES, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    theirs = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02 if "vision" in name else 0.1 if "qformer" in name else 0.25)
            elif "norm" not in name.lower():
                parameter.normal_(std=0.05)
    qformer = QFormerConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=40, num_query_tokens=QUERIES, dropout=0.0
    )  # fmt: skip
    vpg = VPG(qformer, 24)
    vpg.qformer.load_state_dict(theirs.qformer.state_dict())
    vpg.ln_vision.load_state_dict(theirs.vision_model.post_layernorm.state_dict())
    vpg.query_tokens.data.copy_(theirs.query_tokens)
    tower = eva_vit(theirs.config.vision_config).eval()
    tower.model.load_state_dict(
        {k: v for k, v in theirs.vision_model.state_dict().items() if "post_layernorm" not in k}
    )
    llm = wrap(theirs.language_model, tokenizer, family)
    if (
        family == "opt-350m"
    ):  # transformers' BLIP-2 puts soft prompts before project_in: only the folded model can be compared
        theirs.language_model = without_projections(llm.model)
    projector = torch.nn.Linear(24, llm.hidden_width)
    projector.load_state_dict(theirs.language_projection.state_dict())
    model = VisionLanguageModel(vpg, projector, llm)
    model.freeze_for("vpg_and_projector", False)
    return theirs, model, tower


def data_of(llm: LanguageModel) -> CaptionData:
    return CaptionData(
        "test", [None, None], [[llm.caption_ids(c, 32) for c in CAPTIONS[:3]], [llm.caption_ids(CAPTIONS[3], 32)]]
    )


def their_inputs(
    llm: LanguageModel, batch_ids: list[tuple[list[int], list[int]]], image_token: int
) -> dict[str, torch.Tensor]:
    """One pair a row as transformers wants it, from (text before, what is supervised): right-padded, labels -100 elsewhere."""
    rows = []
    for first, rest in batch_ids:
        seen = [image_token] * QUERIES + first + ([] if llm.is_encoder_decoder else rest)
        rows.append((seen, rest if llm.is_encoder_decoder else [-100] * (QUERIES + len(first)) + rest))
    width, label_width = max(len(s) for s, _ in rows), max(len(r) for _, r in rows)
    pad = llm.special.pad
    return {
        "input_ids": torch.tensor([s + [pad] * (width - len(s)) for s, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s, _ in rows]),
        "labels": torch.tensor([r + [-100] * (label_width - len(r)) for _, r in rows]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_loss_and_gradients(family, dtype, tokenizer):
    """Grouped and packed by us, one pair a row by transformers: the same loss and the same gradient of every trainable tensor.

    In float64 every gradient agrees to 1e-6 of its own norm; float32 is compared to 1e-5, with a floor for gradients that are nothing but
    rounding: a thousandth of the largest.
    """
    theirs, model, tower = build(family, tokenizer)
    theirs.to(dtype), model.to(dtype), tower.to(dtype)
    relative = 1e-5 if dtype == torch.float32 else 1e-6
    llm, data = model.llm, data_of(model.llm)
    llm.check_contract()
    images = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        features = tower(images)
    groups = [Group(0, 0, (0, 1, 2)), Group(1, 0, (0,))]
    batches = llm.pack(groups, data, QUERIES, row_tokens=48, rows_per_batch=2, split_seed=5)
    targets = sum(b.target_count for b in batches)
    ours = sum(model.loss_sum(features[[g.image for g in b.groups]], b) for b in batches) / targets
    if llm.is_encoder_decoder:
        decoded = [split for b in batches for split in unpacked(b, llm)]
        assert any(first != [llm.special.eos] for first, _ in decoded), "no caption was split"
    else:
        decoded = [([], ids) for image in data.ids for ids in image]
    inputs = their_inputs(llm, decoded, theirs.config.image_token_index)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(
            name.startswith(("qformer.", "query_tokens", "language_projection.", "vision_model.post_layernorm."))
        )
    expected = theirs(pixel_values=images[[0, 0, 0, 1]], **inputs).loss
    assert abs(ours.item() / expected.item() - 1) <= relative
    expected.backward()
    ours.backward()
    wanted = {
        **{f"vpg.qformer.{k}": p.grad for k, p in theirs.qformer.named_parameters()},
        **{f"vpg.ln_vision.{k}": p.grad for k, p in theirs.vision_model.post_layernorm.named_parameters()},
        **{f"projector.{k}": p.grad for k, p in theirs.language_projection.named_parameters()},
        "vpg.query_tokens": theirs.query_tokens.grad,
    }
    got = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    assert set(got) == set(wanted)
    largest = max(g.norm() for g in wanted.values())
    for name, gradient in wanted.items():
        if name.endswith("key.bias"):  # it cancels in the softmax: what is left is rounding
            assert max(got[name].norm(), gradient.norm()) <= 1e-6 * largest, name
        else:
            floor = 1e-3 * largest if dtype == torch.float32 else 0.0
            assert (got[name] - gradient).norm() <= relative * max(gradient.norm(), floor), name


def test_vicuna_prompt(tokenizer):
    """Stage 3's conversations: two packed by us, one a row by transformers with the image inside the prompt; loss and gradients in float64."""
    theirs, model, tower = build("llama", tokenizer)
    theirs.to(torch.float64), model.to(torch.float64), tower.to(torch.float64)
    llm = model.llm
    entry = ImageData(name="talk", captions="filter_cap.json", style="conversation", instructions=["what colour"])
    answers = [["a large green star", "a ring above a red star"], ["one large circle"]]
    records = [ImageRecord(i, None, texts) for i, texts in enumerate(answers)]
    data = tokenize_entry(entry, CaptionSet("talk", records, RefusalReport("talk")), llm, 32, seed=0)
    images = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1)).double()
    groups = [Group(0, 0, (0, 1)), Group(1, 0, (0,))]
    batches = llm.pack(groups, data, QUERIES, row_tokens=64, rows_per_batch=2)
    with torch.no_grad():
        features = tower(images)
    targets = sum(b.target_count for b in batches)
    ours = sum(model.loss_sum(features[[g.image for g in b.groups]], b) for b in batches) / targets
    rows = []
    for image, group in enumerate(groups):
        before = [llm.special.bos, *llm.text_ids("###Human: ")] + [theirs.config.image_token_index] * QUERIES
        for k in group.captions:
            question, answer = llm.text_ids(" what colour ###Assistant: "), llm.text_ids(answers[image][k] + "###")
            rows.append((before + question + answer, [-100] * len(before + question) + answer))
    width, pad = max(len(r) for r, _ in rows), llm.special.pad
    expected = theirs(
        pixel_values=images[[0, 0, 1]],
        input_ids=torch.tensor([r + [pad] * (width - len(r)) for r, _ in rows]),
        attention_mask=torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r, _ in rows]),
        labels=torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    ).loss
    assert abs(ours.item() / expected.item() - 1) <= 1e-6
    wanted = torch.autograd.grad(expected, [theirs.query_tokens, theirs.language_projection.weight])
    got = torch.autograd.grad(ours, [model.vpg.query_tokens, model.projector.weight])
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def unpacked(batch, llm) -> list[tuple[list[int], list[int]]]:
    """(encoder text, labels) of each pair of an encoder-decoder's batch."""
    lengths = np.bincount(batch.predict.numpy() // batch.decoder_ids.shape[1])
    rests = torch.split(batch.labels, lengths.tolist())
    return [
        (ids[mask].tolist(), rest.tolist())
        for ids, mask, rest in zip(batch.encoder_ids, batch.encoder_mask, rests, strict=True)
    ]


@pytest.mark.parametrize("beams", [1, 5])
@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_generated_ids(family, beams, tokenizer):
    """Ragged prompts in one batch, padded on the left (encoder-decoders: masked): the same ids, token for token."""
    theirs, model, tower = build(family, tokenizer)
    model.eval()
    llm, settings = model.llm, Generation(num_beams=beams, max_new_tokens=9, min_new_tokens=2)
    texts = ["", "question: what colour answer:", "a red"]
    images = torch.randn(3, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        got = llm.generate_ids(model.soft_prompts(tower(images)), texts, settings)
    image = theirs.config.image_token_index
    rows = [
        [image] * QUERIES + ([*llm.text_ids(t), llm.special.eos] if llm.is_encoder_decoder else [llm.special.bos, *llm.text_ids(t)])
        for t in texts
    ]  # fmt: skip
    width = max(map(len, rows))
    pads = [width - len(r) for r in rows]
    ids = torch.tensor([[llm.special.pad] * n + r for n, r in zip(pads, rows, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in pads])
    expected = theirs.generate(
        pixel_values=images, input_ids=ids, attention_mask=mask, do_sample=False, num_beams=beams, max_new_tokens=9, min_new_tokens=2,
        eos_token_id=llm.ends, pad_token_id=llm.special.pad,
    )[:, 1 if llm.is_encoder_decoder else width :]  # fmt: skip
    assert got.tolist() == expected.tolist()
    assert len({tuple(row) for row in got.tolist()}) > 1, "the images make no difference: nothing is tested"


@pytest.mark.parametrize("family", ["opt", "llama", "t5"])
def test_caption_of_a_hugging_face_folder(family, tokenizer, tmp_path, capsys):
    """A folder that transformers saved, with its own LayerNorm eps and end tokens: `vpgtrans caption` gives transformers' ids."""
    theirs, _, _ = build(family, tokenizer)
    theirs.config.vision_config.layer_norm_eps = theirs.vision_model.post_layernorm.eps = 1e-3
    for layer in theirs.vision_model.encoder.layers:
        layer.layer_norm1.eps = layer.layer_norm2.eps = 1e-3
    theirs.save_pretrained(tmp_path / "blip2")
    tokenizer.save_pretrained(tmp_path / "blip2")
    paths, rng = [], np.random.default_rng(0)
    for n in range(4):
        paths.append(tmp_path / f"{n}.png")
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(paths[-1])
    settings = ["--num-beams", "3", "--max-new-tokens", "7", "--min-new-tokens", "2"]
    assert main(["caption", str(tmp_path / "blip2"), *map(str, paths), *settings, "--prompt", "a red", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["captions"]
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "blip2").eval()
    pixels = normalise(torch.stack([load_pixels(p, IMAGE) for p in paths]))
    is_t5, text = family == "t5", tokenizer("a red", add_special_tokens=False)["input_ids"]
    ids = [again.config.image_token_index] * QUERIES + ([*text, 2] if is_t5 else [1, *text])
    got = again.generate(
        pixel_values=pixels, input_ids=torch.tensor([ids] * 4), do_sample=False, num_beams=3, max_new_tokens=7, min_new_tokens=2
    )[:, 1 if is_t5 else len(ids) :]  # fmt: skip
    ends = again.language_model.generation_config.eos_token_id
    assert [c["token_ids"] for c in shown] == [trim(row, ends) for row in got.tolist()]


def trim(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def test_beam_score_of_the_reference(tokenizer):
    """Each rule's answer is the better one by that rule, which we compute ourselves from the sequences' log-probabilities."""
    _, model, tower = build("llama", tokenizer)
    model.eval()
    images = torch.randn(12, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(3))
    texts = ["question: what colour answer:"] * 12
    prompt = 1 + len(model.llm.text_ids(texts[0]))
    with torch.no_grad():
        prompts = model.soft_prompts(tower(images))
    differing = 0
    for penalty in (-1.0, 1.0, 3.0):
        found = []
        for rule in ("generated", "prompt_and_generated"):
            settings = Generation(
                num_beams=5, max_new_tokens=8, min_new_tokens=0, length_penalty=penalty, beam_score=rule
            )
            found.append(model.llm.generate_ids(prompts, texts, settings).tolist())
            assert "_update_finished_beams" not in vars(model.llm.model)  # nothing stays behind
        for row, both in enumerate(zip(*found, strict=True)):
            today, before = (trimmed(ids, model.llm) for ids in both)
            if today == before:
                continue
            differing += 1
            log_today, log_before = (
                log_probability(model, prompts[row : row + 1], texts[0], ids) for ids in (today, before)
            )
            lengths = [
                prompt + len(ids) - (ids[-1] in model.llm.ends) for ids in (before, today)
            ]  # the end token is not counted
            assert log_before / lengths[0] ** penalty > log_today / lengths[1] ** penalty
            assert log_today / len(today) ** penalty > log_before / len(before) ** penalty
    assert differing, "the two rules agreed on every row: nothing is tested"


def trimmed(ids: list[int], llm: LanguageModel) -> list[int]:
    ends = [i for i, token in enumerate(ids) if token in llm.ends]
    return ids[: ends[0] + 1] if ends else ids


@torch.no_grad()
def log_probability(model, prompt, text, ids) -> float:
    before = [model.llm.special.bos, *model.llm.text_ids(text)]
    inputs = torch.cat([prompt, model.llm.embed(torch.tensor([[*before, *ids]]))], 1)
    logits = model.llm.model(inputs_embeds=inputs).logits[0, QUERIES + len(before) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()


def test_a_model_that_breaks_the_contract_is_refused(tokenizer):
    """BLOOM's positions come from its mask, so it cannot take a packed prefix."""
    from transformers import BloomConfig

    from vpgtrans.engine.models.llm import ModelError

    model = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=len(tokenizer), hidden_size=WIDTH, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip
    with pytest.raises(ModelError, match="bloom"):
        wrap(model.eval(), tokenizer, "bloom").check_contract()
