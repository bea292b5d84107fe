"""The Q-Former with its cross-attention by kernels/qformer_attention.py: the same results, gradients, names and dropout's seed as without."""

from __future__ import annotations

import pytest
import torch

from vpgtrans.engine.models import cross_attention
from vpgtrans.engine.models.vpg import VPG
from vpgtrans.engine.recipe import QFormerConfig
from vpgtrans.engine.regions import compile_blocks
from vpgtrans.kernels.checks import assert_within_budget
from vpgtrans.kernels.triton_support import is_interpreted

WIDTH = 18
# heads x queries under and over the hidden width: on the CPU latents are the cheaper form with 3 queries, formed keys and values with 9.
CONFIG = QFormerConfig(
    hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=40, num_query_tokens=3, dropout=0.0, initializer_range=0.2,
)  # fmt: skip


def build(queries: int = 3, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> VPG:
    torch.manual_seed(5)
    vpg = VPG(CONFIG.model_copy(update={"num_query_tokens": queries, "dropout": dropout}), WIDTH)
    with torch.no_grad():  # an affine and biases that are not the initial ones and zeros
        for parameter in vpg.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return vpg.to(dtype)


def features(images: int = 2) -> torch.Tensor:
    return torch.randn(images, 17, WIDTH, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 3


def results(vpg: VPG, switched_on: bool, images: int = 2) -> dict[str, torch.Tensor]:
    """Output and the gradient of every parameter that trains."""
    vpg.fuses_cross_attention = switched_on
    made = vpg(features(images).to(vpg.query_tokens.dtype))
    names, parameters = zip(*((n, p) for n, p in vpg.named_parameters() if p.requires_grad), strict=True)
    weighting = torch.linspace(-1, 1, made.numel(), dtype=torch.float64).view_as(made).to(made.dtype)
    return {"output": made.detach()} | dict(zip(names, torch.autograd.grad(made, parameters, weighting), strict=True))


@pytest.mark.parametrize("queries", [3, 9])
@pytest.mark.parametrize("affine_trains", [True, False])
def test_equals_the_plain_qformer_in_float64(queries, affine_trains):
    vpg = build(queries, torch.float64)
    vpg.ln_vision.requires_grad_(affine_trains)
    plain, ours = results(vpg, False), results(vpg, True)
    assert plain.keys() == ours.keys() and ("ln_vision.weight" in plain) == affine_trains
    assert not torch.equal(plain["output"], ours["output"]), "the switch did nothing"
    for name, expected in plain.items():
        # Without it K's bias has a gradient of roundings, with it zero: it cancels in the softmax.
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("queries", [3, 9])
def test_roundings_are_those_of_the_plain_qformer(queries):
    exact = results(build(queries).double(), False)
    plain, ours = results(build(queries), False), results(build(queries), True)
    for name, expected in exact.items():
        if not name.endswith("crossattention.attention.key.bias"):
            assert_within_budget(name, ours[name], expected, plain[name])


@pytest.mark.skipif(not is_interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("affine_trains", [True, False])
def test_through_the_kernels(affine_trains, monkeypatch):
    pytest.importorskip("triton")
    from vpgtrans.kernels import qformer_latents

    calls = []
    kernel = qformer_latents.mix_forward
    monkeypatch.setattr(qformer_latents, "mix_forward", lambda *a: calls.append(1) or kernel(*a))
    exact, vpg = build(dtype=torch.float64), build()
    for model in (exact, vpg):
        model.ln_vision.requires_grad_(affine_trains)
    expected, plain, ours = results(exact, False), results(vpg, False), results(vpg, True)
    assert len(calls) == 2, "two cross layers"
    for name, right in expected.items():
        if not name.endswith("crossattention.attention.key.bias"):
            assert_within_budget(name, ours[name], right, plain[name])


@pytest.mark.parametrize("queries", [3, 9])
def test_without_gradients_and_without_images(queries):
    vpg = build(queries)
    with torch.no_grad():
        vpg.fuses_cross_attention = False
        plain = vpg(features().float())
        vpg.fuses_cross_attention = True
        torch.testing.assert_close(vpg(features().float()), plain, rtol=1e-5, atol=1e-5)
        assert vpg(features(0).float()).shape == (0, queries, 24)


def test_the_tokens_are_cast_once_and_need_no_gradient(monkeypatch):
    """Under autocast every layer reads the same tensor in the compute dtype; the affine trains through the weights."""
    seen = []
    kernel = cross_attention.qformer_attention
    monkeypatch.setattr(
        cross_attention,
        "qformer_attention",
        lambda x, tokens, *a, **k: seen.append(tokens) or kernel(x, tokens, *a, **k),
    )
    vpg = build()
    with torch.autocast("cpu", torch.bfloat16):
        got = results(vpg, True)
        expected = results(vpg, False)
    assert len(seen) == 2 and seen[0] is seen[1]
    assert seen[0].dtype == torch.bfloat16 and not seen[0].requires_grad
    exact = results(build().double(), False)
    for name in ("output", "ln_vision.weight", "ln_vision.bias", "query_tokens"):
        assert got[name].dtype == expected[name].dtype
        assert_within_budget(name, got[name].bfloat16(), exact[name], expected[name].bfloat16())


@pytest.mark.parametrize("queries", [3, 9])
def test_dropout_is_drawn_from_the_generator(queries):
    vpg = build(queries, dropout=0.4)
    torch.manual_seed(1)
    first, second = results(vpg, True, images=1), results(vpg, True, images=1)
    torch.manual_seed(1)
    again = results(vpg, True, images=1)
    assert all(torch.equal(first[n], again[n]) for n in first) and not torch.equal(first["output"], second["output"])
    vpg.eval()
    assert torch.equal(results(vpg, True)["output"], results(vpg, True)["output"])


def test_parameters_are_where_they_were():
    vpg = build()
    before = {name: tensor.data_ptr() for name, tensor in vpg.state_dict().items()}
    results(vpg, True)
    assert {name: tensor.data_ptr() for name, tensor in vpg.state_dict().items()} == before


@pytest.mark.parametrize("queries", [9, 3], ids=["formed", "latents"])
def test_blocks_may_be_compiled(queries):
    plain, vpg = build(queries), build(queries)
    plain.cross_attention_impl = vpg.cross_attention_impl = "reference"
    plain = results(plain, True)
    compile_blocks(vpg.qformer, backend="eager")
    for name, got in results(vpg, True).items():
        torch.testing.assert_close(got, plain[name], msg=lambda m, name=name: f"{name}: {m}")
