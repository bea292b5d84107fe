"""Tokenizers of real models for small ones: loading bare vocabularies, and trimming them to what a corpus uses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..models.llm import ModelError, special_tokens


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer folder: complete, or a bare `vocab.json` + `merges.txt` (read as OPT's), or a bare `tokenizer.model` (as LLaMA's).

    Raises ModelError when the folder holds none of these.
    """
    names = {p.name for p in path.iterdir()} if path.is_dir() else set()
    if "tokenizer_config.json" in names or "tokenizer.json" in names:
        return AutoTokenizer.from_pretrained(str(path))
    if {"vocab.json", "merges.txt"} <= names:
        files = str(path / "vocab.json"), str(path / "merges.txt")
        return GPT2Tokenizer(*files, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")
    if "tokenizer.model" in names:
        return LlamaTokenizer.from_pretrained(str(path))
    raise ModelError(
        f"tokenizer: expected tokenizer_config.json, vocab.json with merges.txt, or tokenizer.model in {str(path)!r}, found {sorted(names)[:8]}"
    )


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, corpus: Iterable[str], min_count: int
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """A BPE tokenizer restricted to the tokens that occur at least `min_count` times in `corpus`; texts of kept tokens split as before.

    Kept besides: special tokens, single characters and bytes, and every part that a kept token is merged from (so the greedy merges
    take the same path).  Rarer words fall apart into kept pieces.  Returns the tokenizer and, for each new id, the real one.
    Raises ModelError for a tokenizer that is not BPE.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"trim_vocabulary: expected a BPE tokenizer, got {model['type']}; set trim_vocabulary to false"
        )
    counts: Counter[int] = Counter()
    texts = list(corpus)
    for at in range(0, len(texts), 4096):
        for ids in tokenizer(texts[at : at + 4096], add_special_tokens=False)["input_ids"]:
            counts.update(ids)
    vocabulary: dict[str, int] = model["vocab"]
    word_of = {index: word for word, index in vocabulary.items()}
    special = special_tokens(tokenizer)
    keep = {word_of[i] for i, n in counts.items() if n >= min_count and i in word_of}
    keep |= {word for word in vocabulary if len(word) == 1 or (word.startswith("<0x") and word.endswith(">"))}
    keep |= {entry["content"] for entry in data["added_tokens"] if entry["content"] in vocabulary}
    keep |= {word_of[i] for i in (special.bos, special.eos, special.newline) if i in word_of}
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    made_from: dict[str, list[tuple[str, str]]] = {}
    for left, right in merges:
        made_from.setdefault(left + right, []).append((left, right))
    waiting = list(keep)
    while waiting:
        # The first (lowest-ranked) way to make a token is the one the greedy algorithm takes once its parts stand side by side.
        for part in (p for pair in made_from.get(waiting.pop(), []) for p in pair):
            if part not in keep:
                keep.add(part)
                waiting.append(part)
    return _rebuild(tokenizer, data, sorted(keep, key=vocabulary.__getitem__), merges)


def _rebuild(
    tokenizer: PreTrainedTokenizerBase, data: dict, words: list[str], merges: list[tuple[str, str]]
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    model = data["model"]
    real_ids = [model["vocab"][w] for w in words]
    renumbered = {word: index for index, word in enumerate(words)}
    added = [entry for entry in data["added_tokens"] if entry["content"] not in renumbered]
    for entry in added:  # special tokens that live outside the BPE vocabulary
        renumbered[entry["content"]] = len(renumbered)
        real_ids.append(entry["id"])
    model["vocab"] = {w: renumbered[w] for w in words}
    model["merges"] = [
        [a, b] for a, b in merges if a in model["vocab"] and b in model["vocab"] and a + b in model["vocab"]
    ]
    for entry in data["added_tokens"]:
        entry["id"] = renumbered[entry["content"]]
    data["post_processor"] = None  # the engine frames captions itself
    names = {
        k: getattr(tokenizer, k)
        for k in ("bos_token", "eos_token", "pad_token", "unk_token")
        if getattr(tokenizer, k) is not None
    }
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **names), real_ids
