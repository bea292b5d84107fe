"""The exact savings in every combination, against one pair a row with logits at every position: the same loss, the same gradients.

Grouped captions or one pair a group; rows of different budgets, with or without a fixed shape; features computed or from the vision cache; blocks
compiled or not.  In float64, but for what transformers does in float32 inside (RoPE, RMSNorm), so that OPT alone is held to 1e-9.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vpgtrans.engine.data.coco import read_captions
from vpgtrans.engine.data.feature_cache import StoredFeatures, open_features
from vpgtrans.engine.data.features import LiveFeatures
from vpgtrans.engine.data.packing import CaptionData, Group
from vpgtrans.engine.models.llm import LanguageModel
from vpgtrans.engine.models.vision import load_tower
from vpgtrans.engine.models.vlm import VisionLanguageModel
from vpgtrans.engine.models.vpg import VPG
from vpgtrans.engine.recipe import QFormerConfig, Vision
from vpgtrans.engine.regions import compile_blocks
from vpgtrans.engine.runlog import RunLog
from vpgtrans.engine.runtime import start, stop

QUERIES, SEED = 4, 11
SIZES = QFormerConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_query_tokens=QUERIES, dropout=0.0,
    initializer_range=0.2,
)  # fmt: skip
TOLERANCE = {"opt": 1e-9, "llama": 2e-6, "t5": 2e-6}
# Pairs of the same update: (image, its captions).
DEALT = [(0, (0, 1, 2)), (3, (1, 3)), (1, (0,)), (2, (0, 1, 2, 4))]
BUDGETS = [(48, 1), (48, 3), (120, 2)]  # row_tokens, rows a micro-batch


@pytest.fixture(scope="module")
def tiny_t5(word_tokenizer) -> LanguageModel:
    from transformers import T5Config, T5ForConditionalGeneration

    from vpgtrans.engine.models.seq2seq import Seq2SeqLanguageModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(word_tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    return Seq2SeqLanguageModel(T5ForConditionalGeneration(config), word_tokenizer, "tiny-t5")


@pytest.fixture
def world(tiny_world, tmp_path, make_llm, tiny_t5):
    """world(family) -> (model in float64, captions, {"live" | "cached": features of groups})."""
    runtime = start("cpu", "fp32", 1, 0)
    log = RunLog(tmp_path, name="t.jsonl")

    def make(family: str):
        llm = tiny_t5 if family == "t5" else make_llm(family)
        torch.manual_seed(7)
        model = VisionLanguageModel(VPG(SIZES, 16), torch.nn.Linear(16, llm.hidden_width), llm).double()
        model.freeze_for("vpg_and_projector", False)
        found = read_captions(tiny_world / "world" / "captions_train.json", tiny_world / "world" / "images")
        rng = np.random.default_rng(0)
        special = llm.special
        reserved = {special.bos, special.eos, special.pad, special.newline}
        words = [i for i in range(llm.vocabulary_size) if i not in reserved]
        ids = [
            [llm.framed(rng.choice(words, rng.integers(1, 13)).tolist(), 32) for _ in range(5)] for _ in found.records
        ]
        data = CaptionData("scenes", found.records, ids)
        tower = load_tower(Vision(kind="eva_vit", path=tiny_world / "tower", image_size=32))
        common = {"transform": "eval", "seed": 0, "runtime": runtime, "log": log}
        live = open_features(data, tower, cache_root=None, **common)
        cached = open_features(data, tower, cache_root=tmp_path / "cache", **common)
        assert isinstance(live, LiveFeatures) and isinstance(cached, StoredFeatures)
        return model, data, {"live": live, "cached": cached}

    yield make
    log.close()
    stop()


def in_rows(model, data, features, grouped: bool, row_tokens: int, rows: int, fixed: bool):
    """(loss, gradients, pairs) by the engine's own packing."""
    groups = [Group(image, 0, captions) for image, captions in DEALT]
    if not grouped:
        groups = [Group(g.image, 0, (c,)) for g in groups for c in g.captions]
    batches = model.llm.pack(
        groups, data, QUERIES, row_tokens=row_tokens, rows_per_batch=rows, fixed_shape=fixed, split_seed=SEED
    )
    targets = sum(b.target_count for b in batches)
    loss = sum(model.loss_sum(features(b.groups).double(), b) / targets for b in batches)
    return loss.detach(), gradients(model, loss), sum(b.pair_count for b in batches)


