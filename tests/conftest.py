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
    from vpgtrans.engine.tiny_world import spread

    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=width, word_embed_proj_dim=embedding_width or width, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, dropout=0.0, do_layer_norm_before=embedding_width is None,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return CausalLanguageModel(spread(OPTForCausalLM(config)), tokenizer, "tiny-opt")


def _tiny_llama(tokenizer, *, width: int = 32, seed: int = 0) -> LanguageModel:
    """A random LLaMA with grouped keys and values in float32."""
    from vpgtrans.engine.models.causal import CausalLanguageModel
    from vpgtrans.engine.tiny_world import tiny_llama

    return CausalLanguageModel(tiny_llama(tokenizer, width, seed), tokenizer, "tiny-llama")


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
def make_vlm():
    """make_vlm(llm) -> a vision-language model around it, with the smallest of Q-Formers."""
    from vpgtrans.engine.models.vlm import VisionLanguageModel
    from vpgtrans.engine.models.vpg import VPG
    from vpgtrans.engine.recipe import QFormerConfig

    sizes = QFormerConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return lambda llm: VisionLanguageModel(VPG(sizes, 6), torch.nn.Linear(8, llm.hidden_width), llm)


@pytest.fixture
def no_tower():
    """A tower of nothing: images are features, of 5 tokens and the width that make_vlm's Q-Former reads."""
    from vpgtrans.engine.models.tower import CLIP_NORM, VisionTower

    return VisionTower(torch.nn.Identity(), 6, 5, 32, CLIP_NORM, "none")


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    """A folder with scenes, a random tower, two random language models, a random VPG and a source run's model, all in their real formats."""
    from vpgtrans.engine.tiny_world import write_tiny_world

    return write_tiny_world(tmp_path_factory.mktemp("tiny_world"))


@pytest.fixture
def tiny_recipe(tiny_world, tmp_path) -> Path:
    """A two-stage transfer in the tiny world with dropout, augmentation, carried captions and frequent checkpoints; output in tmp_path/run."""
    from vpgtrans.engine.tiny_world import tiny_recipe

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tiny_world, tmp_path / "run")))
    return path
