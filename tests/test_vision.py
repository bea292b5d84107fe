"""Vision towers against transformers' own modules, with random weights saved in the real formats and loaded back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    MobileNetV2Config,
    MobileNetV2Model,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from vpgtrans.engine.checkpoint import CheckpointError
from vpgtrans.engine.data.images import CLIP_MEAN, CLIP_STD
from vpgtrans.engine.models.llm import ModelError
from vpgtrans.engine.models.vision import build_tower_on_meta, eva_tower_from_tensors, eva_vit_g_config, load_tower
from vpgtrans.engine.recipe import Vision, load_recipe, save_recipe

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
NORM = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def spread(model):
    """Random weights of a size at which every block changes the output; batch norms get statistics of their own."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "running_var" in name else tensor.normal_(std=0.3)
    return model.eval()


def save(model, folder: Path, processor: dict | None = None) -> Path:
    spread(model).save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def pixels(side: int = 28) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def assert_contract(tower, images: torch.Tensor) -> None:
    """What every tower promises: its shape, eval mode whatever is asked, nothing to train, no graph, and the same on the meta device."""
    features = tower.features(images.requires_grad_())
    assert features.shape == (len(images), tower.tokens, tower.width)
    assert not features.requires_grad and not any(p.requires_grad for p in tower.parameters())
    tower.train()
    assert not any(m.training for m in tower.modules())
    assert images.shape[-1] == tower.image_size
    assert tower.parameter_count == sum(p.numel() for p in tower.parameters())


def assert_same_on_meta(tower, settings: Vision) -> None:
    meta = build_tower_on_meta(settings)
    assert all(t.is_meta for t in meta.state_dict().values())
    described = [{k: t.shape for k, t in m.state_dict().items()} for m in (tower, meta)]
    assert described[0] == described[1]
    assert (meta.tokens, meta.width, meta.image_size) == (tower.tokens, tower.width, tower.image_size)


def test_eva_from_a_sharded_blip2_folder(tmp_path):
    config = Blip2Config(
        vision_config=SIZES,
        qformer_config={**TEXT, "encoder_hidden_size": 16},
        text_config={
            "model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 60,
        },
        num_query_tokens=2,
    )  # fmt: skip
    whole = spread(Blip2ForConditionalGeneration(config))
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    settings = Vision(kind="eva_vit", path=tmp_path)
    tower, images = load_tower(settings), pixels()
    with torch.no_grad():
        expected = whole.vision_model(pixel_values=images).last_hidden_state
        ours = whole.vision_model.post_layernorm(tower.features(images))
    assert torch.allclose(ours, expected, atol=1e-5)
    assert (tower.norm.mean, tower.norm.std) == (CLIP_MEAN, CLIP_STD)
    assert_contract(tower, images)
    assert_same_on_meta(tower, settings)


def lavis_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' tower under the bare names of eva_vit_g.pth, the fused bias split as there."""
    stem = {"class_embedding": "cls_token", "position_embedding": "pos_embed", "patch_embedding": "patch_embed.proj"}
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("embeddings."):
            _, part, *rest = name.split(".")
            renamed[".".join([stem[part], *rest])] = tensor
        elif name.startswith("encoder.layers."):
            name = name.replace("encoder.layers", "blocks").replace("layer_norm", "norm")
            name = name.replace("self_attn.projection", "attn.proj").replace("self_attn", "attn")
            if name.endswith("qkv.bias"):
                block = name.removesuffix("qkv.bias")
                renamed[f"{block}q_bias"], _, renamed[f"{block}v_bias"] = tensor.chunk(3)
            else:
                renamed[name] = tensor
    return renamed


