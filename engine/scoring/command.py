"""`vpgtrans score`: the official numbers of an existing prediction file, without any model.

    vpgtrans score --task caption --references captions_val2014.json --predictions results.json
    vpgtrans score --task vqa --references v2_mscoco_val2014_annotations.json --predictions results.json --json

Neither torch nor transformers is imported, so that a mistake in a file is reported at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .bleu_rouge import bleu, rouge_l
from .cider import cider
from .files import (
    DOMAINS,
    Id,
    JsonFile,
    ScoreError,
    caption_references,
    check_same_ids,
    counted,
    entries,
    image_domains,
    listed_ids,
    predicted_texts,
    read_json_file,
)
from .java_metrics import JAVA_METRICS, java_metric_unsupported_reason, java_score, java_setting
from .okvqa import lemmatise, load_lemmatiser
from .ptb_tokenizer import ptb_tokenize
from .record import library_versions
from .vqa import gqa_accuracy, vqa_accuracy

CAPTION_TASKS = ("caption", "nocaps")
VQA_TASKS = ("vqa", "okvqa")
DEFAULT_METRICS = ("cider", "bleu", "rouge")
METRICS = (*DEFAULT_METRICS, *JAVA_METRICS)


def main(options: argparse.Namespace) -> int:
    """Score the files that `options` names, print a table or JSON, write JSON to `options.out`; returns 0.

    Raises ScoreError for options or files that cannot be scored.
    """
    _check_options(options)
    result = score_files(
        options.task,
        options.references,
        options.predictions,
        questions=options.questions,
        metrics=_metric_names(options.metrics),
        tokenized=options.tokenized,
        lemmatised=options.lemmatise,
    )
    if options.out is not None:
        _write_whole(Path(options.out), json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        _print_table(result)
    return 0


def score_files(
    task: str,
    references: str | os.PathLike[str],
    predictions: str | os.PathLike[str],
    *,
    questions: str | os.PathLike[str] | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    tokenized: bool = False,
    lemmatised: bool = False,
) -> dict[str, Any]:
    """Score a prediction file in its task's official format, against the official references.

    Args:
        task: 'caption', 'nocaps', 'vqa', 'okvqa' or 'gqa'.
        references: COCO or NoCaps captions, VQA annotations, or GQA questions with their answers.
        predictions: [{image_id, caption}], [{question_id, answer}] or [{questionId, prediction}].
        questions: vqa and okvqa: score the questions of this official questions file only.
        metrics: captions: any of `METRICS`.
        tokenized: captions: both files hold tokens joined by spaces already.
        lemmatised: okvqa: lemmatise the predictions first, as the authors do.

    Returns:
        {"task", "metrics", "count", "counted" ('images' or 'questions'), "settings", "files", "versions"}, as plain
        data that `json.dumps` takes. Metrics of captions are on the scale 0 to 1 (CIDEr 0 to 10), accuracies in
        percent; nothing is rounded. NoCaps has its metrics under 'overall' and under each domain.

    Raises:
        ScoreError: a file or a metric cannot be used; the message says which, and the remedy.
    """
    for metric in metrics if task in CAPTION_TASKS else ():
        reason = java_metric_unsupported_reason(metric) if metric in JAVA_METRICS else None
        if reason is not None:
            raise ScoreError(f"--metrics {metric}: cannot run: {reason}; or leave {metric} out")
    files = {"references": read_json_file(references, _expected_references(task))}
    files["predictions"] = read_json_file(predictions, "a list of predictions in the task's official format")
    if questions is not None:
        files["questions"] = read_json_file(questions, "an object with the list 'questions' (VQA)")
    if task in CAPTION_TASKS:
        scored = _score_captions(task, files, metrics, tokenized)
    elif task in VQA_TASKS:
        scored = _score_vqa(files, lemmatised)
    else:
        scored = _score_gqa(files)
    return {
        "task": task,
        **scored,
        "files": {role: {"name": file.name, "sha256": file.sha256} for role, file in files.items()},
        "versions": library_versions(("vpgtrans",)),
    }


def _score_captions(
    task: str, files: Mapping[str, JsonFile], metrics: Sequence[str], tokenized: bool
) -> dict[str, Any]:
    references = caption_references(files["references"])
    domains = image_domains(files["references"]) if task == "nocaps" else {}
    candidates = predicted_texts(files["predictions"], ("image_id",), ("caption",))
    check_same_ids(files["references"].name, references, files["predictions"].name, candidates, "image")
    empty = [image for image, text in candidates.items() if not text.strip()]
    if empty:
        raise ScoreError(
            f"{files['predictions'].name}: {counted(empty, 'empty caption')} of {len(candidates):,}; "
            "caption these images, or drop them from both files"
        )
    if not tokenized:  # once, instead of once for each metric
        references = {image: [_tokens(text) for text in texts] for image, texts in references.items()}
        candidates = {image: _tokens(text) for image, text in candidates.items()}
    settings = {
        "metrics": list(metrics),
        "tokenizer": "none, captions given as tokens" if tokenized else "PTB as in coco-caption (Stanford 3.4.1)",
        "document_frequency": "references of the scored images",
    }
    if any(metric in JAVA_METRICS for metric in metrics):
        settings["java_metrics"] = java_setting()
    result: dict[str, Any] = {"count": len(candidates), "counted": "images", "settings": settings}
    if task == "caption":
        return {"metrics": caption_metrics(references, candidates, metrics), **result}
    groups = {"overall": list(candidates)}
    groups |= {domain: [image for image in candidates if domains[image] == domain] for domain in DOMAINS}
    settings["document_frequency"] = "references of the scored images; of its own images for each domain"
    by_group = {
        name: caption_metrics({i: references[i] for i in images}, {i: candidates[i] for i in images}, metrics)
        for name, images in groups.items()
        if images
    }
    return {"metrics": by_group, **result, "domain_counts": {domain: len(groups[domain]) for domain in DOMAINS}}


def caption_metrics(
    references: Mapping[Id, Sequence[str]], candidates: Mapping[Id, str], metrics: Sequence[str]
) -> dict[str, float]:
    """Metrics of token strings, in the order asked for."""
    found: dict[str, float] = {}
    for metric in metrics:
        if metric == "cider":
            found["cider"] = cider(references, candidates, tokenized=True)[0]
        elif metric == "bleu":
            corpus = bleu(references, candidates, tokenized=True)[0]
            found |= {f"bleu_{order}": value for order, value in enumerate(corpus, start=1)}
        elif metric == "rouge":
            found["rouge_l"] = rouge_l(references, candidates, tokenized=True)[0]
        else:
            found[metric] = java_score(metric, references, candidates)
    return found


def _tokens(text: str) -> str:
    return " ".join(ptb_tokenize(text))


def _score_vqa(files: Mapping[str, JsonFile], lemmatised: bool) -> dict[str, Any]:
    references, predictions = files["references"], files["predictions"]
    asked = listed_ids(references, "annotations", "question_id")
    annotations, wanted_in = entries(references, "annotations"), references.name
    if "questions" in files:
        chosen = listed_ids(files["questions"], "questions", "question_id")
        unannotated = sorted(set(chosen) - set(asked), key=str)
        if unannotated:
            raise ScoreError(
                f"{references.name}: no annotation for {counted(unannotated, 'question')} of {len(chosen):,} in "
                f"{files['questions'].name}; give the annotations that belong to it"
            )
        asked, kept, wanted_in = chosen, set(chosen), files["questions"].name
        annotations = [annotation for annotation in annotations if annotation["question_id"] in kept]
    answers = predicted_texts(predictions, ("question_id",), ("answer",))
    check_same_ids(wanted_in, asked, predictions.name, answers, "question")
    settings = {
        "accuracy": "official VQA evaluation",
        "lemmatise": None,
        "questions": "all annotated" if "questions" not in files else "those of the questions file",
    }
    if lemmatised:
        pipeline, settings["lemmatise"] = load_lemmatiser()
        answers = lemmatise(answers, pipeline)
    try:
        accuracy = vqa_accuracy(annotations, [{"question_id": q, "answer": a} for q, a in answers.items()])
    except ValueError as error:
        raise ScoreError(f"{references.name}: {error}") from error
    return {
        "metrics": {
            "accuracy_percent": accuracy["overall"],
            "answer_type_percent": _means_by(annotations, "answer_type", accuracy["per_question"]),
            "question_type_percent": _means_by(annotations, "question_type", accuracy["per_question"]),
        },
        "count": len(answers),
        "counted": "questions",
        "settings": settings,
    }


def _means_by(annotations: Iterable[Mapping[str, Any]], key: str, percent_of: Mapping[Id, float]) -> dict[str, float]:
    """Mean accuracy of the questions of each type, in the file's order; annotations without `key` are in none."""
    groups: dict[str, list[float]] = {}
    for annotation in annotations:
        if key in annotation:
            groups.setdefault(str(annotation[key]), []).append(percent_of[annotation["question_id"]])
    return {name: math.fsum(percents) / len(percents) for name, percents in groups.items()}


