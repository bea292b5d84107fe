"""The exact merge of word converter and source projector into the target's projector (arXiv 2305.01278, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .converter import WordConverter


def merge(projector: nn.Linear, converter: WordConverter | None) -> nn.Linear:
    """y = W_c (W_s x + b_s) + b_c as one layer: W_t = W_c W_s, b_t = W_c b_s + b_c, formed in float64.

    (The paper prints the product the other way round, whose dimensions do not fit.)  projector: Linear(d_vpg, d_source).  Returns
    Linear(d_vpg, d_target), float32; a copy of the projector where there is no converter because the embeddings are the same.
    Raises ValueError when the widths do not meet.
    """
    weight, bias = projector.weight.detach().double(), projector.bias.detach().double()
    if converter is not None:
        if converter.weight.shape[1] != weight.shape[0]:
            raise ValueError(
                f"converter: expected one from width {weight.shape[0]}, the source projector's output, got {converter.weight.shape[1]}"
            )
        bias = converter.weight @ bias + converter.bias
        weight = converter.weight @ weight
    merged = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        merged.weight.copy_(weight)
        merged.bias.copy_(bias)
    return merged


def norm_ratio(prompts: Tensor, words: Tensor) -> float:
    """Mean norm of soft prompts (..., d) over mean norm of word embeddings (vocabulary, d).  The paper saw about 10 for trained models."""
    return (prompts.float().norm(dim=-1).mean() / words.float().norm(dim=-1).mean()).item()


def scale_(projector: nn.Linear, factor: float) -> None:
    """Scale a projector's output in place: a cosine loss does not fix the converter's scale."""
    with torch.no_grad():
        projector.weight.mul_(factor)
        projector.bias.mul_(factor)
