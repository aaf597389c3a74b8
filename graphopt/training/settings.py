"""The options of the training loop, which every pass that trains has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from graphopt.pipeline.options import Range
from graphopt.pipeline.selectors import Selector

EPOCHS = 3
"""Where neither epochs, steps nor minutes are given."""

Positive = Annotated[float, Range(0, open_low=True)]
Count = Annotated[int, Range(1)]


@dataclass(frozen=True)
class Settings:
    """How weights are trained. `Distill` and `FineTune` inherit these fields as options."""

    epochs: Count | None = None
    """Times that the training data is read; none: 3, where neither steps nor minutes are given."""

    steps: Count | None = None
    """Most optimizer steps."""

    minutes: Positive | None = None
    """Most minutes, of this pass."""

    lr: Positive = 1e-4
    """Learning rate at its highest."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW (Loshchilov & Hutter, 2019), or SGD with a momentum of 0.9."""

    weight_decay: Annotated[float, Range(0)] = 0.01
    """Of weights; biases, norms and scales have none."""

    warmup: Annotated[float, Range(0, 1, open_high=True)] = 0.05
    """Share of the steps in which the learning rate rises linearly from 0."""

    decay: Literal["cosine", "linear", "none"] = "cosine"
    """How the learning rate falls to 0 after that."""

    clip: Positive | None = 1.0
    """Largest norm of the gradient, over all parameters."""

    accumulate: Count = 1
    """Batches whose mean gradient makes one step."""

    amp: Literal["auto", "bfloat16", "float16", "off"] = "off"
    """Type that products are computed in: bfloat16, float16 (with scaled gradients), or as stored (off). Auto times
    bfloat16 and off, and takes bfloat16 where it is faster."""

    learn_scales: bool = False
    """Whether scales of quantized weights and activations are trained too (LSQ, Esser et al., 2020)."""

    sr_ste: Annotated[float, Range(0)] | None = None
    """Let the zeros of an N:M pattern move: the decay of weights that are zero in the forward pass (SR-STE, Zhou et
    al., 2021; 2e-4 there). None: zeros stay where they are."""

    freeze: Selector = Selector()
    """Nodes whose parameters stay: ops, module paths or patterns."""

    evaluate_every: Count | None = None
    """Steps between evaluations by `evaluate=`; none: after each epoch."""

    patience: Count | None = None
    """Evaluations in a row without a better one, after which training ends; needs `evaluate=`."""

    seed: int = 0
    """Of the order of batches, dropout, and whatever else is random."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it trains; auto: on a GPU where torch finds one."""

    checkpoint_minutes: Positive = 5.0
    """Minutes between checkpoints, where `optimize` is given a folder for them."""