def _score_gqa(files: Mapping[str, JsonFile]) -> dict[str, Any]:
    references, predictions = files["references"], files["predictions"]
    if not isinstance(references.value, dict) or not references.value:
        raise ScoreError(f"{references.name}: expected {_expected_references('gqa')}; is this the right file?")
    answers = predicted_texts(predictions, ("questionId", "question_id"), ("prediction", "answer"))
    check_same_ids(references.name, references.value, predictions.name, answers, "question")
    try:
        accuracy = gqa_accuracy(references.value, [{"question_id": q, "answer": a} for q, a in answers.items()])
    except ValueError as error:
        raise ScoreError(f"{references.name}: {error}") from error
    return {
        "metrics": {"accuracy_percent": accuracy["overall"]},
        "count": len(answers),
        "counted": "questions",
        "settings": {"accuracy": "exact match; outer spaces, capital letters and a final period do not count"},
    }


def _expected_references(task: str) -> str:
    if task in CAPTION_TASKS:
        return "an object with the lists 'images' and 'annotations' (COCO captions)"
    if task in VQA_TASKS:
        return "an object with the list 'annotations' (VQA)"
    return "an object {question id: {answer}} (GQA questions)"


def _check_options(options: argparse.Namespace) -> None:
    """Refuse options that the task would ignore, and an output that would not be written or overwrite an input."""
    captions_only = {"--metrics": options.metrics is not None, "--tokenized": options.tokenized}
    for option, given in captions_only.items():
        if given and options.task not in CAPTION_TASKS:
            raise ScoreError(
                f"{option}: for {' and '.join(CAPTION_TASKS)} only, the task is {options.task}; leave it out"
            )
    if options.lemmatise and options.task != "okvqa":
        raise ScoreError(f"--lemmatise: for okvqa only, the task is {options.task}; leave it out")
    if options.questions is not None and options.task not in VQA_TASKS:
        raise ScoreError(f"--questions: for {' and '.join(VQA_TASKS)} only, the task is {options.task}; leave it out")
    if options.out is None:
        return
    out = Path(options.out).resolve()
    if not out.parent.is_dir() or out.is_dir():
        raise ScoreError(f"--out: expected a file in a folder that exists, got {options.out}; make the folder first")
    for given in (options.references, options.predictions, options.questions):
        if given is not None and Path(given).resolve() == out:
            raise ScoreError(f"--out: {options.out} is an input of this command; choose another name")


