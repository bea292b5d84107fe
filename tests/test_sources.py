"""Any BLIP-2 as a source: every format gives the same tensors under our names, only what is asked for is read, and bad input is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    OPTConfig,
    T5Config,
)
from transformers.utils import logging as transformers_logging

from vpgtrans.engine.checkpoint import CheckpointError
from vpgtrans.engine.models import tensor_files
from vpgtrans.engine.models.keys import Leftover, infer_qformer, infer_vision, place, to_hugging_face
from vpgtrans.engine.models.sources import describe_source, read_source
from vpgtrans.engine.models.vpg import LN_VISION_EPS, VPG, save_parts
from vpgtrans.engine.recipe import QFormerConfig

WIDTH, IMAGE_WIDTH, LLM_WIDTH, QUERIES, BLOCKS = 128, 32, 24, 3, 2
ALL = ("vpg", "projector", "vision")


def make_blip2(family: str) -> Blip2ForConditionalGeneration:
    """A tiny BLIP-2 whose every tensor differs from every other; the key third of each qkv bias is zero, as EVA-CLIP's is."""
    torch.manual_seed(0)
    text = {
        "opt": OPTConfig(
            vocab_size=40, hidden_size=LLM_WIDTH, word_embed_proj_dim=12, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, do_layer_norm_before=False,
        ),
        "t5": T5Config(vocab_size=40, d_model=LLM_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0),
    }[family]  # fmt: skip
    vision = Blip2VisionConfig(
        hidden_size=IMAGE_WIDTH, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=2, image_size=28
    )
    qformer = Blip2QFormerConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96, encoder_hidden_size=IMAGE_WIDTH,
        hidden_dropout_prob=0.2,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=QUERIES, image_token_index=39
    )
    model = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name.lower() and parameter.ndim == 1 else 0.0, 0.2)
            if name.endswith("qkv.bias"):
                parameter[IMAGE_WIDTH : 2 * IMAGE_WIDTH] = 0
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """family -> folder, and family-sharded -> folder, as `save_pretrained` writes them."""
    root = tmp_path_factory.mktemp("blip2")
    transformers_logging.disable_progress_bar()
    for family in ("opt", "t5"):
        model = make_blip2(family)
        model.save_pretrained(root / family)
        model.save_pretrained(root / f"{family}-sharded", max_shard_size="150KB")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def hf(folders) -> dict[str, torch.Tensor]:
    return load_file(folders["opt"] / "model.safetensors")


@pytest.fixture
def copy(folders, tmp_path):
    """copy(name) -> a folder of the test's own, to be damaged."""

    def make(name: str) -> Path:
        target = tmp_path / name
        target.mkdir()
        for file in folders[name].iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    return make


def lavis_vpg(hf: dict[str, torch.Tensor], projector: str = "opt_proj") -> dict[str, torch.Tensor]:
    """The VPG and projector under LAVIS's names, written out by hand."""
    out = {"query_tokens": hf["query_tokens"]}
    for kind in ("weight", "bias"):
        out[f"ln_vision.{kind}"] = hf[f"vision_model.post_layernorm.{kind}"]
        out[f"Qformer.bert.embeddings.LayerNorm.{kind}"] = hf[f"qformer.layernorm.{kind}"]
        out[f"{projector}.{kind}"] = hf[f"language_projection.{kind}"]
        for layer in range(3):
            theirs, ours = f"qformer.encoder.layer.{layer}", f"Qformer.bert.encoder.layer.{layer}"
            for attention in ("attention", "crossattention")[: 1 if layer == 1 else 2]:
                for name in ("query", "key", "value"):
                    out[f"{ours}.{attention}.self.{name}.{kind}"] = hf[f"{theirs}.{attention}.attention.{name}.{kind}"]
                for name in ("dense", "LayerNorm"):
                    out[f"{ours}.{attention}.output.{name}.{kind}"] = hf[f"{theirs}.{attention}.output.{name}.{kind}"]
            out[f"{ours}.intermediate_query.dense.{kind}"] = hf[f"{theirs}.intermediate_query.dense.{kind}"]
            for name in ("dense", "LayerNorm"):
                out[f"{ours}.output_query.{name}.{kind}"] = hf[f"{theirs}.output_query.{name}.{kind}"]
    return out