def plain(model, data, features):
    """One pair a row behind its own encoding of the image, logits at all positions, those without a label ignored by the loss."""
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for image, captions in DEALT:
        for caption in captions:
            prompts = model.soft_prompts(features([Group(image, 0, (caption,))]).double())
            logits, labels = _logits(model, prompts, data, image, caption)
            total = total + F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
            targets += int((labels != -100).sum())
    return (total / targets).detach(), gradients(model, total / targets)


def _logits(model, prompts, data, image: int, caption: int):
    llm = model.llm
    if llm.is_encoder_decoder:
        (batch,) = llm.pack(
            [Group(image, 0, (caption,))], data, QUERIES, row_tokens=99, rows_per_batch=1, split_seed=SEED
        )
        encoder = torch.cat([prompts, llm.embed(batch.encoder_ids)], 1)
        out = llm.model(inputs_embeds=encoder, decoder_input_ids=batch.decoder_ids)
        return out.logits[0].double(), batch.labels
    ids = torch.tensor([data.ids[image][caption]])
    out = llm.model(inputs_embeds=torch.cat([prompts, llm.embed(ids)], 1))
    labels = torch.full((QUERIES + ids.shape[1],), -100)
    labels[QUERIES - 1 : -1] = ids[0]
    return out.logits[0].double(), labels


def gradients(model, loss) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def check(found, expected, tolerance: float, where: str) -> None:
    assert abs(found[0] - expected[0]) <= tolerance * abs(expected[0]), where
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert ((found[1][name] - gradient).abs().max() / scale).item() < tolerance, (where, name)


@pytest.mark.parametrize("family", ["opt", "llama", "t5"])
def test_every_combination_is_the_plain_formulation(family, world):
    model, data, features = world(family)
    expected = plain(model, data, features["live"])
    assert len(expected[1]) > 20 and all(g.abs().max() > 0 for n, g in expected[1].items() if "key.bias" not in n)
    for grouped, budget, fixed, source in itertools.product((True, False), BUDGETS, (True, False), features):
        where = f"{family}, grouped {grouped}, {budget}, fixed shape {fixed}, features {source}"
        found = in_rows(model, data, features[source], grouped, *budget, fixed)
        assert found[2] == sum(len(captions) for _, captions in DEALT), where
        check(found, expected, TOLERANCE[family], where)


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("opt", "eager"),
        *(
            pytest.param(f, b, marks=pytest.mark.slow)
            for f in ("opt", "llama", "t5")
            for b in ("aot_eager", "inductor")
        ),
    ],
)
def test_compiled_blocks_are_the_plain_formulation(family, backend, world):
    """eager: dynamo's graphs as they are; aot_eager: with autograd's ahead-of-time backward; inductor: what a run has."""
    model, data, features = world(family)
    expected = plain(model, data, features["live"])
    try:
        assert compile_blocks(model.vpg.qformer, backend) == 2
        assert compile_blocks(model.llm.model, backend) == (4 if family == "t5" else 2)
        cases = ((True, BUDGETS[1]), (False, BUDGETS[2])) if backend != "eager" else ((True, BUDGETS[2]),)
        for grouped, budget in cases:
            found = in_rows(model, data, features["cached"], grouped, *budget, False)
            check(found, expected, TOLERANCE[family], f"{family}, {backend}, grouped {grouped}, {budget}")
    finally:
        torch._dynamo.reset()


def test_a_wrong_switch_would_show(world):
    """The equalities above are no accident of weak weights: one caption less, or another image's features, changes both."""
    model, data, features = world("opt")
    expected = plain(model, data, features["live"])
    other = lambda groups: features["live"]([Group(g.image + 1, 0, g.captions) for g in groups])  # noqa: E731
    found = in_rows(model, data, other, True, *BUDGETS[0], False)
    assert abs(found[0] - expected[0]) > 1e-4 * abs(expected[0])
