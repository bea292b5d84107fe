"""A word-level tokenizer trained on captions and questions, saved as a Hugging Face tokenizer folder."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "\n"]


def train_word_level(texts: Iterable[str], min_frequency: int = 1, max_words: int = 8192) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and single punctuation marks, lower-cased; the newline is a token of its own.

    texts: captions and questions, one string each.  Words seen fewer than `min_frequency` times become `<unk>`.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    trainer = trainers.WordLevelTrainer(
        vocab_size=max_words, min_frequency=min_frequency, special_tokens=SPECIALS, show_progress=False
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words with single spaces
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
