"""Word converter, token overlap and merge, against what they must give exactly."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from vpgtrans.engine.models.llm import ModelError
from vpgtrans.engine.pretrain.tokenizer import train_word_level
from vpgtrans.engine.pretrain.vocabulary import load_tokenizer, trim_tokenizer
from vpgtrans.engine.recipe import Converter
from vpgtrans.engine.transfer.converter import fit, fit_converter, fit_ridge, fit_sgd_cosine
from vpgtrans.engine.transfer.merge import merge, norm_ratio
from vpgtrans.engine.transfer.overlap import detect_scheme, shared_tokens, spelling


def pairs(count: int = 400, source: int = 12, target: int = 20, noise: float = 0.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, source, generator=generator, dtype=torch.float64) + 1.5
    weight = torch.randn(target, source, generator=generator, dtype=torch.float64)
    y = (
        x @ weight.T
        + torch.arange(target)
        + noise * torch.randn(count, target, generator=generator, dtype=torch.float64)
    )
    return x, y, weight


def test_ridge_recovers_a_linear_map():
    x, y, weight = pairs()
    found = fit_ridge(x, y, 1e-12)
    assert torch.allclose(found.weight, weight, atol=1e-8)
    assert torch.allclose(found.bias, torch.arange(20, dtype=torch.float64), atol=1e-7)


def test_ridge_equals_its_normal_equations():
    """Against the definition: the gradient of the penalised sum of squares is zero at the solution."""
    x, y, _ = pairs(noise=1.0)
    found = fit_ridge(x, y, 0.3)
    centred = x - x.mean(0)
    penalty = 0.3 * centred.pow(2).sum() / x.shape[1]
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    loss = (x @ weight.T + bias - y).pow(2).sum() + penalty * weight.pow(2).sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-6 * loss.item()


def test_ridge_is_chosen_on_held_out_tokens():
    """Fewer tokens than dimensions and much noise: the unpenalised fit is worse on held-out tokens, and is not chosen."""
    x, y, _ = pairs(count=60, source=48, noise=8.0)
    _, report = fit(x, y, Converter(held_out=0.3), seed=0)
    assert report.ridge is not None and report.ridge >= 1e-2
    assert report.held_out_tokens == 18
    assert report.cosine < report.cosine_fitted


def test_sgd_on_cosine_finds_the_direction():
    x, y, _ = pairs()
    found = fit_sgd_cosine(x, y, Converter(method="sgd_cosine", sgd_learning_rate=1.0, sgd_steps=800), seed=0)
    assert torch.nn.functional.cosine_similarity(found(x), y, dim=1).mean() > 0.98


def test_quality_is_poor_where_nothing_carries_over():
    """The report can fail: unrelated embeddings give a low held-out cosine and no right neighbours to speak of."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(300, 16, generator=generator).double(), torch.randn(300, 16, generator=generator).double()
    _, report = fit(x, y, Converter(held_out=0.2), seed=0)
    assert report.cosine < 0.3 and report.nearest < 0.2


def test_merge_is_exact():
    x, y, _ = pairs()
    converter = fit_ridge(x, y, 1e-3)
    projector = torch.nn.Linear(7, 12)
    inputs = torch.randn(5, 7)
    expected = projector.double()(inputs.double()) @ converter.weight.T + converter.bias
    merged = merge(projector, converter)
    assert (merged(inputs).double() - expected).abs().max() / expected.abs().max() < 1e-6
    assert merged.weight.shape == (20, 7)


def test_merge_refuses_widths_that_do_not_meet():
    x, y, _ = pairs()
    with pytest.raises(ValueError, match="width 9"):
        merge(torch.nn.Linear(7, 9), fit_ridge(x, y, 1.0))


def test_norm_ratio():
    assert norm_ratio(torch.full((2, 3, 4), 5.0), torch.full((6, 9), 1.0)) == pytest.approx(10.0 / 3.0)


