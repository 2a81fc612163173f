"""Recipes: the hyperparameters of one stage of a fit, and the losses that it may name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import keras

from chestxray.config import StudyError

LOSSES: dict[str, type[keras.Loss]] = {}
"""Every loss by the name that a recipe gives; filled below, where the study's own one is defined."""
BATCH_NORM = ("train", "freeze", "reestimate")


@dataclass(frozen=True)
class Recipe:
    """How one stage of a fit is done.

    Attributes:
        name: the stage's name in `history.csv`: `all_findings`, `head`, `fine_tune`, `fit`.
        epochs: passes over the training samples.
        learning_rate: peak learning rate of AdamW (Loshchilov & Hutter, ICLR 2019).
        batch_size: samples a step, over all GPUs.
        loss: over the seven classes `categorical` (softmax), `categorical_focal` (Lin et al., ICCV 2017) or
            `logit_adjusted` (by the classes' shares; Menon et al., ICLR 2021); with one sigmoid per label `binary` or
            `binary_focal`.
        warmup: share of all steps in which the learning rate rises linearly, 0 to 1; it then falls along a cosine.
        weight_decay: AdamW's decay; biases and BatchNorm parameters are left out.
        label_smoothing: share of each target spread over all classes, 0 to 1 (Szegedy et al., CVPR 2016).
        ema: momentum of the running mean of the weights that is evaluated and saved; 0 evaluates the weights
            themselves.
        balanced: draw every class equally often.
        mixup: parameter of the Beta distribution by which two images are mixed (Zhang et al., ICLR 2018); 0 mixes none.
        patience: stop after this many epochs without a better validation macro-AUROC; None never stops early.
        batch_norm: `train` trains BatchNorm; `freeze` freezes its statistics and parameters for the stage;
            `reestimate` trains it and re-estimates the statistics for the weights that are evaluated, from images that
            are not mixed and, where cached feature maps are fitted, not augmented.
        class_weight: give every class equal weight in the loss, however rare.
        ema_restart: begin each epoch from the running mean of the weights rather than from the last step's.
    """

    name: str
    epochs: int
    learning_rate: float
    batch_size: int = 32
    loss: str = "categorical"
    warmup: float = 0.1
    weight_decay: float = 1e-2
    label_smoothing: float = 0.0
    ema: float = 0.0
    balanced: bool = False
    mixup: float = 0.0
    patience: int | None = None
    batch_norm: str = "train"
    class_weight: bool = False
    ema_restart: bool = True

    def __post_init__(self) -> None:
        for field, known in (("loss", tuple(LOSSES)), ("batch_norm", BATCH_NORM)):
            if getattr(self, field) not in known:
                raise StudyError(
                    f"recipe {self.name!r}: {field} {getattr(self, field)!r} is unknown; there are: {', '.join(known)}"
                )
        if self.epochs < 1 or self.batch_size < 1 or not 0 <= self.warmup < 1:
            raise StudyError(f"recipe {self.name!r}: epochs and batch_size are at least 1, warmup is in [0, 1)")
        if self.class_weight and self.is_binary:
            raise StudyError(
                f"recipe {self.name!r}: class_weight needs one class an image; leave it out, or take binary_focal"
            )

    @property
    def is_binary(self) -> bool:
        """Whether every output is a sigmoid of its own, so that several labels may be present."""
        return self.loss.startswith("binary")

    def describe(self) -> dict[str, Any]:
        """The fields for `run.json`; those that came later only where they are used, so that older runs stay valid."""
        later = ("batch_norm", "class_weight", "ema_restart")
        unused = {f.name for f in dataclasses.fields(self) if f.name in later and getattr(self, f.name) == f.default}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in unused}
