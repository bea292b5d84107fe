"""The model card of an export, written from its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..models.opening import Opened
from ..recipe import Generation

SCORES = {"cider": "CIDEr", "vqa_accuracy": "VQA accuracy", "attributes_right": "captions with every attribute right"}


def model_card(opened: Opened, record: dict[str, Any], settings: Generation, name: str) -> str:
    """README.md with front matter: what it is made of, how it was trained, what it scores and with which settings."""
    summary, recipe = record["summary"] or {}, _recipe(opened)
    given = {
        "num_beams": settings.num_beams,
        "max_new_tokens": settings.max_new_tokens,
        "min_new_tokens": settings.min_new_tokens,
    }
    arguments = ", ".join(f"{k}={v}" for k, v in given.items())
    lines = [
        "---", "library_name: transformers", "pipeline_tag: image-text-to-text", "tags: [blip-2, vpgtrans]",
        f"base_model: {Path(opened.model.llm.path).name if opened.model.llm.path.startswith('/') else opened.model.llm.path}", "---", "",
        f"# {name}", "",
        f"A vision-language model: the language model `{Path(opened.model.llm.path).name}` with a visual prompt generator of "
        f"{opened.model.queries} queries, transferred with vpgtrans (VPGTrans, arXiv 2305.01278).", "",
        *_usage(name, arguments, record["language_model_included"]), "", "## Training", "",
    ]  # fmt: skip
    lines += [f"- {key}: {value}" for key, value in _training(record, summary, recipe)]
    lines += ["", "## Scores", ""]
    rows = [(title, summary[key]) for key, title in SCORES.items() if isinstance(summary.get(key), (int, float))]
    if summary.get("final_val_loss") is not None:
        rows.append(("validation loss per token", summary["final_val_loss"]))
    lines += (
        ["| score | value |", "| --- | --- |", *(f"| {k} | {v:.4g} |" for k, v in rows)] if rows else ["None recorded."]
    )
    shown = ", ".join(f"{k} {v}" for k, v in settings.model_dump().items())
    lines += ["", f"Generation settings: {shown}."]
    return "\n".join(lines) + "\n"


def _usage(name: str, arguments: str, is_whole: bool) -> list[str]:
    if not is_whole:
        return [
            "**The language model's weights are not in this folder**, so transformers cannot load it; vpgtrans can, where the language model that",
            "`config.json` names (`text_config._name_or_path`) is at hand:", "", "```", f"vpgtrans caption {name} photo.jpg", "```",
        ]  # fmt: skip
    return [
        "```python",
        "from transformers import AutoProcessor, Blip2ForConditionalGeneration", "from PIL import Image", "",
        f'processor = AutoProcessor.from_pretrained("{name}")', f'model = Blip2ForConditionalGeneration.from_pretrained("{name}")',
        'inputs = processor(images=Image.open("photo.jpg").convert("RGB"), text="", return_tensors="pt")',
        f"ids = model.generate(**inputs, {arguments})",
        "print(processor.batch_decode(ids, skip_special_tokens=True)[0].strip())",
        "```",
    ]  # fmt: skip


def _training(record: dict[str, Any], summary: dict[str, Any], recipe: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [("recipe", f"`{record['exported_from']}`")]
    if recipe.get("arm"):
        rows.append(("method", recipe["arm"]))
    source = (recipe.get("source") or {}).get("vlm")
    if source:
        rows.append(("visual prompt generator inherited from", f"`{Path(str(source)).name}`"))
    for stage in recipe.get("stages", []):
        rows.append((f"stage {stage['name']}", f"{stage['trains'].replace('_', ' ')}, rate {stage['learning_rate']:g}"))
    sets = [entry["name"] for entry in (recipe.get("data") or {}).get("train", [])]
    if sets:
        rows.append(("data", ", ".join(sets)))
    if "pairs" in summary:
        rows.append(("pairs", f"{summary['pairs']:,} in {summary.get('updates', 0):,} updates"))
    if "gpu_hours" in summary:
        rows.append(("device-hours", f"{summary['gpu_hours']:.3f} ({summary.get('device', 'device unknown')})"))
    rows.append(("image token", record["image_token"]))
    return rows


def _recipe(opened: Opened) -> dict[str, Any]:
    path = opened.weights.parent / "recipe.yaml"
    return (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}
