"""The projector writing into the language model's packed rows: the same loss and gradients as with a projector in front, in both stages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vpgtrans.engine.data.packing import CaptionData, Group, PackedBatch, pack_update
from vpgtrans.engine.models.vlm import VisionLanguageModel
from vpgtrans.engine.models.vpg import VPG
from vpgtrans.engine.recipe import QFormerConfig
from vpgtrans.kernels import projector_converter
from vpgtrans.kernels.checks import assert_within_budget
from vpgtrans.kernels.triton_support import is_interpreted

QUERIES = 4
CONFIG = QFormerConfig(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, num_query_tokens=QUERIES, dropout=0.0,
    initializer_range=0.2,
)  # fmt: skip
FEATURES = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def build(llm, stage: str) -> VisionLanguageModel:
    torch.manual_seed(7)
    model = VisionLanguageModel(VPG(CONFIG, 10), torch.nn.Linear(24, llm.hidden_width), llm)
    model.freeze_for(stage, False)
    return model


def packed(llm) -> PackedBatch:
    """Nine captions of three images in rows of 24: groups are split over rows, so that one prompt goes to several places."""
    rng = np.random.default_rng(0)
    ids = [
        [[llm.special.bos, *rng.integers(3, 20, rng.integers(2, 6)).tolist(), llm.special.newline] for _ in range(n)]
        for n in (5, 1, 3)
    ]
    groups = [Group(i, 0, tuple(range(len(captions)))) for i, captions in enumerate(ids)]
    (batch,) = pack_update(groups, CaptionData("x", [None] * 3, ids), QUERIES, 24, 8, llm.special.pad)
    assert len(batch.visual_source) > 3 * QUERIES
    return batch


def results(model: VisionLanguageModel, into_rows: bool) -> dict[str, torch.Tensor]:
    """The loss and the gradient of every parameter that trains."""
    model.projects_into_rows = into_rows
    batch = packed(model.llm)
    loss = model.loss_sum(FEATURES[: len(batch.groups)].to(model.projector.weight.dtype), batch)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return {"loss": loss.detach()} | dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("stage", ["projector", "vpg_and_projector"])
@pytest.mark.parametrize("family", ["llama", "opt", "opt-350m"])
def test_equals_a_projector_in_front(family, stage, make_llm):
    """In float64, by torch: words that are projected before the first block (OPT-350M) too."""
    model = build(make_llm(family), stage).double()
    plain, ours = results(model, False), results(model, True)
    assert plain.keys() == ours.keys() and len(plain) == (3 if stage == "projector" else len(plain))
    for name, expected in plain.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.skipif(not is_interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("stage", ["projector", "vpg_and_projector"])
def test_through_the_kernel(stage, make_llm, monkeypatch):
    pytest.importorskip("triton")
    calls = []
    kernel = projector_converter.scatter_linear
    monkeypatch.setattr(projector_converter, "scatter_linear", lambda *a: calls.append(1) or kernel(*a))
    model = build(make_llm("llama"), stage)
    plain, ours = results(model, False), results(model, True)
    exact = results(build(make_llm("llama"), stage).double(), False)
    assert calls == [1]
    for name, right in exact.items():
        # K's bias cancels in the softmax: its gradient is nothing but roundings.
        if not name.endswith("attention.key.bias"):
            assert_within_budget(name, ours[name], right, plain[name])


def test_a_stage_keeps_what_its_gradients_need(make_llm):
    """While only the projector trains, nothing is kept for the gradient of what it reads, and that is not computed."""
    for stage, weight_is_kept in (("projector", False), ("vpg_and_projector", True)):
        model = build(make_llm("llama"), stage)
        model.projects_into_rows = True
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.data_ptr()) or t, lambda t: t):
            loss = model.loss_sum(FEATURES.float(), packed(model.llm))
        assert (model.projector.weight.data_ptr() in kept) == weight_is_kept
        loss.backward()
        assert model.projector.bias.grad is not None
        assert (model.vpg.query_tokens.grad is not None) == weight_is_kept


def test_evaluation_and_autocast(make_llm):
    model = build(make_llm("llama"), "projector")
    with torch.no_grad():
        torch.testing.assert_close(results_loss(model, True), results_loss(model, False))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(results_loss(model, True), results_loss(model, False), rtol=2e-2, atol=0)


def results_loss(model: VisionLanguageModel, into_rows: bool) -> torch.Tensor:
    model.projects_into_rows = into_rows
    return model.loss_sum(FEATURES.float(), packed(model.llm))
