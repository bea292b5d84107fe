"""`vpgtrans eval MODEL --task ...`: predict a whole data set, score it, and keep the predictions with the settings they were made with."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .captioning import generation_of, placement
from .checkpoint import write_json
from .data.coco import QuestionSet, read_captions, read_questions
from .data.formats import CaptionFormat
from .data.prompts import CAPTION_PROMPT, vqa_prompt
from .data.reading import DataError, RefusalReport
from .models.opening import Opened, open_model
from .recipe import Generation
from .runlog import console
from .scoring.command import caption_metrics
from .scoring.files import ScoreError
from .scoring.okvqa import lemmatise, load_lemmatiser
from .scoring.ptb_tokenizer import ptb_tokenize
from .scoring.record import result_record
from .scoring.vqa import gqa_accuracy, vqa_accuracy

CAPTION_TASKS = ("caption", "nocaps")
# The reference's settings a task (LAVIS's configurations): answers are short, so short beams are not held back.
DEFAULTS = {
    "caption": Generation(),
    "nocaps": Generation(),
    **{t: Generation(max_new_tokens=10, min_new_tokens=0, length_penalty=-1.0) for t in ("vqa", "okvqa", "gqa")},
}


def main(options: argparse.Namespace) -> int:
    """Read the data, open the model, predict, score, write `out/predictions.json` and `out/result.json`, print the scores; returns 0."""
    settings = _settings(options)
    if options.lemmatise and options.task != "okvqa":
        raise ScoreError(f"--lemmatise: for okvqa only, the task is {options.task}; leave it out")
    if options.task not in CAPTION_TASKS and options.prompt is not None and "{}" not in options.prompt:
        raise DataError(f"--prompt: expected {{}} where the question goes, got {options.prompt!r}")
    pipeline = load_lemmatiser()[0] if options.lemmatise else None
    out = Path(options.out)
    try:  # before hours of prediction, not after
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out: expected a folder that can be made, got {out}: {error.strerror}") from error
    if options.task in CAPTION_TASKS:
        data = read_captions(
            options.references, options.images, format=_format(options), split=options.split, limit=options.limit, preprocess=False
        )  # fmt: skip
    else:
        source, answers = (options.questions, options.references) if options.questions else (options.references, None)
        data = read_questions(source, answers, options.images, image_name=options.image_name, limit=options.limit)
        if not any(record.answers for record in data.records):
            raise DataError(
                f"--references: expected answers to the questions of {source}, got none; name the annotations file too"
            )
    _say_refused(data.refused)
    device, dtype = placement(options.device, options.precision)
    opened = open_model(options.model, device, dtype)
    is_caption = options.task in CAPTION_TASKS
    prompt = options.prompt or (CAPTION_PROMPT if is_caption else vqa_prompt("{}", opened.model.llm.is_encoder_decoder))
    norm = opened.tower.norm
    record = result_record(  # before the predictions: a model without a file to hash is refused now
        generation=settings.model_dump(), prompt=prompt,
        transform={"name": "eval", "image_size": opened.tower.image_size, "mean": norm.mean, "std": norm.std}, checkpoint=opened.weights,
    )  # fmt: skip
    if is_caption:
        predictions, metrics = _caption_task(opened, data, settings, prompt, options)
    else:
        predictions, metrics = _question_task(opened, data, settings, prompt, options, pipeline)
    result = {
        "task": options.task, "model": str(options.model), "metrics": metrics, "count": len(predictions),
        "references": str(options.references), "refused": data.refused.summary(), "lemmatised": bool(options.lemmatise),
        **record, "precision": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    write_json(out / "result.json", result)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in _flat(metrics):
            console.print(f"{name}: {value:.4f}")
        console.print(
            f"{options.task}: {len(predictions):,} predictions; wrote {out}/predictions.json and {out}/result.json"
        )
    return 0


def _settings(options: argparse.Namespace) -> Generation:
    """The task's defaults, with what the command line gives."""
    given = DEFAULTS[options.task]
    for name in ("num_beams", "max_new_tokens", "length_penalty"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(given, name))
    if options.min_new_tokens is None:
        options.min_new_tokens = min(given.min_new_tokens, options.max_new_tokens)
    return generation_of(options)


