"""Model parts against transformers' own, and the adapter's contract."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel

from vpgtrans.engine.data.images import load_pixels, normalise
from vpgtrans.engine.evaluation import evaluating
from vpgtrans.engine.models.causal import CausalLanguageModel
from vpgtrans.engine.models.llm import ModelError, load_language_model, special_tokens
from vpgtrans.engine.models.qformer import QFormer
from vpgtrans.engine.models.vision import MobileNetV2, eva_vit, load_tower
from vpgtrans.engine.models.vlm import VisionLanguageModel
from vpgtrans.engine.models.vpg import LN_VISION_EPS, VPG
from vpgtrans.engine.recipe import Generation, QFormerConfig, Vision

CONFIG = QFormerConfig(
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=40,
    num_query_tokens=5,
    dropout=0.0,
    initializer_range=0.2,
)


def transformers_qformer() -> Blip2QFormerModel:
    torch.manual_seed(0)
    config = Blip2QFormerConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=40, encoder_hidden_size=18, cross_attention_frequency=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, use_qformer_text_input=False,
    )  # fmt: skip
    return Blip2QFormerModel(config).eval()


def test_qformer_equals_transformers():
    theirs = transformers_qformer()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    ours = QFormer(CONFIG, 18)
    ours.load_state_dict(theirs.state_dict())  # the same names, none missing, none unexpected
    queries, image = torch.randn(2, 5, 24), torch.randn(2, 7, 18)
    expected = theirs(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
    assert torch.allclose(ours.eval()(queries, image), expected, atol=2e-6)


def test_qformer_dropout_is_a_mode():
    config = CONFIG.model_copy(update={"dropout": 0.5})
    model = QFormer(config, 18)
    queries, image = torch.randn(2, 5, 24), torch.randn(2, 7, 18)
    assert not torch.equal(model(queries, image), model(queries, image))
    model.eval()
    assert torch.equal(model(queries, image), model(queries, image))


def test_text_branch_shares_attention_and_not_feed_forward():
    model = QFormer(CONFIG, 18, text_branch=True).eval()
    text = torch.randn(2, 6, 24)
    alone = model(None, None, text)
    assert alone.shape == (2, 6, 24)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.intermediate_query.dense.weight.zero_()
    assert torch.equal(model(None, None, text), alone)


def test_vit_is_blip2s_without_its_last_norm():
    config = Blip2VisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        initializer_range=0.2,
    )
    ours = eva_vit(config).eval()
    theirs = Blip2VisionModel(config).eval()
    theirs.load_state_dict(
        {**ours.model.state_dict(), **{k: v for k, v in theirs.state_dict().items() if "post_layernorm" in k}}
    )
    images = torch.randn(2, 3, 28, 28)
    features = ours(images)
    assert features.shape == (2, 5, 16)
    assert torch.allclose(theirs.post_layernorm(features), theirs(pixel_values=images).last_hidden_state, atol=1e-6)
    assert LN_VISION_EPS == VPG(CONFIG, 16).ln_vision.eps == 1e-5


def test_mobilenet_equals_the_published_layers(measuring_data):
    """The same features as the module that came with the weights, on photographs."""
    spec = importlib.util.spec_from_file_location(
        "published", measuring_data / "mobilenetv2_imagenet" / "mobilenetv2.py"
    )
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    theirs = published.MobileNetV2.load(str(measuring_data / "mobilenetv2_imagenet" / "model.safetensors"))
    tower = load_tower(Vision(kind="mobilenet_v2", path=measuring_data / "mobilenetv2_imagenet"))
    files = sorted((measuring_data / "flickr8k" / "images").glob("*.jpg"))[:3]
    images = normalise(torch.stack([load_pixels(f, 224) for f in files]), tower.norm.mean, tower.norm.std)
    with torch.no_grad():
        expected = theirs.features(images).flatten(2).transpose(1, 2)
    assert (tower.width, tower.tokens) == (1280, 49) == expected.shape[:0:-1]
    assert torch.allclose(tower.features(images), expected, atol=1e-4)


def test_mobilenet_gives_a_grid():
    assert MobileNetV2().eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 1280)


@pytest.mark.parametrize("family", ["opt", "opt-350m", "llama"])
def test_contract_holds(family, make_llm):
    make_llm(family).check_contract()


def test_contract_finds_a_model_that_ignores_its_mask(make_llm, monkeypatch):
    llm = make_llm("llama")
    whole = llm.hidden_states
    monkeypatch.setattr(llm, "hidden_states", lambda x, p, m: whole(x, p, torch.ones_like(m).tril()))
    with pytest.raises(ModelError, match="shared prefix"):
        llm.check_contract()


def test_embed_is_what_enters_the_first_block(make_llm):
    """The plain forward of ids through transformers, before our rewrite, equals embed + hidden_states after it."""
    torch.manual_seed(0)
    before = make_llm("opt-350m")
    ids = torch.tensor([[1, 5, 6, 7]])
    seen = {}
    hook = before.model.model.decoder.layers[0].register_forward_pre_hook(
        lambda m, a, k: seen.update(x=a[0]), with_kwargs=True
    )
    before.model(input_ids=ids)
    hook.remove()
    positions = before.model.model.decoder.embed_positions(torch.ones(1, 4, dtype=torch.long))
    assert torch.allclose(seen["x"] - positions, before.embed(ids), atol=1e-6)


def test_caption_ids(make_llm):
    llm = make_llm("llama")
    special, text = llm.special, llm.text_ids("a small red circle on white")
    assert llm.caption_ids("a small red circle on white", 32) == [special.bos, *text, special.newline]
    assert llm.caption_ids("a small red circle on white", 4) == [special.bos, *text[:3]]  # cut: it does not end there
    assert special == special_tokens(llm.tokenizer)


def test_an_encoder_decoder_is_refused(word_tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(ModelError, match="decoder-only"):
        CausalLanguageModel(T5ForConditionalGeneration(config), word_tokenizer)


def model_of(llm) -> VisionLanguageModel:
    torch.manual_seed(5)
    model = VisionLanguageModel(
        VPG(CONFIG.model_copy(update={"dropout": 0.2}), 18), torch.nn.Linear(24, llm.hidden_width), llm
    )
    with torch.no_grad():
        model.projector.weight.mul_(8)
    return model


@pytest.mark.parametrize("family", ["opt", "opt-350m", "llama"])
def test_greedy_generation_follows_the_training_layout(family, make_llm):
    """generate() must continue exactly where the packed loss would: the same visual prefix, BOS, positions and mask, step by step."""
    model = model_of(make_llm(family)).eval()
    features = torch.randn(3, 7, 18)
    special = model.llm.special
    (answers, prompts) = (6, ["", "a small red", "there is a large green star"])
    generated = model.generate(features, prompts, Generation(num_beams=1, max_new_tokens=answers, min_new_tokens=0))
    for row, prompt in enumerate(prompts):
        ids = [special.bos, *model.llm.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        told: list[int] = []
        while len(told) < answers and (not told or told[-1] not in (special.eos, special.newline)):
            inputs = torch.cat(
                [model.soft_prompts(features[row : row + 1]), model.llm.embed(torch.tensor([ids + told]))], 1
            )
            length = inputs.shape[1]
            mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            hidden = model.llm.hidden_states(inputs, torch.arange(length)[None], mask)
            told.append(int(model.llm.logits(hidden[0, -1:]).argmax()))
        assert generated[row] == model.llm.tokenizer.decode(told, skip_special_tokens=True).strip()


def test_stages_freeze_what_they_say(make_llm):
    model = model_of(make_llm("llama"))
    model.freeze_for("projector", frozen_dropout=False)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"projector"}
    assert not model.vpg.training and not model.llm.training
    model.freeze_for("projector", frozen_dropout=True)
    assert model.vpg.training and model.llm.training
    model.freeze_for("vpg_and_projector", frozen_dropout=False)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"vpg", "projector"}
    assert model.vpg.training and not model.llm.training


def test_evaluating_gives_every_part_its_own_mode_back(make_llm):
    model = model_of(make_llm("llama"))
    model.freeze_for("vpg_and_projector", frozen_dropout=False)
    modes = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes and any(modes) and not all(modes)


def test_paper_sizes():
    """BLIP-2: 105.1 M in the Q-Former; stage 2 trains 108,314,880 and stage 1 3,149,824 parameters at width 4096."""
    with torch.device("meta"):
        vpg, projector = VPG(QFormerConfig(), 1408), torch.nn.Linear(768, 4096)
    stage_1 = sum(p.numel() for p in projector.parameters())
    stage_2 = stage_1 + sum(p.numel() for p in vpg.parameters())
    assert (stage_1, stage_2) == (3_149_824, 108_314_880)


@pytest.fixture
def llama_folder(make_llm, tmp_path):
    llm = make_llm("llama")
    llm.model.save_pretrained(tmp_path / "llm")
    llm.tokenizer.save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


def test_a_folder_that_lacks_a_tensor_is_refused(llama_folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama_folder / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "layers.1.mlp.down_proj" not in k},
        llama_folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=r"1 tensors .*layers\.1\.mlp\.down_proj"):
        load_language_model(llama_folder)
    (llama_folder / "model.safetensors").write_bytes((llama_folder / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(ModelError, match="expected a language model folder"):
        load_language_model(llama_folder)


def test_a_folders_generation_settings_do_not_leak(llama_folder):
    """Its repetition penalty would change every caption, unrecorded."""
    from transformers import GenerationConfig

    prompts = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    settings = Generation(num_beams=2, max_new_tokens=8, min_new_tokens=0)
    before = load_language_model(llama_folder).generate_ids(prompts, [""] * 3, settings)
    GenerationConfig(
        repetition_penalty=1.8, no_repeat_ngram_size=2, min_length=7, suppress_tokens=[5, 6]
    ).save_pretrained(llama_folder)
    assert torch.equal(load_language_model(llama_folder).generate_ids(prompts, [""] * 3, settings), before)


def test_soft_capped_attention_takes_the_packed_mask(word_tokenizer, tmp_path):
    """Gemma 2 runs in eager attention, which adds its mask to the scores."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(word_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    llm = load_language_model(tmp_path)  # its contract is checked
    assert llm.model.config._attn_implementation == "eager"
