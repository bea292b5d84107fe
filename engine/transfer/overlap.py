"""Which tokens two vocabularies share, read off the vocabularies themselves.

Tokenizers mark word boundaries differently (`Ġdog` in byte-level BPE, `▁dog` in sentencepiece, `dog` with `##` continuations or bare words);
each token is brought to one spelling, `(starts a word?, text)`, and tokens with the same spelling are the same word piece.
"""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest follows from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def spelling(token: str, scheme: str) -> tuple[bool, str]:
    """(starts a word, text) of a vocabulary entry; scheme is what `detect_scheme` says.

    A byte-level token that is no whole UTF-8 text keeps its raw bytes as Latin-1, marked so that it meets only its like.
    """
    if scheme == "byte_level":
        raw = bytes(_ALPHABET[c] for c in token) if all(c in _ALPHABET for c in token) else token.encode()
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return False, "\0" + raw.decode("latin-1")
        return text.startswith(" ") and len(text) > 1, text[1:] if text.startswith(" ") and len(text) > 1 else text
    if scheme == "sentencepiece":
        if byte := _BYTE.fullmatch(token):
            value = int(byte[1], 16)
            return False, chr(value) if value < 128 else "\0" + bytes([value]).decode("latin-1")
        starts = token.startswith("▁") and len(token) > 1
        return starts, (token[1:] if starts else token).replace("▁", " ")
    if scheme == "wordpiece":
        return not token.startswith("##"), token.removeprefix("##")
    return not (
        len(token) == 1 and not token.isalnum()
    ), token  # word level: every word starts one, punctuation does not


def detect_scheme(tokenizer: PreTrainedTokenizerBase) -> str:
    """How a vocabulary marks word boundaries: byte_level, sentencepiece, wordpiece or word."""
    tokens = tokenizer.get_vocab().keys()
    counts = {
        "byte_level": sum(t.startswith("Ġ") for t in tokens),
        "sentencepiece": sum(t.startswith("▁") for t in tokens),
        "wordpiece": sum(t.startswith("##") for t in tokens),
    }
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] > 0 else "word"


def shared_tokens(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """(source id, target id) of every token that both vocabularies hold, in source order; special tokens pair by role.

    A spelling that several ids of one vocabulary share (a byte and its character) pairs the smallest id.
    """
    pairs = _spellings(source).items()
    theirs = _spellings(target)
    found = {source_id: theirs[key] for key, source_id in pairs if key in theirs}
    for role in ("bos_token_id", "eos_token_id"):
        a, b = getattr(source, role), getattr(target, role)
        if a is not None and b is not None:
            found.setdefault(a, b)
    return sorted(found.items())


def _spellings(tokenizer: PreTrainedTokenizerBase) -> dict[tuple[bool, str], int]:
    scheme = detect_scheme(tokenizer)
    special = set(tokenizer.all_special_ids)
    spelled: dict[tuple[bool, str], int] = {}
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if index not in special:
            spelled.setdefault(spelling(token, scheme), index)
    return spelled