def test_eva_from_a_pth_file(tmp_path):
    """A bare EVA-CLIP file holds one block more than BLIP-2 uses; its shapes tell every size but the number of heads."""
    theirs = spread(Blip2VisionModel(Blip2VisionConfig(**SIZES)))
    for layer in theirs.encoder.layers:
        layer.self_attn.qkv.bias.data[16:32] = 0  # the key has no bias
    torch.save(lavis_names(theirs.state_dict()), tmp_path / "eva.pth")
    settings = Vision(kind="eva_vit", path=tmp_path / "eva.pth", config={**SIZES, "num_hidden_layers": 2})
    tower, images = load_tower(settings), pixels()
    with torch.no_grad():
        expected = theirs(pixel_values=images, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(tower.features(images), expected, atol=1e-5)
    assert_same_on_meta(tower, settings)
    with pytest.raises(ModelError, match=r"vision\.config: expected num_attention_heads"):
        load_tower(Vision(kind="eva_vit", path=tmp_path / "eva.pth"))
    with pytest.raises(ModelError, match="expected num_hidden_layers 2"):
        load_tower(Vision(kind="eva_vit", path=tmp_path / "eva.pth", config=SIZES))
    torch.save({"model": {"query_tokens": torch.zeros(1, 2, 16)}}, tmp_path / "blip2_pretrained.pth")
    with pytest.raises(ModelError, match="blip2_pretrained files hold no ViT"):
        load_tower(Vision(kind="eva_vit", path=tmp_path / "blip2_pretrained.pth"))


def test_eva_from_tensors_takes_the_tower_alone():
    theirs = spread(Blip2VisionModel(Blip2VisionConfig(**SIZES)))
    fewer = Blip2VisionConfig(**{**SIZES, "num_hidden_layers": 2})
    tensors = {f"vision_model.{k}": v.half() for k, v in theirs.state_dict().items()}
    tower, images = eva_tower_from_tensors(fewer, tensors, "memory"), pixels()
    assert all(p.dtype == torch.float32 for p in tower.parameters())
    theirs.load_state_dict({k.removeprefix("vision_model."): v.float() for k, v in tensors.items()})
    with torch.no_grad():
        expected = theirs(pixel_values=images, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(tower.features(images), expected, atol=1e-5)
    assert_contract(tower, images)


def test_eva_names_what_does_not_fit():
    config = Blip2VisionConfig(**SIZES)
    tensors = Blip2VisionModel(config).state_dict()
    tensors["embeddings.class_embedding"] = torch.zeros(1, 1, 17)
    tensors["embeddings.mask_token"] = torch.zeros(1)
    del tensors["encoder.layers.1.mlp.fc1.bias"]
    with pytest.raises(CheckpointError) as caught:
        eva_tower_from_tensors(config, tensors, "eva.pth")
    for words in ("eva.pth", "(1, 1, 16), found (1, 1, 17)", "mask_token: unexpected", "1.mlp.fc1.bias: missing"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"path": Path("/nowhere/blip2"), "architecture": "eva_vit_g"},
        {"path": "Salesforce/blip2-opt-6.7b", "architecture": "eva_vit_g"},
        {"path": Path("/nowhere/eva_vit_g.pth")},
    ],
    ids=["folder", "hub", "pth"],
)
def test_vit_g_on_meta_without_weights(settings):
    """986 M parameters; LAVIS has no key bias, transformers' fused bias holds 39 x 1408 zeros for it."""
    tower = build_tower_on_meta(Vision(kind="eva_vit", **settings))
    assert tower.parameter_count == 985_949_440
    assert (tower.tokens, tower.width, tower.image_size) == (257, 1408, 224)
    assert all(p.is_meta for p in tower.parameters())
    config = eva_vit_g_config()
    assert (config.num_hidden_layers, config.layer_norm_eps, config.hidden_act) == (39, 1e-6, "gelu")


def test_a_dry_run_of_other_sizes_than_the_folders_is_refused(tmp_path):
    save(Blip2VisionModel(Blip2VisionConfig(**SIZES)), tmp_path)
    assert load_tower(Vision(kind="eva_vit", path=tmp_path, config=SIZES)).tokens == 5
    for read in (load_tower, build_tower_on_meta):
        with pytest.raises(ModelError, match="hidden_size 16"):
            read(Vision(kind="eva_vit", path=tmp_path, architecture="eva_vit_g"))


