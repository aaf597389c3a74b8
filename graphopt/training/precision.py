"""The type that products are computed in while training, and the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from graphopt.errors import UsageError
from graphopt.measure.timing import paired

ROUNDS = 9
"""Paired rounds by which bfloat16 is compared with float32: below 6 there is no interval to decide by."""

_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Amp:
    """Automatic mixed precision: bfloat16, float16 with scaled gradients, or off."""

    name: str
    device: torch.device
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.name == "float16")

    def autocast(self) -> AbstractContextManager[None]:
        if self.name == "off":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_TYPES[self.name])


Trial = Callable[[], AbstractContextManager[Callable[[Amp], Callable[[], None]]]]
"""Gives a function from a precision to what runs one forward and backward pass in it."""


def chosen(asked: str, device: torch.device, trial: Trial, notes: list[str]) -> Amp:
    """The precision that was asked for; auto times bfloat16 against off, and takes it where it is faster."""
    if asked != "auto":
        return Amp(asked, device)
    candidates = {name: Amp(name, device) for name in ("off", "bfloat16")}
    with trial() as timed:
        calls = {name: timed(amp) for name, amp in candidates.items()}
        for call in calls.values():
            call()
        ratio = paired(calls, baseline="off", rounds=ROUNDS)["bfloat16"]
    name = "bfloat16" if ratio.low > 1 else "off"
    notes.append(
        f"amp={name}: a step in bfloat16 is {ratio.median:.2f} times as fast [{ratio.low:.2f}, {ratio.high:.2f}] here"
    )
    return candidates[name]


def device_of(asked: str) -> torch.device:
    """Where to train; auto is a GPU where torch finds one. Raises UsageError where there is none."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda, and torch finds no GPU here: use device=cpu")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")