def _format(options: argparse.Namespace) -> CaptionFormat:
    return "nocaps" if options.task == "nocaps" else "auto"


def _say_refused(report: RefusalReport) -> None:
    if report.named:
        console.print(report.summary(), style="yellow")


def _caption_task(
    opened: Opened, data: Any, settings: Generation, prompt: str, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    records = data.records
    texts = predict(opened, [r.path for r in records], [prompt] * len(records), settings, options.batch_images)
    predictions = [{"image_id": r.image_id, "caption": t} for r, t in zip(records, texts, strict=True)]
    write_json(Path(options.out) / "predictions.json", predictions)  # before the scores, which may fail
    tokens = {r.image_id: " ".join(ptb_tokenize(t)) for r, t in zip(records, texts, strict=True)}
    references = {r.image_id: [" ".join(ptb_tokenize(c)) for c in r.captions] for r in records}
    if empty := [image for image, text in tokens.items() if not text]:
        console.print(f"{len(empty)} empty captions, scored as the word 'empty'", style="yellow")
        tokens |= dict.fromkeys(empty, "empty")
    names = ("cider", "bleu", "rouge")
    if options.task == "caption":
        return predictions, caption_metrics(references, tokens, names)
    groups = {"overall": list(tokens)}
    for record in records:
        if record.domain:
            groups.setdefault(record.domain, []).append(record.image_id)
    return predictions, {
        name: caption_metrics({i: references[i] for i in ids}, {i: tokens[i] for i in ids}, names)
        for name, ids in groups.items()
    }


def _question_task(
    opened: Opened, data: QuestionSet, settings: Generation, prompt: str, options: argparse.Namespace, pipeline: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    records = [r for r in data.records if r.answers]
    prompts = [prompt.replace("{}", r.question) for r in records]
    texts = predict(opened, [r.path for r in records], prompts, settings, options.batch_images)
    answers = {r.question_id: t for r, t in zip(records, texts, strict=True)}
    if pipeline is not None:
        answers = lemmatise(answers, pipeline)
    if options.task == "gqa":
        predictions = [{"questionId": q, "prediction": a} for q, a in answers.items()]
        write_json(Path(options.out) / "predictions.json", predictions)  # before the scores, which may fail
        return predictions, {
            "accuracy_percent": gqa_accuracy({r.question_id: r.answers[0] for r in records}, predictions)["overall"]
        }
    predictions = [{"question_id": q, "answer": a} for q, a in answers.items()]
    write_json(Path(options.out) / "predictions.json", predictions)
    annotations = [{"question_id": r.question_id, "answers": [{"answer": a} for a in r.answers]} for r in records]
    return predictions, {"accuracy_percent": vqa_accuracy(annotations, predictions)["overall"]}


def predict(
    opened: Opened, images: Sequence[Path], prompts: Sequence[str], settings: Generation, batch: int
) -> list[str]:
    """One text for each image and prompt, in batches, with progress on the screen."""
    from rich.progress import track

    texts: list[str] = []
    for at in track(range(0, len(images), batch), "predicting", console=console, disable=not console.is_terminal):
        visual = opened.soft_prompts(list(images[at : at + batch]))
        texts += opened.model.llm.generate(visual, prompts[at : at + batch], settings)
    return texts


def _flat(metrics: Mapping[str, Any], before: str = "") -> list[tuple[str, float]]:
    return [
        pair
        for key, value in metrics.items()
        for pair in (_flat(value, f"{before}{key} ") if isinstance(value, Mapping) else [(before + key, float(value))])
    ]