@pytest.mark.parametrize("whole", [True, False], ids=["CLIPModel", "CLIPVisionModel"])
@pytest.mark.parametrize("blocks", [None, 1, 3])
def test_clip_equals_the_hidden_state_after_its_blocks(tmp_path, whole, blocks):
    if whole:
        model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SIZES, projection_dim=8))
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**SIZES))
    save(model, tmp_path)
    settings = Vision(kind="clip_vit", path=tmp_path, blocks=blocks)
    tower, images = load_tower(settings), pixels()
    with torch.no_grad():
        vision = model.vision_model if whole else model
        states = vision(pixel_values=images, output_hidden_states=True).hidden_states
    kept = blocks or 2
    assert torch.allclose(tower.features(images), states[kept], atol=1e-5)
    assert not torch.allclose(states[kept], states[kept - 1], atol=1e-2)
    assert (tower.norm.mean, tower.norm.std) == (CLIP_MEAN, CLIP_STD)
    assert_contract(tower, images)
    assert_same_on_meta(tower, settings)


@pytest.mark.parametrize(("blocks", "kept"), [(21, 21), (None, 23)])
def test_clip_vit_l_on_meta(blocks, kept):
    settings = Vision(kind="clip_vit", path="openai/clip-vit-large-patch14", architecture="clip_vit_l", blocks=blocks)
    tower = build_tower_on_meta(settings)
    width = 1024
    block = 4 * (width + 1) * width + 2 * 4 * width * width + 5 * width + 2 * 2 * width
    stem = width + 257 * width + 3 * 14 * 14 * width + 2 * width  # CLS, positions, patches, pre_layrnorm
    assert tower.parameter_count == stem + kept * block
    assert (tower.tokens, tower.width) == (257, width)


def test_clip_refusals(tmp_path):
    save(CLIPVisionModel(CLIPVisionConfig(**SIZES)), tmp_path / "clip")
    save(Dinov2Model(Dinov2Config(**SIZES)), tmp_path / "dino")
    with pytest.raises(ModelError, match=r"vision\.blocks: expected at most 3"):
        load_tower(Vision(kind="clip_vit", path=tmp_path / "clip", blocks=4))
    with pytest.raises(ModelError, match=r"vision\.image_size: expected 28"):
        load_tower(Vision(kind="clip_vit", path=tmp_path / "clip", image_size=56))
    with pytest.raises(ModelError, match=r"'dinov2'.*use kind hf"):
        load_tower(Vision(kind="clip_vit", path=tmp_path / "dino"))


MODELS = {
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)),
    "siglip_two_towers": lambda: SiglipModel(
        SiglipConfig(text_config={**TEXT, "max_position_embeddings": 8}, vision_config=SIZES)
    ),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES)),
    "dinov2_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=4)),
    "mobilenet_v2": lambda: MobileNetV2Model(MobileNetV2Config(image_size=64, depth_multiplier=0.35)),
    "vit_without_pooler": lambda: ViTForImageClassification(ViTConfig(**SIZES)),
}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("siglip", 4),
        ("siglip_two_towers", 4),
        ("dinov2", 5),
        ("dinov2_registers", 5),
        ("mobilenet_v2", 4),
        ("vit_without_pooler", 5),
    ],
)
def test_any_model_equals_transformers(tmp_path, name, tokens):
    model = MODELS[name]()
    save(model, tmp_path, NORM)
    settings = Vision(kind="hf", path=tmp_path)
    tower, images = load_tower(settings), pixels(64 if name == "mobilenet_v2" else 28)
    own = {"siglip_two_towers": "vision_model", "vit_without_pooler": "vit"}.get(name)
    with torch.no_grad():
        expected = (getattr(model, own) if own else model)(pixel_values=images).last_hidden_state
    if name == "mobilenet_v2":
        assert expected.shape[2:] == (2, 2)
        expected = torch.stack([expected[:, :, y, x] for y in range(2) for x in range(2)], 1)
    if name == "dinov2_registers":
        expected = expected[:, [0, 5, 6, 7, 8]]
    assert tower.tokens == tokens
    assert torch.allclose(tower.features(images), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert (tower.norm.mean, tower.norm.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert_contract(tower, images)
    assert_same_on_meta(tower, settings)
    again = load_tower(settings)  # equal weights, or the vision cache would be rebuilt each time
    assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), again.parameters(), strict=True))


