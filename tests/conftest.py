"""Shared fixtures: where the measuring data are, and a miniature of the miniature world that is real but quick.

The engine is imported where a fixture needs it: the tests of kernels run where only torch, Triton and transformers are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything (transformers, for one) imports Triton

import yaml
from safetensors.torch import save_file

from vpgtrans.kernels.interpreter import mend

if TYPE_CHECKING:
    from vpgtrans.engine.models.llm import LanguageModel

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    mend()

WORDS = [
    "a small red circle left of a large blue square on white",
    "there is a large green star above a small pink ring on black",
]


@pytest.fixture(scope="session")
def compiled_kernels():
    """compiled_kernels("qformer_attention") -> [Resources as dict]: every case of an operation, for sm_80 and sm_90a, without a GPU."""

    def resources(*operations: str) -> list[dict]:
        pytest.importorskip("triton")
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "vpgtrans.kernels.compile_only", *operations]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return resources


@pytest.fixture(scope="session")
def measuring_data() -> Path:
    """The folder of real data for measuring; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("VPGTRANS_DATA") or Path(__file__).resolve().parents[1].parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"measuring data not found at {folder}; set VPGTRANS_DATA")
    return folder


def _tiny_opt(tokenizer, *, width: int = 32, embedding_width: int | None = None, seed: int = 0) -> LanguageModel:
    """A random OPT in float32; another `embedding_width` gives OPT-350M's input and output projections."""
    from transformers import OPTConfig, OPTForCausalLM

    from vpgtrans.engine.models.causal import CausalLanguageModel

    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=width, word_embed_proj_dim=embedding_width or width, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, dropout=0.0, do_layer_norm_before=embedding_width is None,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return CausalLanguageModel(_spread(OPTForCausalLM(config)), tokenizer, "tiny-opt")


def _tiny_llama(tokenizer, *, width: int = 32, seed: int = 0) -> LanguageModel:
    """A random LLaMA with grouped keys and values in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from vpgtrans.engine.models.causal import CausalLanguageModel

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return CausalLanguageModel(_spread(LlamaForCausalLM(config)), tokenizer, "tiny-llama")


def _spread(model):
    """Random weights of a size at which attention is far from uniform, so that a wrong mask shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="session")
def word_tokenizer():
    from vpgtrans.engine.pretrain.tokenizer import train_word_level

    return train_word_level(WORDS)


@pytest.fixture(scope="session")
def make_llm(word_tokenizer):
    """make_llm("opt" | "opt-350m" | "llama", tokenizer=..., width=..., seed=...) -> a tiny LanguageModel with random weights."""

    def make(family: str, tokenizer=None, **sizes) -> LanguageModel:
        tokenizer = tokenizer or word_tokenizer
        if family == "llama":
            return _tiny_llama(tokenizer, **sizes)
        return _tiny_opt(tokenizer, **({"embedding_width": 16} if family == "opt-350m" else {}), **sizes)

    return make


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    """A folder with scenes, a random tower, two random language models, a random VPG and a source run's model, all in their real formats."""
    from transformers import Blip2VisionConfig

    from vpgtrans.engine.data.scenes import BACKGROUNDS, COLOURS, LANDMARKS, SHAPES, SIZES, write_world
    from vpgtrans.engine.models.vision import eva_vit
    from vpgtrans.engine.models.vpg import VPG, save_parts
    from vpgtrans.engine.pretrain.tokenizer import train_word_level
    from vpgtrans.engine.recipe import QFormerConfig

    root = tmp_path_factory.mktemp("tiny_world")
    write_world(root / "world", train=24, source=8, val=6, text=8, pixels=32)
    captions = [a["caption"] for a in json.loads((root / "world" / "captions_text.json").read_text())["annotations"]]
    tokenizer = train_word_level(
        [*captions, "question: answer: what is beside the thing?", *COLOURS, *SHAPES, *LANDMARKS, *BACKGROUNDS, *SIZES]
    )
    for name, width, seed in (("lm_source", 24, 1), ("lm_target", 32, 2)):
        llm = _tiny_llama(tokenizer, width=width, seed=seed)
        llm.model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    torch.manual_seed(3)
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
        "hidden_act": "gelu", "initializer_range": 0.2,
    }  # fmt: skip
    (root / "tower").mkdir()
    (root / "tower" / "config.json").write_text(json.dumps(sizes))
    save_file(eva_vit(Blip2VisionConfig(**sizes)).model.state_dict(), root / "tower" / "model.safetensors")
    config = QFormerConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_query_tokens=4,
        dropout=0.1,
        initializer_range=0.2,
    )
    vision = {"kind": "eva_vit", "path": str(root / "tower"), "image_size": 32}
    common = {"recipe": "tiny", "image_width": 16, "qformer": config.model_dump(), "pairs": 0, "vision": vision}
    save_parts(root / "vpg" / "model", {"vpg": VPG(config, 16)}, {**common, "llm": None})
    parts = {"vpg": VPG(config, 16), "projector": torch.nn.Linear(16, 24)}
    save_parts(root / "source" / "model", parts, {**common, "llm": str(root / "lm_source")})
    return root


@pytest.fixture
def tiny_recipe(tiny_world, tmp_path) -> Path:
    """A two-stage transfer in the tiny world with dropout, augmentation, carried captions and frequent checkpoints; output in tmp_path/run."""
    world = tiny_world / "world"
    values = {
        "name": "tiny", "seed": 3, "device": "cpu", "threads": 1,
        "source": {"vlm": str(tiny_world / "source"), "vpg": str(tiny_world / "vpg")},
        "target": {"llm": str(tiny_world / "lm_target")},
        "vision": {"kind": "eva_vit", "path": str(tiny_world / "tower"), "image_size": 32},
        "data": {
            "train": [{"name": "scenes", "captions": str(world / "captions_train.json"), "images": str(world / "images")}],
            "val": {"captions": str(world / "captions_val.json"), "images": str(world / "images")},
            "row_tokens": 96, "rows_per_micro_batch": 2, "transform": "train", "captions_per_image": 4,
        },
        "stages": [
            {"name": "warm_up", "trains": "projector", "learning_rate": 1e-3, "pairs": 66, "batch_pairs": 11, "eval_every_pairs": 33},
            {"name": "direct", "trains": "vpg_and_projector", "learning_rate": 1e-3, "pairs": 154, "batch_pairs": 11, "schedule": "cosine",
             "warmup_pairs": 22, "eval_every_pairs": 44},
        ],
        "evaluation": {
            "generate_images": 4, "generate": {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 0}, "attributes": True, "samples": 2,
            "questions": str(world / "questions_val.json"), "answers": str(world / "answers_val.json"), "question_prompt": "question: {} answer:",
        },
        "output": {"folder": str(tmp_path / "run"), "checkpoint_every_pairs": 22, "log_every_updates": 2, "tensorboard": False},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
