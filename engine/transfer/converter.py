"""The word converter g(x) = W_c x + b_c, from the source LLM's word embeddings to the target's (arXiv 2305.01278, section 4).

`fit_ridge` is the closed form: ridge least squares in float64, the ridge chosen on held-out tokens.  `fit_sgd_cosine` is the paper's:
SGD on 1 - cos(g(x_s), x_t), which leaves the scale of g free.  Both are judged on tokens that they did not see.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.llm import ModelError
from ..models.words import HasWords
from ..recipe import Converter
from .overlap import shared_tokens

MIN_SHARED_TOKENS = 16


@dataclass(frozen=True)
class WordConverter:
    """weight (d_target, d_source) and bias (d_target,), float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, d_source) -> (n, d_target) in x's dtype."""
        return (x.double() @ self.weight.T.to(x.device) + self.bias.to(x.device)).to(x.dtype)


@dataclass(frozen=True)
class ConverterReport:
    """Quality on held-out tokens: `cosine` is the mean cos(g(x_s), x_t), `nearest` the share of tokens whose converted embedding is
    nearest (by cosine) to its own target among all shared target tokens, `norm_ratio` |g(x_s)| / |x_t|.  `identity` says why there is none."""

    method: str
    shared_tokens: int
    held_out_tokens: int
    cosine: float
    cosine_fitted: float
    nearest: float
    norm_ratio: float
    ridge: float | None = None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def same_embeddings(source: HasWords, target: HasWords) -> bool:
    """Whether both models embed the same tokens identically, so that no converter is needed."""
    if source.hidden_width != target.hidden_width or source.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        return False
    return torch.equal(source.word_embeddings().float(), target.word_embeddings().float())


def fit_converter(
    source: HasWords, target: HasWords, settings: Converter, seed: int, device: torch.device | str = "cpu"
) -> tuple[WordConverter | None, ConverterReport]:
    """Fit on the shared tokens of two language models, on `device`; (None, report) where their embeddings are the same.

    Raises ModelError when fewer than 16 tokens are shared.
    """
    if same_embeddings(source, target):
        count = len(source.tokenizer)
        return None, ConverterReport("identity", count, 0, 1.0, 1.0, 1.0, 1.0)
    pairs = shared_tokens(source.tokenizer, target.tokenizer)
    if len(pairs) < MIN_SHARED_TOKENS:
        raise ModelError(
            f"converter: expected at least {MIN_SHARED_TOKENS} tokens that {source.path!r} and {target.path!r} share, found {len(pairs)}; "
            "set initialise.projector to random"
        )
    index = torch.tensor(pairs)
    x, y = (
        words.word_embeddings()[index[:, side].to(words.word_embeddings().device)]
        for side, words in enumerate((source, target))
    )
    return fit(x.double().to(device), y.double().to(device), settings, seed)


def fit(x: Tensor, y: Tensor, settings: Converter, seed: int) -> tuple[WordConverter, ConverterReport]:
    """Fit on paired embeddings x (n, d_source), y (n, d_target), float64; judged on the held-out share, then (ridge) refitted on all."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held = order[: max(4, int(settings.held_out * len(x)))] if settings.held_out else order[:0]
    kept = order[len(held) :]
    ridge = None
    if settings.method == "ridge":
        scored = [
            (_cosine(fit_ridge(x[kept], y[kept], r)(x[held]), y[held]) if len(held) else -i, r)
            for i, r in enumerate(settings.ridges)
        ]
        ridge = max(scored)[1]
        judged = fit_ridge(x[kept], y[kept], ridge)
        final = fit_ridge(x, y, ridge)
    else:
        judged = final = fit_sgd_cosine(x[kept], y[kept], settings, seed)
    judge = held if len(held) else kept
    converted = judged(x[judge])
    targets = F.normalize(y, dim=1)
    nearest = torch.cat([(rows @ targets.T).argmax(1) for rows in F.normalize(converted, dim=1).split(512)])
    report = ConverterReport(
        settings.method, len(x), len(held), _cosine(converted, y[judge]), _cosine(judged(x[kept]), y[kept]),
        (nearest.cpu() == judge).double().mean().item(), (converted.norm(dim=1) / y[judge].norm(dim=1)).mean().item(), ridge,
    )  # fmt: skip
    return final, report


def fit_ridge(x: Tensor, y: Tensor, ridge: float) -> WordConverter:
    """argmin over (W, b) of |x W^T + b - y|^2 + ridge * trace(x_c^T x_c)/d * |W|^2 with x_c = x - mean(x), in float64.

    x (n, d_source), y (n, d_target).  The ridge is relative to the mean variance, so one grid fits every pair of models; b is not shrunk.
    """
    x, y = x.double(), y.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred = x - x_mean
    gram = centred.T @ centred
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, centred.T @ (y - y_mean)).T.contiguous()
    return WordConverter(weight.cpu(), (y_mean - weight @ x_mean).cpu())


def fit_sgd_cosine(x: Tensor, y: Tensor, settings: Converter, seed: int) -> WordConverter:
    """The paper's fit: plain SGD on the mean of 1 - cos(W x + b, y), from a Linear layer's usual initialisation.

    x (n, d_source), y (n, d_target), any float dtype; computed in float32 as the reference does.
    """
    x, y = x.float(), y.float()
    generator = torch.Generator().manual_seed(seed)
    bound = x.shape[1] ** -0.5
    weight = (
        torch.empty(y.shape[1], x.shape[1]).uniform_(-bound, bound, generator=generator).to(x.device).requires_grad_()
    )
    bias = torch.empty(y.shape[1]).uniform_(-bound, bound, generator=generator).to(x.device).requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lr=settings.sgd_learning_rate)
    for _ in range(settings.sgd_steps):
        picks = torch.randint(len(x), (min(settings.sgd_batch_tokens, len(x)),), generator=generator)
        loss = (1 - F.cosine_similarity(x[picks] @ weight.T + bias, y[picks], dim=1)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return WordConverter(weight.detach().double().cpu(), bias.detach().double().cpu())


def _cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.double(), b.double(), dim=1).mean().item()