def test_text_tower_and_heads_are_not_loaded(tmp_path):
    save(MODELS["siglip_two_towers"](), tmp_path, NORM)
    tower = load_tower(Vision(kind="hf", path=tmp_path))
    assert not [k for k in tower.state_dict() if "text" in k or "head" in k]
    stored = load_file(tmp_path / "model.safetensors")
    needed = [t for k, t in stored.items() if k.startswith("vision_model.") and ".head." not in k]
    assert tower.parameter_count == sum(t.numel() for t in needed)


@pytest.mark.parametrize(
    ("processor", "side"),
    [
        ({"size": {"height": 42, "width": 42}}, 42),
        ({"size": {"shortest_edge": 56}, "crop_size": {"height": 42, "width": 42}}, 42),
        ({"size": {"shortest_edge": 56}, "crop_size": 42, "do_center_crop": False}, 56),
        ({"size": {"height": 42, "width": 56}}, 28),
        ({}, 28),
    ],
)
def test_image_size_comes_from_the_processor_then_the_config(tmp_path, processor, side):
    save(MODELS["dinov2"](), tmp_path, {**NORM, **processor})
    tower = load_tower(Vision(kind="hf", path=tmp_path))
    assert (tower.image_size, tower.tokens) == (side, 1 + (side // 14) ** 2)
    assert load_tower(Vision(kind="hf", path=tmp_path, image_size=70)).tokens == 26


def test_pixel_norm_is_never_guessed(tmp_path):
    folder = save(MODELS["dinov2"](), tmp_path)
    with pytest.raises(ModelError, match=r"vision\.mean, vision\.std.*preprocessor_config"):
        load_tower(Vision(kind="hf", path=folder))
    tower = load_tower(Vision(kind="hf", path=folder, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)))
    assert tower.norm.std == (0.2, 0.2, 0.2)
    (folder / "preprocessor_config.json").write_text(json.dumps({**NORM, "do_rescale": False}))
    with pytest.raises(ModelError, match="rescale_factor"):
        load_tower(Vision(kind="hf", path=folder))
    (folder / "preprocessor_config.json").write_text(json.dumps({**NORM, "do_normalize": False}))
    assert load_tower(Vision(kind="hf", path=folder)).norm.mean == (0.0, 0.0, 0.0)


def test_sizes_of_any_model_can_stand_in_the_recipe():
    config = {"model_type": "siglip_vision_model", **SIZES}
    tower = build_tower_on_meta(Vision(kind="hf", path="google/siglip-base", config=config))
    assert (tower.tokens, tower.width, tower.image_size) == (4, 16, 28)
    with pytest.raises(ModelError, match=r"vision\.config: expected model_type"):
        build_tower_on_meta(Vision(kind="hf", path="google/siglip-base", config=SIZES))


def test_a_model_without_features_is_refused_with_the_reason(tmp_path, monkeypatch):
    save(BertModel(BertConfig(**TEXT)), tmp_path / "bert")
    with pytest.raises(ModelError, match="its input is 'input_ids'"):
        load_tower(Vision(kind="hf", path=tmp_path / "bert"))
    blip2 = tmp_path / "blip2"
    save(Blip2VisionModel(Blip2VisionConfig(**SIZES)), blip2)
    with pytest.raises(ModelError, match="expected eva_vit"):
        load_tower(Vision(kind="hf", path=blip2))
    siglip = Vision(kind="hf", path=save(MODELS["siglip"](), tmp_path / "siglip", NORM), image_size=42)
    with pytest.raises(ModelError, match=r"42 x 42 pixels: .*size of tensor"):
        load_tower(siglip)
    pooled = Vision(kind="hf", path=save(MODELS["dinov2"](), tmp_path / "dino", NORM))
    monkeypatch.setattr(Dinov2Model, "forward", lambda self, pixel_values: pixel_values.mean((2, 3)))
    with pytest.raises(ModelError, match="last_hidden_state, got Tensor"):
        load_tower(pooled)


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    folder = save(MODELS["dinov2"](), tmp_path, NORM)
    tensors = load_file(folder / "model.safetensors")
    lacking = {k: v for k, v in tensors.items() if "layer.1.norm1" not in k}
    save_file(lacking, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks tensors.*layer\.1\.norm1\.bias"):
        load_tower(Vision(kind="hf", path=folder))
    save_file({**tensors, "layernorm.bias": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="expected the weights of a 'dinov2'"):
        load_tower(Vision(kind="hf", path=folder))
    (folder / "model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(ModelError, match="expected the weights of a 'dinov2'"):
        load_tower(Vision(kind="hf", path=folder))


@pytest.mark.parametrize("kind", ["eva_vit", "clip_vit", "hf"])
def test_a_folder_without_a_model_is_named(tmp_path, kind):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"vision\.path.*empty"):
        load_tower(Vision(kind=kind, path=tmp_path / "empty"))
    with pytest.raises(ModelError, match=r"vision\.path.*nowhere"):
        build_tower_on_meta(Vision(kind=kind, path=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "eva_vit", "blocks": 2}, "only clip_vit"),
        ({"kind": "hf", "architecture": "eva_vit_g"}, "belongs to kind eva_vit"),
        ({"kind": "eva_vit", "architecture": "eva_vit_g", "config": {}}, "at most one"),
        ({"kind": "hf", "mean": (0.5, 0.5, 0.5)}, "mean, std"),
        ({"kind": "hf", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.0, 0.5)}, "greater than 0"),
        ({"kind": "mobilenet_v2"}, "local folder"),
    ],
)
def test_settings_that_contradict_each_other(settings, words):
    with pytest.raises(ValidationError, match=words):
        Vision(path="owner/name", **settings)


