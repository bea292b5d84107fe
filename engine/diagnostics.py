"""Named warnings for the failures that readers of the paper know, each with the number that set it off.

stage_1_diverges            the warm-up ends up above where it began: widths, norms or rate do not fit
stage_2_regression          direct fine-tuning loses what the warm-up had
prompts_outside_words       soft prompts have norms far from the word embeddings, where a cosine-fitted converter says nothing
captions_collapse           a few captions for all images: the language model ignores its prompt
weak_converter              the converter does not carry over to tokens that it has not seen
"""

from __future__ import annotations

from dataclasses import dataclass

from .runlog import RunLog
from .transfer.converter import ConverterReport

DIVERGED = 1.10  # training loss against its first value
REGRESSED = 1.03  # validation loss in stage 2 against the end of stage 1
PROMPT_NORM_RATIO = (
    5.0  # paper: about 10 for trained models, where the merged projector alone performs like a random one
)
COLLAPSED = 0.10  # share of distinct captions
WEAK_COSINE = 0.3


@dataclass
class Watch:
    """Follows one run's losses; each warning is given once."""

    log: RunLog
    first_loss: float | None = None
    warm_up_end: float | None = None
    diverged: bool = False
    regressed: bool = False

    def train_loss(self, stage_index: int, loss: float, step: int, learning_rate: float) -> None:
        """Call when a training loss is logged."""
        if self.first_loss is None:
            self.first_loss = loss
        if stage_index == 0 and not self.diverged and loss > DIVERGED * self.first_loss:
            self.diverged = True
            self.log.warn(
                "stage_1_diverges",
                f"loss {loss:.3f} against {self.first_loss:.3f} at the start, learning rate {learning_rate:g}; "
                "lower the rate, check the projector's widths, or leave converter.match_prompt_norm on",
                value=loss / self.first_loss, step=step,
            )  # fmt: skip

    def validation_loss(self, stage_index: int, loss: float, step: int) -> None:
        """Call at every evaluation."""
        if stage_index == 0:
            self.warm_up_end = loss
        elif self.warm_up_end is not None and not self.regressed and loss > REGRESSED * self.warm_up_end:
            self.regressed = True
            self.log.warn(
                "stage_2_regression",
                f"validation loss {loss:.3f} against {self.warm_up_end:.3f} at the end of the warm-up; lower this stage's learning rate",
                value=loss / self.warm_up_end, step=step,
            )  # fmt: skip

    def captions(self, distinct: float, count: int, step: int) -> None:
        """distinct: share of different captions among `count`."""
        if count > 1 and (distinct < COLLAPSED or round(distinct * count) == 1):
            self.log.warn(
                "captions_collapse",
                f"only {distinct:.0%} of the captions differ; the language model ignores its visual prompt",
                value=distinct,
                step=step,
            )

    def converter(self, report: ConverterReport, prompt_norm_before: float, prompt_norm_after: float) -> None:
        """prompt_norm_*: mean norm of soft prompts over mean norm of word embeddings, in the source and in the target."""
        if report.cosine < WEAK_COSINE:
            self.log.warn(
                "weak_converter",
                f"cosine {report.cosine:.2f} on {report.held_out_tokens} held-out tokens",
                value=report.cosine,
                step=0,
            )
        if max(prompt_norm_before, prompt_norm_after) > PROMPT_NORM_RATIO:
            self.log.warn(
                "prompts_outside_words",
                f"soft prompts have {prompt_norm_before:.1f} times the norm of words in the source, {prompt_norm_after:.1f} times in the target; "
                "expect the merged projector to need its warm-up",
                value=prompt_norm_after, step=0,
            )  # fmt: skip