def test_no_converter_where_embeddings_are_the_same(make_llm):
    source, target = make_llm("llama", seed=3), make_llm("llama", seed=3)
    converter, report = fit_converter(source, target, Converter(), 0)
    assert converter is None and report.method == "identity"
    other = make_llm("llama", seed=4)
    converter, report = fit_converter(source, other, Converter(), 0)
    assert converter is not None and report.method == "ridge"


def test_word_embeddings_of_opt_350m_are_projected(make_llm):
    llm = make_llm("opt-350m")
    decoder = llm.model.model.decoder
    ids = torch.tensor([3, 5])
    raw = decoder.embed_tokens.embedding.weight[ids]
    assert raw.shape[1] == 16 and llm.word_embeddings().shape[1] == 32
    assert torch.allclose(llm.word_embeddings()[ids], raw @ decoder.embed_tokens.project_in.weight.T)


@pytest.mark.parametrize(
    ("token", "scheme", "expected"),
    [
        ("Ġdog", "byte_level", (True, "dog")),
        ("ing", "byte_level", (False, "ing")),
        ("Ċ", "byte_level", (False, "\n")),
        ("Ġ", "byte_level", (False, " ")),
        ("Ã©", "byte_level", (False, "é")),
        ("▁dog", "sentencepiece", (True, "dog")),
        ("ing", "sentencepiece", (False, "ing")),
        ("<0x0A>", "sentencepiece", (False, "\n")),
        ("▁", "sentencepiece", (False, " ")),
        ("dog", "wordpiece", (True, "dog")),
        ("##ing", "wordpiece", (False, "ing")),
        ("dog", "word", (True, "dog")),
        ("?", "word", (False, "?")),
    ],
)
def test_spelling(token, scheme, expected):
    assert spelling(token, scheme) == expected


def vocabulary(tokens: list[str]) -> PreTrainedTokenizerFast:
    specials = {"</s>": 0}
    tokenizer = Tokenizer(models.WordLevel(specials | {t: i + 1 for i, t in enumerate(tokens)}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="</s>")


def test_overlap_across_word_boundary_marks():
    source = vocabulary(["Ġdog", "dog", "Ġcat", "ing", "Ċ"])
    target = vocabulary(["▁cat", "▁dog", "<0x0A>", "house", "ing"])
    assert detect_scheme(source) == "byte_level" and detect_scheme(target) == "sentencepiece"
    assert shared_tokens(source, target) == [(0, 0), (1, 2), (3, 1), (4, 5), (5, 3)]


def test_too_few_shared_tokens_is_an_error(make_llm):
    few = make_llm("llama", tokenizer=train_word_level(["completely other words here"]), width=24)
    with pytest.raises(ModelError, match="at least 16"):
        fit_converter(few, make_llm("llama", width=32), Converter(), 0)


def test_tokenizer_of_another_model_is_refused(make_llm, word_tokenizer):
    small = make_llm("llama", tokenizer=train_word_level(["a b c"]))
    with pytest.raises(ModelError, match="belongs to another model"):
        type(small)(small.model, word_tokenizer, "x")


def test_real_tokenizers_overlap_and_trim(measuring_data):
    """Of the 2,000 commonest caption words 1,002 are one token in both; the whole vocabularies share far more pieces."""
    opt, llama = (load_tokenizer(measuring_data / "tokenizers" / name) for name in ("opt", "llama"))
    found = dict(shared_tokens(opt, llama))
    for word in ("photo", "dog", "street"):
        source = opt(f" {word}", add_special_tokens=False)["input_ids"]
        target = llama(word, add_special_tokens=False)["input_ids"]
        assert len(source) == len(target) == 1 and found[source[0]] == target[0]
    assert len(found) > 10_000
    texts = ["a dog runs on the beach"] * 3 + ["two people sitting at a table"] * 3
    trimmed, real = trim_tokenizer(opt, texts, 2)
    for text in texts:
        ids = trimmed(text, add_special_tokens=False)["input_ids"]
        assert [real[i] for i in ids] == opt(text, add_special_tokens=False)["input_ids"]
        assert trimmed.decode(ids) == text
    assert len(trimmed) == len(real) < 1000
