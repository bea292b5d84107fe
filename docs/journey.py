"""The whole journey on tiny random weights in the real formats, in about a minute on a laptop:

LAVIS .pth with OPT -> word converter -> two stages with a LLaMA-type model -> eval -> export -> transformers captions a picture.

    python docs/journey.py [FOLDER]

Every step is a `vpgtrans` command, printed before it runs; only the making of the random weights is special to this script.  With real files
the recipe's paths change and nothing else.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    Blip2VisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from vpgtrans.engine.cli import main as vpgtrans
from vpgtrans.engine.data.images import read_image
from vpgtrans.engine.data.scenes import BACKGROUNDS, COLOURS, LANDMARKS, SHAPES, SIZES
from vpgtrans.engine.models.vision import eva_vit
from vpgtrans.engine.models.vpg import VPG
from vpgtrans.engine.pretrain.tokenizer import train_word_level
from vpgtrans.engine.recipe import QFormerConfig

VIT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
QFORMER = QFormerConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96, num_query_tokens=8
)


def run(*arguments: str) -> None:
    """One `vpgtrans` command, shown first; the script ends where one fails."""
    print("\n$ vpgtrans", " ".join(arguments), flush=True)
    if code := vpgtrans(arguments):
        sys.exit(code)


def lavis_names(vpg: VPG, projector: torch.nn.Linear) -> dict[str, torch.Tensor]:
    """VPG and projector under the names that a LAVIS checkpoint of BLIP-2 with OPT has."""
    named = {
        "query_tokens": vpg.query_tokens.detach(),
        "opt_proj.weight": projector.weight.detach(),
        "opt_proj.bias": projector.bias.detach(),
    }
    named |= {f"ln_vision.{k}": v for k, v in vpg.ln_vision.state_dict().items()}
    for name, tensor in vpg.qformer.state_dict().items():
        if name.startswith("layernorm."):
            named[f"Qformer.bert.embeddings.LayerNorm.{name.removeprefix('layernorm.')}"] = tensor
        else:
            named[f"Qformer.bert.{name}".replace("attention.attention.", "attention.self.")] = tensor
    return named


def eva_names(config: Blip2VisionConfig) -> dict[str, torch.Tensor]:
    """A random ViT under the names of eva_vit_g.pth, with the one block more that BLIP-2 leaves out."""
    larger = Blip2VisionConfig(**{**config.to_dict(), "num_hidden_layers": config.num_hidden_layers + 1})
    named: dict[str, torch.Tensor] = {}
    for name, tensor in eva_vit(larger).model.state_dict().items():
        name = name.replace("embeddings.class_embedding", "cls_token").replace(
            "embeddings.position_embedding", "pos_embed"
        )
        name = name.replace("embeddings.patch_embedding", "patch_embed.proj").replace("encoder.layers.", "blocks.")
        name = (
            name.replace("layer_norm", "norm")
            .replace("self_attn.projection", "attn.proj")
            .replace("self_attn.qkv", "attn.qkv")
        )
        if name.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            named[name.replace("qkv.bias", "q_bias")], named[name.replace("qkv.bias", "v_bias")] = (
                query.clone(),
                value.clone(),
            )
        else:
            named[name] = tensor
    return named


def make_inputs(root: Path) -> None:
    """Pictures with captions, two random language models that share their words, and BLIP-2's two .pth files."""
    run("scenes", str(root / "world"), "--train=64", "--source=4", "--val=12", "--text=64", "--pixels=56")
    annotations = yaml.safe_load((root / "world" / "captions_text.json").read_text())["annotations"]
    tokenizer = train_word_level(
        [*(a["caption"] for a in annotations), "question: answer:", *COLOURS, *SHAPES, *LANDMARKS, *BACKGROUNDS, *SIZES]
    )
    common = {
        "vocab_size": len(tokenizer) + 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    common |= {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    models = {
        "opt": OPTForCausalLM(OPTConfig(**common, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64)),
        "llama": LlamaForCausalLM(LlamaConfig(**common, hidden_size=48, intermediate_size=96)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    config = Blip2VisionConfig(**VIT, initializer_range=0.2)
    torch.save(eva_names(config), root / "eva_vit.pth")
    vpg = VPG(QFORMER, VIT["hidden_size"])
    torch.save({"model": lavis_names(vpg, torch.nn.Linear(QFORMER.hidden_size, 32))}, root / "blip2_opt.pth")


def recipe(root: Path) -> Path:
    world = root / "world"
    values = {
        "name": "vl_tiny_llama",
        "source": {"vlm": str(root / "blip2_opt.pth"), "llm": str(root / "opt")},
        "target": {"llm": str(root / "llama")},
        "vision": {"kind": "eva_vit", "path": str(root / "eva_vit.pth"), "config": VIT},
        "converter": {"ridges": [0.1]},
        "data": {
            "train": [{"name": "scenes", "captions": str(world / "captions_train.json"), "images": str(world / "images")}],
            "val": {"name": "scenes", "captions": str(world / "captions_val.json"), "images": str(world / "images")},
            "row_tokens": 128, "transform": "eval", "vision_cache": True,
        },
        "stages": [
            {"name": "warm_up", "trains": "projector", "learning_rate": 5e-3, "pairs": 320, "batch_pairs": 32, "eval_every_pairs": 160},
            {"name": "direct", "trains": "vpg_and_projector", "learning_rate": 1e-3, "schedule": "cosine", "pairs": 640, "batch_pairs": 32,
             "eval_every_pairs": 320},
        ],
        "evaluation": {"generate": {"num_beams": 2, "max_new_tokens": 12, "min_new_tokens": 1}, "generate_images": 8},
        "output": {"folder": str(root / "run")},
    }  # fmt: skip
    path = root / "vl_tiny_llama.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def main(folder: str | None = None) -> None:
    disable_progress_bar()
    root = Path(folder or tempfile.mkdtemp(prefix="journey-")).resolve()
    root.mkdir(parents=True, exist_ok=True)
    make_inputs(root)
    path, images = recipe(root), root / "world" / "images"
    picture = sorted(images.iterdir())[0]
    run("convert", str(path))
    run("train", str(path))
    beams = ("--num-beams=2", "--max-new-tokens=12", "--min-new-tokens=1")
    references = str(root / "world" / "captions_val.json")
    run(
        "eval",
        str(root / "run"),
        "--task=caption",
        "--references",
        references,
        "--images",
        str(images),
        "--out",
        str(root / "eval"),
        *beams,
    )
    run("export", str(root / "run"), str(root / "exported"))
    run("caption", str(root / "exported"), str(picture), *beams)
    print("\n# the same folder, by transformers alone", flush=True)
    model = Blip2ForConditionalGeneration.from_pretrained(root / "exported").eval()
    processor = AutoProcessor.from_pretrained(root / "exported")
    inputs = processor(images=read_image(picture), text="", return_tensors="pt")
    ids = model.generate(**inputs, num_beams=2, max_new_tokens=12, min_new_tokens=1)
    new = ids[:, inputs["input_ids"].shape[1] :]
    print(f"{picture}: {processor.batch_decode(new, skip_special_tokens=True)[0].strip()}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
