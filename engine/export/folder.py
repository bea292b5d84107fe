"""`vpgtrans export RUN OUT`: a folder that `Blip2ForConditionalGeneration` and `AutoProcessor` load, and that can be a source again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionModel,
    GenerationConfig,
)

from ..checkpoint import CheckpointError, readable, write_json
from ..models.hf_vision import quiet
from ..models.llm import ModelError
from ..models.opening import Opened, open_model
from ..recipe import Generation
from .card import model_card
from .language_model import for_export


def export(
    run: str | Path, out: str | Path, *, include_llm: bool = True, max_shard_size: str = "5GB"
) -> dict[str, Any]:
    """Write `out`, whole or not at all, and return what the screen shows: files, parameters, the image token's id and row.

    include_llm: false leaves the language model's weights out and names its folder or hub id; transformers cannot load such a folder, but
    this package can, as a model and as a source.
    Raises ModelError where transformers' BLIP-2 cannot hold the model (another tower than EVA-CLIP's kind), CheckpointError for a bad run,
    and when `out` exists and is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"export: expected a new or empty folder, got {out}; choose another, or remove it")
    opened = open_model(run, dtype="auto")  # the language model is written as it is stored
    language_model, tokenizer, image, how = for_export(opened.model.llm)
    config = _config(opened, language_model, image)
    whole = _assembled(opened, config, language_model)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        settings = _generation(opened)
        whole.generation_config = _generation_config(opened, settings)
        state = whole.state_dict()
        if not include_llm:
            state = {k: v for k, v in state.items() if not k.startswith("language_model.")}
        parameters = sum(t.numel() for t in state.values())
        whole.save_pretrained(temporary, max_shard_size=max_shard_size, state_dict=state)
        _processor(opened, tokenizer).save_pretrained(temporary)
        record = _record(opened, include_llm, how)
        write_json(temporary / "vpgtrans.json", record)
        (temporary / "README.md").write_text(model_card(opened, record, settings, out.name))
        readable(*temporary.iterdir())
        if out.exists():
            out.rmdir()
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {
        "files": sorted(p.name for p in out.iterdir()),
        "parameters": parameters,
        "image_token_id": image,
        "image_token": how,
    }


def _config(opened: Opened, language_model: Any, image: int) -> Blip2Config:
    module = getattr(opened.tower.module, "model", None)
    if not isinstance(module, Blip2VisionModel):
        raise ModelError(
            f"export: expected a tower of BLIP-2's own kind (vision.kind eva_vit), got {opened.tower.path!r}; transformers' BLIP-2 holds "
            "no other, so this run can be used with this package only"
        )
    qformer, llm = opened.model.vpg.config, opened.model.llm
    vision = module.config.to_dict()
    # One eps for the blocks and for ln_vision: the reference's ln_vision has 1e-5, and the blocks' outputs then differ by 5e-7 only.
    vision["layer_norm_eps"] = opened.model.vpg.ln_vision.eps
    text = language_model.config.to_dict()
    text |= {
        "architectures": [type(language_model).__name__], "_name_or_path": llm.path, "bos_token_id": llm.special.bos,
        "pad_token_id": llm.special.pad,
        # BLIP-2's generate asks its language model, which has its end tokens from here and not from generation_config.json.
        "eos_token_id": llm.ends if len(llm.ends) > 1 else llm.ends[0],
    }  # fmt: skip
    config = Blip2Config(
        vision_config=vision,
        qformer_config=Blip2QFormerConfig(
            hidden_size=qformer.hidden_size, num_hidden_layers=qformer.num_hidden_layers, num_attention_heads=qformer.num_attention_heads,
            intermediate_size=qformer.intermediate_size, cross_attention_frequency=qformer.cross_attention_frequency,
            layer_norm_eps=qformer.layer_norm_eps, hidden_dropout_prob=qformer.dropout, attention_probs_dropout_prob=qformer.dropout,
            encoder_hidden_size=opened.tower.width,
        ).to_dict(),
        text_config=text, num_query_tokens=qformer.num_query_tokens, image_token_index=image,
    )  # fmt: skip
    config.architectures = ["Blip2ForConditionalGeneration"]
    return config


def _assembled(opened: Opened, config: Blip2Config, language_model: Any) -> Blip2ForConditionalGeneration:
    """transformers' model around our tensors, which it shares rather than copies."""
    with torch.device("meta"):
        whole = Blip2ForConditionalGeneration(config)
    vpg = opened.model.vpg
    whole.language_model = language_model
    whole.qformer.load_state_dict(vpg.qformer.state_dict(), assign=True)
    tower = {k: v for k, v in opened.tower.module.model.state_dict().items() if "post_layernorm" not in k}
    norm = {f"post_layernorm.{k}": v for k, v in vpg.ln_vision.state_dict().items()}
    whole.vision_model.load_state_dict({**tower, **norm}, assign=True)
    whole.query_tokens = torch.nn.Parameter(vpg.query_tokens.detach(), requires_grad=False)
    whole.language_projection.load_state_dict(opened.model.projector.state_dict(), assign=True)
    return whole.eval()


def _processor(opened: Opened, tokenizer: Any) -> Blip2Processor:
    side, norm = opened.tower.image_size, opened.tower.norm
    with quiet():  # it says each time that it would rather have torchvision
        from transformers import BlipImageProcessor
    image = BlipImageProcessor(
        do_resize=True, size={"height": side, "width": side}, resample=3, do_rescale=True, do_normalize=True, image_mean=list(norm.mean),
        image_std=list(norm.std), do_convert_rgb=True,
    )  # fmt: skip
    return Blip2Processor(image, tokenizer, num_query_tokens=opened.model.queries)


def _generation(opened: Opened) -> Generation:
    """The settings that the run was scored with, else the reference's."""
    summary = _run_file(opened, "summary.json")
    return Generation(**summary["generation"]) if summary and "generation" in summary else Generation()


def _generation_config(opened: Opened, settings: Generation) -> GenerationConfig:
    llm = opened.model.llm
    more = {"decoder_start_token_id": llm.start} if llm.is_encoder_decoder else {"bos_token_id": llm.special.bos}
    return llm.generation_config(settings, **more)


def _run_file(opened: Opened, name: str) -> dict[str, Any] | None:
    """A JSON file of the run that `opened.weights` lies in."""
    for folder in (opened.weights.parent, opened.weights):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text())
    return None


def _record(opened: Opened, include_llm: bool, how: str) -> dict[str, Any]:
    """What the card and a later reader need: where the folder came from."""
    return {
        "exported_from": opened.name, "language_model": opened.model.llm.path, "language_model_included": include_llm, "image_token": how,
        "tower": opened.tower.path, "run": opened.run, "summary": _run_file(opened, "summary.json"),
    }  # fmt: skip
