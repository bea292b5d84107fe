"""The `step` section: what is compiled or captured, when, and what is said where it cannot be."""

from __future__ import annotations

import pytest
import torch

from vpgtrans.engine import regions
from vpgtrans.engine.data.packing import CaptionData, Group
from vpgtrans.engine.models.vlm import VisionLanguageModel
from vpgtrans.engine.models.vpg import VPG
from vpgtrans.engine.recipe import QFormerConfig, RecipeError, Step, TransferData
from vpgtrans.engine.regions import graph_rows, graphs_unsupported_reason, unsupported_steps, use_regions
from vpgtrans.engine.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32, 0, 1)
IMAGES = {"captions": "/c.json", "images": "/i"}
LAYOUT = TransferData(train=[IMAGES], val=IMAGES, rows_per_micro_batch=2)
SIZES = QFormerConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    num_query_tokens=4,
    dropout=0.0,
    initializer_range=0.2,
)


@pytest.fixture
def model(make_llm) -> VisionLanguageModel:
    torch.manual_seed(0)
    llm = make_llm("llama")
    made = VisionLanguageModel(VPG(SIZES, 16), torch.nn.Linear(16, llm.hidden_width), llm)
    made.freeze_for("vpg_and_projector", False)
    return made


class Tower:
    module = torch.nn.Sequential()


def test_auto_is_off_until_measured(model, monkeypatch):
    compiled, graphed = use_regions(Step(), model, Tower, LAYOUT, CPU)
    assert not compiled.on and "benches/LOG.md" in compiled.why and compiled.exact
    assert not graphed.on and "need a CUDA GPU" in graphed.why
    assert model.llm.graphed is None and not model.has_compiled_blocks
    done = []
    monkeypatch.setattr(regions, "PAYS", frozenset({("compile", "cpu"), ("cuda_graphs", "cuda")}))
    monkeypatch.setattr(regions, "compile_blocks", lambda module, backend: done.append(module))
    assert use_regions(Step(), model, Tower, LAYOUT, CPU)[0].on
    assert done == [Tower.module, model.vpg.qformer, model.llm.model] and model.has_compiled_blocks
    assert not use_regions(Step(compile=False), model, Tower, LAYOUT, CPU)[0].on


def test_what_cannot_be_had_is_said_by_name(model, monkeypatch):
    with pytest.raises(RecipeError, match=r"step\.cuda_graphs: expected auto or false here, got true: .* CUDA GPU"):
        use_regions(Step(cuda_graphs=True), model, Tower, LAYOUT, CPU)
    assert set(unsupported_steps(Step(cuda_graphs=True), CPU.device)) == {"cuda_graphs"}
    monkeypatch.setattr(regions.shutil, "which", lambda name: None)
    assert "C++ compiler" in unsupported_steps(Step(compile=True), CPU.device)["compile"]
    assert not unsupported_steps(Step(), CPU.device)
    monkeypatch.setattr(regions.importlib.util, "find_spec", lambda name: None)
    assert "Triton" in graphs_unsupported_reason(torch.device("cuda"))


def test_sharded_blocks_are_not_captured(model, monkeypatch):
    """Gathered weights lie elsewhere each time; a captured graph reads where they were."""
    monkeypatch.setattr(regions, "graphs_unsupported_reason", lambda device: None)
    monkeypatch.setattr(model.llm, "is_sharded", True)
    with pytest.raises(RecipeError, match=r"step\.cuda_graphs: .* distribution\.frozen shards the blocks"):
        use_regions(Step(cuda_graphs=True), model, Tower, LAYOUT, CPU)


def test_only_full_micro_batches_with_gradients_run_through_the_graph(model):
    """What a capture needs: always the same shape, and a backward pass.  Everything else takes the plain way, with the same result."""
    special = model.llm.special
    ids = [[[special.bos, 5, 6, 7, special.newline]] * 3 for _ in range(5)]
    data = CaptionData("test", [None] * 5, ids)
    groups = [Group(i, 0, (0, 1, 2)) for i in range(5)]
    batches = model.llm.pack(groups, data, 4, row_tokens=40, rows_per_batch=2, fixed_shape=True)
    assert [len(b.ids) for b in batches] == [2, 1]
    features = torch.randn(5, 6, 16)
    plain = [model.loss_sum(features[: len(b.groups)], b) for b in batches]
    calls = []

    def counting(graph, inputs):
        calls.append([tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor)])
        return graph.forward

    graph_rows(model.llm, 2, backend=counting)
    try:
        graphed = [model.loss_sum(features[: len(b.groups)], b) for b in batches]
        assert calls and all(shape[0] != 1 or len(shape) < 3 for shapes in calls for shape in shapes)
        before = len(calls)
        with torch.no_grad():
            model.loss_sum(features[: len(batches[0].groups)], batches[0])
        again = model.loss_sum(features[: len(batches[0].groups)], batches[0])
        assert len(calls) == before  # one capture serves all, and validation takes none
    finally:
        torch._dynamo.reset()
    for found, expected in zip([*graphed, again], [*plain, plain[0]], strict=True):
        torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(plain[0], [model.projector.weight])[0]
    torch.testing.assert_close(torch.autograd.grad(again, [model.projector.weight])[0], wanted)
    assert "graphed" not in dict(model.named_modules()) and "llm.graphed" not in dict(model.named_modules())