def lavis_vit(hf: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """The ViT under EVA-CLIP's names, written out by hand."""
    out = {
        "cls_token": hf["vision_model.embeddings.class_embedding"],
        "pos_embed": hf["vision_model.embeddings.position_embedding"],
        "patch_embed.proj.weight": hf["vision_model.embeddings.patch_embedding.weight"],
        "patch_embed.proj.bias": hf["vision_model.embeddings.patch_embedding.bias"],
    }
    for n in range(BLOCKS):
        theirs = f"vision_model.encoder.layers.{n}"
        for kind in ("weight", "bias"):
            out[f"blocks.{n}.norm1.{kind}"] = hf[f"{theirs}.layer_norm1.{kind}"]
            out[f"blocks.{n}.norm2.{kind}"] = hf[f"{theirs}.layer_norm2.{kind}"]
            out[f"blocks.{n}.attn.proj.{kind}"] = hf[f"{theirs}.self_attn.projection.{kind}"]
            out[f"blocks.{n}.mlp.fc1.{kind}"] = hf[f"{theirs}.mlp.fc1.{kind}"]
            out[f"blocks.{n}.mlp.fc2.{kind}"] = hf[f"{theirs}.mlp.fc2.{kind}"]
        out[f"blocks.{n}.attn.qkv.weight"] = hf[f"{theirs}.self_attn.qkv.weight"]
        out[f"blocks.{n}.attn.q_bias"] = hf[f"{theirs}.self_attn.qkv.bias"][:IMAGE_WIDTH]
        out[f"blocks.{n}.attn.v_bias"] = hf[f"{theirs}.self_attn.qkv.bias"][2 * IMAGE_WIDTH :]
    return {prefix + name: tensor for name, tensor in out.items()}


# What LAVIS's files hold besides, and why it is not used.
SURPLUS = {
    "Qformer.bert.embeddings.position_ids": "buffer",
    "Qformer.bert.embeddings.word_embeddings.weight": "text branch",
    "Qformer.bert.embeddings.position_embeddings.weight": "text branch",
    "Qformer.bert.encoder.layer.0.intermediate.dense.weight": "text branch",
    "Qformer.bert.encoder.layer.0.output.LayerNorm.weight": "text branch",
    "Qformer.cls.predictions.bias": "word head of image-text pre-training",
    "vision_proj.weight": "contrastive and matching heads",
    "text_proj.bias": "contrastive and matching heads",
    "itm_head.weight": "contrastive and matching heads",
    "temp": "contrastive and matching heads",
    "opt_model.model.decoder.embed_tokens.weight": "language model",
    "something.else": "not a name of any BLIP-2 layout",
}


def assert_same(parts, expected):
    assert parts.keys() == expected.keys()
    for part in expected:
        assert parts[part].keys() == expected[part].keys(), part
        for name, tensor in expected[part].items():
            assert torch.equal(parts[part][name], tensor), f"{part}.{name}"


def expected_parts(hf: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Our parts of the Hugging Face tensors, by stripping prefixes."""
    vision = {k.removeprefix("vision_model."): v for k, v in hf.items() if k.startswith("vision_model.")}
    vpg = {"ln_vision." + k[15:]: vision.pop(k) for k in list(vision) if k.startswith("post_layernorm.")}
    vpg |= {k: v for k, v in hf.items() if k == "query_tokens" or k.startswith("qformer.")}
    projector = {k[20:]: v for k, v in hf.items() if k.startswith("language_projection.")}
    return {"vpg": vpg, "projector": projector, "vision": vision}


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_hugging_face_folders_whole_and_sharded(folders, family):
    hf = load_file(folders[family] / "model.safetensors")
    assert len(list(folders[f"{family}-sharded"].glob("model-*.safetensors"))) > 3
    for folder in (folders[family], folders[f"{family}-sharded"]):
        parts, report = read_source(folder, ALL)
        assert_same(parts, expected_parts(hf))
        assert {u.stored_as for u in report.used} | {d.name for d in report.dropped} == hf.keys()
        assert {d.reason for d in report.dropped} == {"language model"} and not report.missing
        assert sum(t.bytes for t in (*report.used, *report.dropped)) == sum(t.nbytes for t in hf.values())
        info = describe_source(folder)
        assert info.qformer == QFormerConfig(
            hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96, num_query_tokens=QUERIES, dropout=0.2
        )  # fmt: skip
        assert (info.format, info.image_width, info.projector_shape) == (
            "hugging_face",
            IMAGE_WIDTH,
            (LLM_WIDTH, WIDTH),
        )
        assert info.llm_inside and info.llm_config["model_type"] == family
        assert info.vision["num_hidden_layers"] == BLOCKS and info.vision["image_size"] == 28


@pytest.mark.parametrize("sharded", [False, True])
def test_hugging_face_bin_folders(folders, hf, tmp_path, sharded):
    (tmp_path / "config.json").write_bytes((folders["opt"] / "config.json").read_bytes())
    if sharded:
        shard_of = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(hf)}
        for shard in set(shard_of.values()):
            torch.save({k: v for k, v in hf.items() if shard_of[k] == shard}, tmp_path / shard)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shard_of}))
    else:
        torch.save(hf, tmp_path / "pytorch_model.bin")
    assert_same(read_source(tmp_path, ALL)[0], expected_parts(hf))


def test_a_folder_that_leaves_defaults_out_and_carries_old_fields(copy, hf):
    folder = copy("opt")
    config = json.loads((folder / "config.json").read_text())
    config["qformer_config"] |= {"classifier_dropout": None, "problem_type": None, "torch_dtype": "float32"}
    config["vision_config"] |= {"projection_dim": 512, "dropout": 0.0, "num_beams": 1}
    del config["qformer_config"]["cross_attention_frequency"], config["vision_config"]["patch_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(read_source(folder, ALL)[0], expected_parts(hf))


@pytest.mark.parametrize(
    ("flat", "legacy", "projector"),
    [(False, False, "opt_proj"), (True, False, "t5_proj"), (False, True, "llama_proj")],
)
def test_lavis_equals_hugging_face(hf, tmp_path, flat, legacy, projector):
    state = lavis_vpg(hf, projector) | lavis_vit(hf, "visual_encoder.") | {k: torch.ones(2) for k in SURPLUS}
    path = tmp_path / "blip2.pth"
    torch.save(state if flat else {"model": state}, path, _use_new_zipfile_serialization=not legacy)
    parts, report = read_source(path, ALL)
    assert_same(parts, expected_parts(hf))
    assert {d.name: d.reason for d in report.dropped} == SURPLUS
    info = describe_source(path)
    assert info.qformer == QFormerConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96, num_query_tokens=QUERIES
    )
    assert (info.format, info.image_width, info.projector_shape) == ("lavis", IMAGE_WIDTH, (LLM_WIDTH, WIDTH))
    assert info.vision == {
        "hidden_size": IMAGE_WIDTH, "intermediate_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": None, "image_size": 28,
        "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
    }  # fmt: skip
    assert info.llm_inside and info.llm is None


def test_vit_from_its_own_file_with_a_block_more_than_used(hf, tmp_path):
    torch.save({"model": lavis_vpg(hf)}, tmp_path / "blip2_pretrained.pth")
    vit = lavis_vit(hf)
    last = {
        name.replace("blocks.1.", "blocks.2."): torch.ones_like(v) for name, v in vit.items() if "blocks.1." in name
    }
    heads = {"norm.weight": torch.ones(32), "fc_norm.bias": torch.ones(32), "head.weight": torch.ones(4, 32)}
    torch.save(vit | last | heads, tmp_path / "eva_vit_g.pth")
    with pytest.raises(CheckpointError, match=r"expected the vision: no ViT in this source; add eva_vit_g\.pth"):
        read_source(tmp_path / "blip2_pretrained.pth", ALL)
    parts, report = read_source(tmp_path / "blip2_pretrained.pth", ALL, [tmp_path / "eva_vit_g.pth"])
    assert_same(parts, expected_parts(hf))
    reasons = {d.name: d.reason for d in report.dropped}
    assert reasons.keys() == last.keys() | heads.keys()
    assert {reasons[name] for name in last} == {"ViT block past the 2 that BLIP-2 uses"}
    assert [m.partition(":")[0] for m in report.missing] == ["llm"]
    lines = report.lines()
    assert any(line.startswith("used vpg: 73 tensors") and "blip2_pretrained.pth" in line for line in lines)
    assert any(line.startswith("used vision:") and "eva_vit_g.pth" in line for line in lines)
    assert any(line.startswith(f"dropped {len(last)} tensors") for line in lines) and lines[-1].startswith(
        "missing llm"
    )


def test_vit_g_uses_39_blocks_whatever_its_file_holds(hf, tmp_path):
    blocks = {f"blocks.{n}.norm1.weight": torch.ones(1408) for n in range(42)}
    torch.save({"model": lavis_vpg(hf) | blocks}, tmp_path / "a.pth")
    _, report = read_source(tmp_path / "a.pth")
    past = {d.name for d in report.dropped if "past the 39" in d.reason}
    assert past == {f"blocks.{n}.norm1.weight" for n in (39, 40, 41)}


def test_full_sizes_are_told_from_shapes_alone():
    with torch.device("meta"):
        vpg, vit = VPG(QFormerConfig(), 1408), Blip2VisionModel(Blip2VisionConfig())
    assert infer_qformer({k: tuple(v.shape) for k, v in vpg.state_dict().items()}, "") == QFormerConfig()
    inferred = infer_vision({k: tuple(v.shape) for k, v in vit.state_dict().items()})
    assert Blip2VisionConfig(**inferred).to_dict() == Blip2VisionConfig().to_dict()


def test_the_authors_files_with_only_what_trained(hf, tmp_path):
    full = lavis_vpg(hf, "llama_proj")
    warm = {name: tensor + 1 for name, tensor in full.items() if name.startswith("llama_proj")}
    other = {
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "config": {"run": {"lr": 1e-4}},
        "scaler": None,
        "epoch": 0,
    }
    torch.save({"model": warm, **other}, tmp_path / "warm.pth")
    torch.save({"model": full, **other}, tmp_path / "full.pth")
    expected = expected_parts(hf)
    del expected["vision"]
    assert_same(read_source(tmp_path / "full.pth")[0], expected)
    info = describe_source(tmp_path / "warm.pth")
    assert info.qformer is None and info.projector_shape == (LLM_WIDTH, WIDTH)
    with pytest.raises(CheckpointError, match="expected the vpg: no Q-Former in this source"):
        read_source(tmp_path / "warm.pth")
    assert read_source(tmp_path / "warm.pth", ["projector"])[0]["projector"].keys() == {"weight", "bias"}
    # What the named file has counts before what an extra file has.
    parts, report = read_source(tmp_path / "warm.pth", extra_files=[tmp_path / "full.pth"])
    expected["projector"] = {"weight": warm["llama_proj.weight"], "bias": warm["llama_proj.bias"]}
    assert_same(parts, expected)
    assert {d.name for d in report.dropped if d.reason == "already in warm.pth"} == warm.keys()


def test_our_own_runs(tmp_path):
    config = QFormerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_query_tokens=4
    )
    parts = {"vpg": VPG(config, 8), "projector": torch.nn.Linear(16, 12)}
    about = {"image_width": 8, "qformer": config.model_dump(), "llm": "some/llm"}
    save_parts(tmp_path / "run" / "model", parts, about)
    expected = {name: module.state_dict() for name, module in parts.items()}
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        assert_same(read_source(folder)[0], expected)
    info = describe_source(tmp_path / "run")
    assert (info.format, info.qformer, info.image_width, info.llm) == ("run", config, 8, "some/llm")
    assert info.files == (tmp_path / "run" / "model" / "model.safetensors",) and info.projector_shape == (12, 16)


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_to_hugging_face_is_the_inverse(folders, family):
    hf = load_file(folders[family] / "model.safetensors")
    parts, _ = read_source(folders[family], (*ALL, "llm"))
    back = dict(to_hugging_face(parts))
    assert back.keys() == hf.keys() and all(torch.equal(back[name], hf[name]) for name in hf)
    model = Blip2ForConditionalGeneration(Blip2Config.from_pretrained(folders[family]))
    assert not model.load_state_dict(back, strict=False).unexpected_keys
    with pytest.raises(ValueError, match="part: expected one of vpg, projector, vision, llm, got 'tower'"):
        dict(to_hugging_face({"tower": {"a": torch.ones(1)}}))


@pytest.mark.parametrize("layout", ["hugging_face", "lavis"])
def test_the_vpg_computes_what_transformers_computes(folders, hf, tmp_path, layout):
    path = folders["opt"]
    if layout == "lavis":
        path = tmp_path / "blip2.pth"
        torch.save({"model": lavis_vpg(hf)}, path)
    model = Blip2ForConditionalGeneration.from_pretrained(folders["opt"]).eval()
    model.vision_model.post_layernorm.eps = LN_VISION_EPS
    raw = []
    model.vision_model.post_layernorm.register_forward_pre_hook(lambda module, given: raw.append(given[0]))
    info = describe_source(path)
    parts, _ = read_source(path)
    vpg = VPG(info.qformer, info.image_width).eval()
    vpg.load_state_dict(parts["vpg"])
    projector = torch.nn.Linear(*reversed(info.projector_shape))
    projector.load_state_dict(parts["projector"])
    with torch.no_grad():
        image = model.vision_model(pixel_values=torch.randn(2, 3, 28, 28)).last_hidden_state
        queries = model.query_tokens.expand(2, -1, -1)
        theirs = model.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
        ours = vpg(raw[0])
        assert (ours - theirs).abs().max() < 1e-5 and theirs.std() > 0.1
        difference = projector(ours) - model.language_projection(theirs)
    assert difference.abs().max() < 1e-5


class CountingOpen:
    """safe_open that notes which tensors are read."""

    read: list[str]

    def __init__(self, *given):
        self.file = safe_open(*given)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *given):
        return self.file.__exit__(*given)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return self.file.get_slice(name)

    def get_tensor(self, name):
        self.read.append(name)
        return self.file.get_tensor(name)


def test_only_the_tensors_asked_for_are_read_and_each_once(folders, copy, monkeypatch):
    CountingOpen.read = []
    monkeypatch.setattr(tensor_files, "safe_open", CountingOpen)
    describe_source(folders["opt-sharded"])
    assert CountingOpen.read == []
    parts, _ = read_source(folders["opt-sharded"], ["vpg"])
    assert sorted(CountingOpen.read) == sorted(name for name, _ in to_hugging_face(parts))
    CountingOpen.read = []
    folder = copy("opt")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_query_tokens": QUERIES + 1}))
    with pytest.raises(CheckpointError, match=r"query_tokens: expected \(1, 4, 128\), found \(1, 3, 128\)"):
        read_source(folder)
    assert CountingOpen.read == []  # nothing half-loaded


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_a_pth_with_a_large_language_model_is_not_read_into_memory(hf, tmp_path, monkeypatch):
    large = {"opt_model.model.decoder.embed_tokens.weight": torch.ones(64 << 20, dtype=torch.uint8)}
    torch.save({"model": lavis_vpg(hf)}, tmp_path / "small.pth")
    torch.save({"model": lavis_vpg(hf) | large}, tmp_path / "large.pth")
    del large
    read_source(tmp_path / "small.pth")  # whatever is imported on first use
    load, when_open = torch.load, []

    def noting_load(*given, **options):
        content = load(*given, **options)
        when_open.append(resident_bytes())
        return content

    monkeypatch.setattr(torch, "load", noting_load)
    before = resident_bytes()
    parts, report = read_source(tmp_path / "large.pth")
    assert max([*when_open, resident_bytes()]) - before < 16 << 20
    assert sum(d.bytes for d in report.dropped) == 64 << 20 and len(parts["vpg"]) == 73
    before = resident_bytes()
    held = read_source(tmp_path / "large.pth", ["llm"])[0]["llm"]
    assert resident_bytes() - before > 48 << 20 and len(held) == 1  # the measure does see a tensor that is read


def test_tensors_outlive_their_file(hf, tmp_path):
    path = tmp_path / "blip2.pth"
    torch.save({"model": lavis_vpg(hf)}, path)
    parts, _ = read_source(path)
    path.write_bytes(b"\0" * path.stat().st_size)  # in place: a mapped tensor would turn to zeros
    assert torch.equal(parts["vpg"]["query_tokens"], hf["query_tokens"])


def test_hub_ids_are_downloaded_in_one_weight_format(folders, hf, monkeypatch):
    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(folders["opt"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    expected = expected_parts(hf)
    del expected["vision"]
    assert_same(read_source("some-org/blip2-opt")[0], expected)
    assert asked == [("some-org/blip2-opt", ["*.json", "*.txt", "*.model", "model*.safetensors"])]


def test_a_hub_id_without_network_says_so(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"no-such-org/no-such-model: found no such folder, and the hub gave none"
    ):
        describe_source("no-such-org/no-such-model")


class Code:
    def __reduce__(self):
        return os.system, ("touch /nonexistent/folder",)


def damage_pickle(copy, hf, tmp_path):
    torch.save({"model": lavis_vpg(hf), "extra": Code()}, tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def damage_old_pickle(copy, hf, tmp_path):
    torch.save({"model": lavis_vpg(hf), "extra": Code()}, tmp_path / "bad.pth", _use_new_zipfile_serialization=False)
    return tmp_path / "bad.pth"


def damage_truncated_pth(copy, hf, tmp_path):
    torch.save({"model": lavis_vpg(hf)}, tmp_path / "bad.pth")
    (tmp_path / "bad.pth").write_bytes((tmp_path / "bad.pth").read_bytes()[:-2000])
    return tmp_path / "bad.pth"


def damage_no_tensors(copy, hf, tmp_path):
    torch.save({"epoch": 3}, tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def damage_empty_file(copy, hf, tmp_path):
    (tmp_path / "bad.pth").touch()
    return tmp_path / "bad.pth"


def damage_lost_tensor(copy, hf, tmp_path):
    state = lavis_vpg(hf)
    del state["Qformer.bert.encoder.layer.2.output_query.dense.bias"]
    torch.save({"model": state}, tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def damage_lost_layer(copy, hf, tmp_path):
    torch.save({"model": {k: v for k, v in lavis_vpg(hf).items() if ".layer.0." not in k}}, tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def damage_irregular_crossattention(copy, hf, tmp_path):
    state = {k: v for k, v in lavis_vpg(hf).items() if "layer.2.cross" not in k}
    state["Qformer.bert.encoder.layer.1.crossattention.self.key.weight"] = torch.ones(WIDTH, IMAGE_WIDTH)
    state["Qformer.bert.encoder.layer.2.crossattention.self.key.weight"] = torch.ones(WIDTH, IMAGE_WIDTH)
    state["Qformer.bert.encoder.layer.3.intermediate_query.dense.bias"] = torch.ones(96)
    torch.save({"model": state}, tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def damage_projector_width(copy, hf, tmp_path):
    torch.save({"model": lavis_vpg(hf) | {"opt_proj.weight": torch.ones(LLM_WIDTH, 768)}}, tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def damage_two_projectors(copy, hf, tmp_path):
    torch.save({"model": lavis_vpg(hf) | {"t5_proj.weight": torch.ones(2, WIDTH)}}, tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def damage_odd_width(copy, hf, tmp_path):
    torch.save({"model": lavis_vpg(hf) | {"query_tokens": torch.ones(1, 3, 100)}}, tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def damage_no_config(copy, hf, tmp_path):
    folder = copy("opt")
    (folder / "config.json").unlink()
    return folder


def damage_broken_config(copy, hf, tmp_path):
    folder = copy("opt")
    (folder / "config.json").write_text("{")
    return folder


def damage_other_model(copy, hf, tmp_path):
    folder = copy("opt")
    (folder / "config.json").write_text('{"model_type": "instructblip"}')
    return folder


def damage_impossible_size(copy, hf, tmp_path):
    folder = copy("opt")
    config = json.loads((folder / "config.json").read_text())
    config["qformer_config"]["num_attention_heads"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def damage_image_width(copy, hf, tmp_path):
    folder = copy("opt")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_size"] = "wide"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def damage_other_llm(copy, hf, tmp_path):
    folder = copy("opt")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = 4096
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def damage_no_weights(copy, hf, tmp_path):
    folder = copy("opt")
    (folder / "model.safetensors").unlink()
    return folder


def damage_truncated_shard(copy, hf, tmp_path):
    folder = copy("opt-sharded")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return folder


def damage_missing_shard(copy, hf, tmp_path):
    folder = copy("opt-sharded")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    return folder


def damage_index_outside(copy, hf, tmp_path):
    folder = copy("opt-sharded")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"query_tokens": "../opt/model.safetensors"}}')
    return folder


def damage_index_of_another(copy, hf, tmp_path):
    folder = copy("opt-sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["query_tokens"]
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"more": shard, **index["weight_map"]}})
    )
    return folder


def damage_index_json(copy, hf, tmp_path):
    folder = copy("opt-sharded")
    (folder / "model.safetensors.index.json").write_text("[1]")
    return folder


def damage_half_bias(copy, hf, tmp_path):
    state = lavis_vpg(hf) | lavis_vit(hf, "visual_encoder.")
    del state["visual_encoder.blocks.1.attn.v_bias"]
    torch.save({"model": state}, tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def damage_lost_vit_tensor(copy, hf, tmp_path):
    folder = copy("opt")
    save_file({k: v for k, v in hf.items() if "layers.1.mlp.fc2.bias" not in k}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_pickle, r"bad\.pth: expected tensors only.*posix.*save its tensors alone"),
        (damage_old_pickle, r"bad\.pth: expected tensors only.*posix.*save its tensors alone"),
        (damage_truncated_pth, r"bad\.pth: expected a file of torch\.save: .*; copy it again"),
        (damage_empty_file, r"bad\.pth: expected a file of torch\.save: .*; copy it again"),
        (damage_no_tensors, r"bad\.pth: expected a dictionary of tensors.*name a model checkpoint"),
        (damage_lost_tensor, r"layer\.2\.output_query\.dense\.bias: missing\n.*extra_files"),
        (damage_lost_layer, r"vpg: missing.*layer\.0\.intermediate_query.*extra_files"),
        (damage_irregular_crossattention, r"every n-th of 4 Q-Former layers, found it in \[0, 1, 2\]"),
        (damage_projector_width, r"projector.*\n  weight: expected \(24, 128\), found \(24, 768\)"),
        (damage_two_projectors, r"t5_proj\.weight .* and opt_proj\.weight .* are both projector\.weight"),
        (damage_odd_width, r"width that heads of 64 divide.*got 100; give it as a Hugging Face folder"),
        (damage_no_config, r"expected config\.json \(Hugging Face BLIP-2\) or vl_config\.json \(a run\)"),
        (damage_broken_config, r"expected config\.json \(Hugging Face BLIP-2\)"),
        (damage_other_model, r"expected model_type 'blip-2', got 'instructblip'"),
        (damage_impossible_size, r"num_attention_heads: expected a divisor of hidden_size 128, got 3"),
        (damage_image_width, r"vision_config\.hidden_size: expected a positive integer, got 'wide'"),
        (damage_other_llm, r"projector.*\n  bias: expected \(4096,\), found \(24,\)"),
        (damage_no_weights, r"expected model\.safetensors or pytorch_model\.bin, .*found neither; download"),
        (damage_truncated_shard, r"model-00002-of-\d+\.safetensors: expected a whole safetensors file.*copy it again"),
        (damage_missing_shard, r"missing: model-00002-of-\d+\.safetensors; download them"),
        (damage_index_outside, r"index\.json: .*a shard outside the folder"),
        (damage_index_of_another, r"1 tensors are not in the shard it names, first more in"),
        (damage_index_json, r"index\.json: expected the index of a sharded checkpoint"),
        (damage_half_bias, r"encoder\.layers\.1\.self_attn\.qkv\.bias \(one of q_bias, v_bias\).*extra_files"),
        (damage_lost_vit_tensor, r"encoder\.layers\.1\.mlp\.fc2\.bias: missing"),
    ],
)  # fmt: skip
def test_bad_sources_are_named_with_a_remedy(copy, hf, tmp_path, damage, message):
    with pytest.raises(CheckpointError, match=r"(?s)" + message):
        read_source(
            damage(copy, hf, tmp_path), ALL if "bias" in damage.__name__ or "vit" in damage.__name__ else ALL[:2]
        )


def test_paths_and_arguments_that_name_nothing(folders, tmp_path):
    for path in (tmp_path / "none", "relative/none.pth"):
        with pytest.raises(CheckpointError, match="found nothing there; correct the path"):
            describe_source(path)
    with pytest.raises(CheckpointError, match="extra_files: expected a checkpoint file, found none at"):
        describe_source(folders["opt"], [tmp_path])
    with pytest.raises(ValueError, match="parts: expected names among vpg, projector, vision, llm, got 'vit'"):
        read_source(folders["opt"], ["vit"])


def test_names_of_other_layouts_are_no_blip2():
    clip = place("visual_encoder.transformer.resblocks.0.ln_1.weight")
    assert isinstance(clip, Leftover) and "ViT that is no EVA-CLIP" in clip.reason
    # transformers' image-text retrieval model, the start of training from scratch
    text = place("qformer.encoder.layer.3.intermediate.dense.weight")
    assert isinstance(text, Leftover) and text.reason == "text branch"
    assert isinstance(place("embeddings.word_embeddings.weight"), Leftover)