def _metric_names(given: str | None) -> tuple[str, ...]:
    if given is None:
        return DEFAULT_METRICS
    names = tuple(dict.fromkeys(name.strip().lower() for name in given.split(",")))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ScoreError(
            f"--metrics: expected some of {','.join(METRICS)}, got {given!r} ({unknown[0]!r} is none of them)"
        )
    return names


def _write_whole(path: Path, text: str) -> None:
    """Write under the final name only when whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ScoreError(f"--out: {path} cannot be written ({error.strerror}); choose another place") from error


def _print_table(result: Mapping[str, Any]) -> None:
    metrics = result["metrics"]
    table = Table()
    if result["task"] == "nocaps":
        table.add_column("metric")
        for group in metrics:
            images = result["count"] if group == "overall" else result["domain_counts"][group]
            table.add_column(f"{group}\n{images:,} images", justify="right")
        for name in metrics["overall"]:
            table.add_row(name, *(f"{group[name]:.4f}" for group in metrics.values()))
    else:
        table.add_column("metric", overflow="fold")
        table.add_column("value", justify="right")
        for name, value in metrics.items():
            if isinstance(value, dict):
                of_type = name.removesuffix("_percent").replace("_", " ")
                for kind, percent in value.items():
                    table.add_row(f"{of_type} {kind}", f"{percent:.2f} %")
            elif name.endswith("_percent"):
                table.add_row(name.removesuffix("_percent"), f"{value:.2f} %")
            else:
                table.add_row(name, f"{value:.4f}")
    console = Console()
    console.print(f"{result['task']}: {result['count']:,} {result['counted']}", markup=False, highlight=False)
    console.print(table, markup=False)
    for name, value in result["settings"].items():
        shown = ",".join(value) if isinstance(value, list) else "no" if value is None else value
        console.print(f"{name}: {shown}", markup=False, highlight=False)