@pytest.mark.parametrize("written", ["./tower", "tower", "towers/tower", "../{parent}/tower", "{folder}/tower"])
def test_a_path_that_exists_is_a_path(tiny_recipe, tmp_path, monkeypatch, written):
    (tmp_path / "towers" / "tower").mkdir(parents=True)
    (tmp_path / "tower").mkdir()
    values = yaml.safe_load(tiny_recipe.read_text())
    values["vision"] = {
        "kind": "hf", "path": written.format(parent=tmp_path.name, folder=tmp_path), "config": {"model_type": "dinov2", **SIZES},
    }  # fmt: skip
    tiny_recipe.write_text(yaml.safe_dump(values))
    monkeypatch.chdir("/")
    loaded = load_recipe(tiny_recipe)
    assert isinstance(loaded.vision.path, Path) and loaded.vision.path.is_absolute()
    save_recipe(loaded, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml").vision == loaded.vision


def test_a_hub_id_is_not_checked_and_a_missing_path_is(tiny_recipe, tmp_path):
    loaded = load_recipe(tiny_recipe, ["vision.path=Salesforce/blip2-opt-6.7b"])
    assert loaded.vision.path == "Salesforce/blip2-opt-6.7b"
    save_recipe(loaded, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml").vision == loaded.vision
    for missing in ("./owner/name", "name", "weights/eva_vit_g.pth", "/a/b/c"):
        with pytest.raises(ValueError, match=r"vision\.path: expected an existing file or folder"):
            load_recipe(tiny_recipe, [f"vision.path={missing}"])
