"""Grouped, packed rows against the plain formulation, one pair a row: same loss, same gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vpgtrans.engine.data.packing import CaptionData, Group, pack_update
from vpgtrans.engine.models.vlm import VisionLanguageModel
from vpgtrans.engine.models.vpg import VPG
from vpgtrans.engine.recipe import QFormerConfig

QUERIES = 5
CONFIG = QFormerConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=32,
    num_query_tokens=QUERIES,
    dropout=0.0,
    initializer_range=0.2,
)
FAMILIES = ("opt", "opt-350m", "llama")


def build(llm) -> VisionLanguageModel:
    torch.manual_seed(7)
    model = VisionLanguageModel(VPG(CONFIG, 10), torch.nn.Linear(24, llm.hidden_width), llm).double()
    model.freeze_for("vpg_and_projector", False)
    return model


def captions(llm, counts: list[int]) -> CaptionData:
    """Random captions of 1 to 12 words for each image."""
    rng = np.random.default_rng(0)
    special = llm.special
    words = [i for i in range(llm.vocabulary_size) if i not in (special.bos, special.eos, special.pad, special.newline)]
    ids = [
        [[special.bos, *rng.choice(words, rng.integers(1, 13)).tolist(), special.newline] for _ in range(n)]
        for n in counts
    ]
    return CaptionData("test", [None] * len(counts), ids)


def one_pair_a_row(
    model: VisionLanguageModel, features: torch.Tensor, data: CaptionData, groups: list[Group]
) -> tuple[torch.Tensor, int]:
    """The reference's way: every caption in a row of its own behind its own encoding of the image, no packing, no mask but causal."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index, group in enumerate(groups):
        for caption in group.captions:
            ids = torch.tensor([data.ids[group.image][caption]])
            inputs = torch.cat([model.soft_prompts(features[index : index + 1]), model.llm.embed(ids)], 1)
            length = inputs.shape[1]
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            hidden = model.llm.hidden_states(inputs, torch.arange(length)[None], mask)
            logits = model.llm.logits(hidden[0, QUERIES - 1 : -1])  # the last visual position predicts BOS
            total = total + F.cross_entropy(logits, ids[0], reduction="sum")
            count += ids.shape[1]
    return total, count


def gradients(model: VisionLanguageModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("row_tokens", "rows"), [(40, 1), (40, 3), (120, 2), (19, 8)])
def test_equals_one_pair_a_row(family, row_tokens, rows, make_llm):
    """Several images a row, several rows, and (19) groups that are split over rows; also with only part of an image's captions."""
    model = build(make_llm(family))
    data = captions(model.llm, [3, 1, 5, 2])
    groups = [Group(0, 0, (0, 1, 2)), Group(2, 0, (1, 3, 4)), Group(1, 0, (0,)), Group(3, 0, (1,))]
    features = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_image = {g.image: features[i] for i, g in enumerate(groups)}
    batches = pack_update(groups, data, QUERIES, row_tokens, rows, model.llm.special.pad)
    packed = sum(model.loss_sum(torch.stack([by_image[g.image] for g in b.groups]), b) for b in batches)
    plain, count = one_pair_a_row(model, features, data, groups)
    assert sum(b.target_count for b in batches) == count
    assert packed.item() == pytest.approx(plain.item(), rel=1e-7)  # RoPE is float32 inside transformers
    expected, got = gradients(model, plain / count), gradients(model, packed / count)
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert ((got[name] - gradient).abs().max() / scale).item() < 1e-6, name


def test_bos_is_predicted_once_for_each_caption(make_llm):
    model = build(make_llm("llama"))
    data = captions(model.llm, [4])
    (batch,) = pack_update([Group(0, 0, (0, 1, 2, 3))], data, QUERIES, 200, 1, 0)
    at_last_visual = batch.labels[batch.predict == QUERIES - 1]
    assert at_last_visual.tolist() == [model.llm.special.bos] * 4


def test_a_wrong_mask_would_show(make_llm):
    """The equality above is no accident of weak attention: letting captions see one another changes the loss."""
    model = build(make_llm("llama"))
    data = captions(model.llm, [3])
    (batch,) = pack_update([Group(0, 0, (0, 1, 2))], data, QUERIES, 200, 1, 0)
    features = torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    right = model.loss_sum(features, batch).item()
    batch.segments[..., 2] = 0  # every caption starts with the row
    assert abs(model.loss_sum(features, batch).item() - right) > 1e-2


def test_fixed_shape_pads_without_effect(make_llm):
    model = build(make_llm("opt"))
    data = captions(model.llm, [2, 3])
    groups = [Group(0, 0, (0, 1)), Group(1, 0, (0, 1, 2))]
    features = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (tight,) = pack_update(groups, data, QUERIES, 120, 2, 0)
    (fixed,) = pack_update(groups, data, QUERIES, 120, 2, 0, fixed_shape=True)
    assert fixed.ids.shape[1] == 120 > tight.ids.shape[1]
    assert model.loss_sum(features, fixed).item() == pytest.approx(model.loss_sum(features, tight).item(), rel=1e-9)
