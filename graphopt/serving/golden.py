"""Golden inputs and their outputs in floats: how a bundle knows, wherever it is loaded, that it still answers right."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import BundleError

Arrays = dict[str, NDArray[Any]]

FILE = "golden.npz"
DROP = 3.0
"""How far below the recorded SQNR (dB) answers may be: other integers and bfloat16 on another CPU are legitimate."""
ENOUGH = 50.0
"""SQNR (dB) above which no more is asked for: what products in bfloat16 leave of a model in float32."""


@dataclass(frozen=True)
class Case:
    """Inputs, and what the model answered in floats."""

    inputs: Arrays
    outputs: Arrays


def written(cases: Sequence[Case]) -> bytes:
    """The cases as an .npz archive."""
    arrays = {
        f"{number}/{part}/{name}": array
        for number, case in enumerate(cases)
        for part, held in (("inputs", case.inputs), ("outputs", case.outputs))
        for name, array in held.items()
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def read(content: bytes, where: str) -> list[Case]:
    """The cases in an archive, in order. Raises BundleError where it is none."""
    found: dict[int, Case] = {}
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            for key in archive.files:
                number, part, name = key.split("/", 2)
                case = found.setdefault(int(number), Case({}, {}))
                {"inputs": case.inputs, "outputs": case.outputs}[part][name] = archive[key]
    except Exception as error:  # zipfile, zlib and numpy have no common base
        raise BundleError(f"{where}: {FILE} holds no golden set") from error
    return [found[number] for number in sorted(found)]


def energies(reference: NDArray[Any], candidate: NDArray[Any]) -> tuple[float, float]:
    """sum(reference**2) and sum((reference - candidate)**2), as `graphopt.numerics.metrics.energies` has them: that
    needs torch, which a server does without. NaN and infinity count as equal where both have the same."""
    if reference.shape != candidate.shape:
        return float(np.square(reference.astype(np.float64)).sum()), math.inf
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        noise = np.where(same, 0.0, a - b)
    return float(np.square(a[np.isfinite(a)]).sum()), float(np.square(noise).sum())


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise): inf without noise; -inf where noise is all there is, or is not finite."""
    if noise == 0:
        return math.inf
    if not math.isfinite(noise) or signal == 0:
        return -math.inf
    return 10 * (math.log10(signal) - math.log10(noise))


def sqnr(reference: Mapping[str, NDArray[Any]], candidate: Mapping[str, NDArray[Any]]) -> float:
    """Of the worst output that holds floats (of all, where none does), in dB."""
    return Score().add(reference, candidate).sqnr


class Score:
    """SQNR over several cases: the energies of each output add up."""

    def __init__(self) -> None:
        self._energies: dict[str, tuple[float, float]] = {}
        self._floats: set[str] = set()

    def add(self, reference: Mapping[str, NDArray[Any]], candidate: Mapping[str, NDArray[Any]]) -> Score:
        for name, wanted in reference.items():
            signal, noise = energies(wanted, candidate[name]) if name in candidate else (0.0, math.inf)
            before = self._energies.get(name, (0.0, 0.0))
            self._energies[name] = before[0] + signal, before[1] + noise
            if wanted.dtype.kind == "f":
                self._floats.add(name)
        return self

    @property
    def sqnr(self) -> float:
        names = self._floats or set(self._energies)
        return min((decibels(*self._energies[name]) for name in names), default=math.inf)


def replay(run: Callable[[Arrays], Arrays], cases: Sequence[Case]) -> tuple[float, list[float]]:
    """SQNR of the answers to all cases together, and to each, in dB. run: inputs -> outputs, by name."""
    score, each = Score(), []
    for case in cases:
        answers = run(case.inputs)
        score.add(case.outputs, answers)
        each.append(sqnr(case.outputs, answers))
    return score.sqnr, each


def least(recorded: float) -> float:
    """The SQNR (dB) that answers must have, of the one that was recorded."""
    return min(recorded, ENOUGH) - DROP
