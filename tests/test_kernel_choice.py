"""Which kernels a run uses: nothing unmeasured by itself, and a clear word where what was asked for cannot run."""

from __future__ import annotations

import json

import pytest
import torch

from vpgtrans.engine import kernel_choice
from vpgtrans.engine.kernel_choice import use_kernels
from vpgtrans.engine.loop import run
from vpgtrans.engine.models import causal
from vpgtrans.engine.models.attention import PREFIX
from vpgtrans.engine.models.llm import ModelError
from vpgtrans.engine.models.vlm import VisionLanguageModel
from vpgtrans.engine.models.vpg import VPG
from vpgtrans.engine.recipe import Kernels, QFormerConfig, RecipeError, load_recipe
from vpgtrans.engine.runtime import start, stop
from vpgtrans.kernels.triton_support import is_interpreted


@pytest.fixture
def choose(make_vlm, no_tower):
    """choose(llm, prefix_attention="on", ...) -> {name: Choice} on the CPU."""
    runtime = start("cpu", "fp32", 1, 0)
    yield lambda llm, **asked: {
        c.name: c for c in use_kernels(Kernels(**asked), make_vlm(llm), no_tower, runtime, None)
    }
    stop()


def test_nothing_unmeasured_is_on_by_itself(make_llm, choose):
    llm = make_llm("llama")
    found = choose(llm)
    assert set(found) == set(Kernels.model_fields)
    assert not any(choice.on for choice in found.values()) and not llm.fuses_head
    assert llm.model.config._attn_implementation == "sdpa"
    assert not found["frozen_linear"].exact and found["adamw_step"].exact
    assert "32 queries and heads of 4: latents cost no less" in found["qformer_attention"].why


def test_on_the_cpu_blip2s_qformer_reads_through_latents(make_llm, no_tower):
    """Measured there (benches/results/step_latents_cpu_2026-11-23.json); `kernels.qformer_attention=torch` is the way back."""
    llm = make_llm("llama")
    with torch.device("meta"):
        vpg = VPG(QFormerConfig(), 1408)
    no_tower.tokens = 257
    runtime = start("cpu", "fp32", 1, 0)
    try:
        for asked, on in ((Kernels(), True), (Kernels(qformer_attention="torch"), False)):
            vpg.fuses_cross_attention, vpg.cross_attention_impl = False, None
            model = VisionLanguageModel(vpg, torch.nn.Linear(768, llm.hidden_width), llm)
            found = {c.name: c for c in use_kernels(asked, model, no_tower, runtime, None)}["qformer_attention"]
            assert (found.on, found.exact, vpg.fuses_cross_attention) == (on, True, on)
            assert vpg.cross_attention_impl == ("reference" if on else None)  # also under Triton's interpreter
            assert kernel_choice.fuses_cross_attention_on_cpu(asked, vpg, 257) == on
    finally:
        stop()


def test_when_a_model_uses_prefix_attention(make_llm, choose, monkeypatch):
    """kernel: with a reason where it cannot run; auto, once measured: left out where it cannot; the contract is checked through the kernels."""
    llm = make_llm("llama")
    monkeypatch.setattr(causal, "triton_unsupported_reason", lambda device: "compute capability 7.5")
    assert "compute capability 7.5" in choose(llm)["prefix_attention"].why
    with pytest.raises(
        RecipeError, match=r"kernels\.prefix_attention: expected auto or torch here, got kernel: compute capability"
    ):
        choose(llm, prefix_attention="kernel")
    monkeypatch.setattr(causal, "triton_unsupported_reason", lambda device: None)
    monkeypatch.setattr(kernel_choice, "MEASURED_ON_CPU", frozenset({"prefix_attention"}))
    with monkeypatch.context() as broken:
        fault = ModelError("tiny does not honour a prefix")
        broken.setattr(llm, "check_contract", lambda: (_ for _ in ()).throw(fault))
        assert "does not honour" in choose(llm)["prefix_attention"].why
        assert llm.model.config._attn_implementation == "sdpa"
        with pytest.raises(RecipeError, match="does not honour"):
            choose(llm, prefix_attention="kernel")
    assert not choose(llm, prefix_attention="torch")["prefix_attention"].on
    if is_interpreted():
        assert choose(llm)["prefix_attention"].on and llm.model.config._attn_implementation == PREFIX


def test_scaled_or_projected_words_are_not_assembled(make_llm, choose):
    assert "projected" in choose(make_llm("opt-350m"))["prompt_assembly"].why
    assert "projected" not in choose(make_llm("opt"))["prompt_assembly"].why


def test_fp8_is_for_gpus(make_llm, choose):
    with pytest.raises(RecipeError, match=r"kernels\.frozen_linear: .* on the CPU"):
        choose(make_llm("llama"), frozen_linear="kernel")


def test_the_first_half_of_the_model(make_llm, make_vlm, no_tower, choose):
    """The cross-attention's cheaper form is torch's own operations too; the projector's rows are packed ones."""
    model = make_vlm(make_llm("llama"))
    runtime = start("cpu", "fp32", 1, 0)
    asked = Kernels(qformer_attention="kernel", projector_converter="kernel")
    if is_interpreted():
        use_kernels(asked, model, no_tower, runtime, None)
        assert model.vpg.fuses_cross_attention and model.projects_into_rows
        assert not VisionLanguageModel.projects_into_rows and not VPG.fuses_cross_attention
    assert choose(make_llm("llama"), qformer_attention="kernel")["qformer_attention"].on


@pytest.mark.skipif(not is_interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize(
    ("names", "stages"),
    [
        (("prefix_attention", "prompt_assembly", "linear_cross_entropy", "adamw_step"), ("warm_up", "direct")),
        # While the VPG trains its dropout draws other masks.
        (("qformer_attention", "projector_converter"), ("warm_up",)),
    ],
)
def test_training_with_kernels_is_training(names, stages, tiny_recipe, tmp_path):
    """By the kernels, in the interpreter: the same losses within rounding as without."""
    pytest.importorskip("triton")
    short = [
        "stages.0.pairs=11", "stages.1.pairs=11", "evaluation.generate_images=0", "data.row_tokens=64", "output.log_every_updates=1",
        "stages.0.eval_every_pairs=11", "stages.1.eval_every_pairs=11", "evaluation.loss_images=1",
    ]  # fmt: skip
    run(load_recipe(tiny_recipe, short))
    run(
        load_recipe(
            tiny_recipe, [*short, *(f"kernels.{n}=kernel" for n in names), f"output.folder={tmp_path / 'kernels'}"]
        )
    )

    def losses(folder):
        events = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        return [e[k] for e in events for k in ("loss", "val_loss", "grad_norm") if k in e and e["stage"] in stages]

    plain, ours = losses(tmp_path / "run"), losses(tmp_path / "kernels")
    assert len(plain) >= 3 * len(stages) and torch.allclose(torch.tensor(ours), torch.tensor(plain), rtol=2e-4)
    assert plain != ours, "the kernels did not run"
