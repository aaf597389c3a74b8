"""Paired, interleaved timing: how many times faster than a baseline, and how sure.

A machine changes speed while one measures: CPU frequency, other users of a shared host, page placement. So candidates
take turns, and each is compared with the baseline's block of the same round. A small fixed computation, the probe, is
timed between the blocks: where its time changed, the machine's speed did, and the pair of blocks is dropped, counted
and run again. There is a pause after each block, because an engine's worker threads spin for a while after their work
and would slow down the next candidate.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol, runtime_checkable

import numpy as np

Clock = Callable[[], float]
"""Seconds from any origin, never backwards."""


@runtime_checkable
class TimesItself(Protocol):
    """A call that knows how long it takes, as one that runs in another process does."""

    def __call__(self) -> object: ...

    def seconds(self, calls: int) -> float:
        """Run so many times; seconds of all together."""


ROUNDS = 15
"""Rounds of a comparison: the 4th and the 12th of 15 ratios bound the median with 96.5% confidence."""

MIN_PAIRS = 6
"""Fewest pairs whose median has a 95% interval."""

MAX_CALLS = 2**14
"""Most calls in one block."""

SCREENING_PAIRS = 2
"""Pairs after which a candidate that is far too slow is no longer timed."""

PAUSE = 0.15
"""Most seconds between blocks, as `rest` takes them. onnxruntime's threads spin for up to 0.1: without a pause, int8
MiniLM seems 2.0 times as fast as float where it is 3.1 times, each by itself (2 cores)."""

NAP = 0.01
"""Seconds after which `rest` looks again."""

AT_REST = 0.1
"""CPU time of a nap, as a share of it, below which no thread spins."""

PROBE_RUNS = 3
"""Runs of the probe, of which the fastest counts: a single interrupt is not a change of speed."""


@dataclass(frozen=True)
class Ratio:
    """Baseline time over candidate time, paired within rounds: above 1 the candidate is faster."""

    median: float
    low: float
    """Lower end of the 95% interval of the median; 0 with fewer than 6 pairs, which cannot bound it."""
    high: float
    """Upper end; infinite with fewer than 6 pairs."""
    rounds: int
    """Pairs that counted; fewer than asked for where the machine's speed changed too often."""
    dropped: int
    """Pairs that did not count, because the machine's speed changed between their blocks."""
    seconds: dict[str, tuple[float, float]]
    """p50 and p90 of seconds per call over the blocks that counted, for the baseline and for the candidate."""
    steady: bool = True
    """False where fewer than 6 pairs counted; then the 6 with the smallest changes of speed are taken."""

    @property
    def certain(self) -> bool:
        """Whether the whole interval is on one side of 1, so that it says which of the two is faster."""
        return self.low > 1 or self.high < 1


@dataclass(frozen=True)
class Ratios:
    """Ratios of one candidate that has several calls, such as one for each input shape."""

    overall: Ratio
    """Of the geometric means over its calls, taken within each round."""
    shapes: tuple[Ratio, ...]
    """Of each call."""


@dataclass(frozen=True)
class Block:
    """One candidate's turn in one round."""

    seconds: tuple[float, ...]
    """Of one call, for each of the candidate's calls."""
    probes: tuple[float, float]
    """Seconds of the probe just before and just after."""


Pair = tuple[Block, Block]
"""The baseline's turn and a candidate's of one round."""


def rest(most: float) -> None:
    """Sleep until no thread of this process works: those of engines spin for some time after their last call.

    most: seconds after which it returns in any case.
    """
    left = most
    while left > 0:
        before, nap = time.process_time(), min(NAP, left)
        time.sleep(nap)
        if time.process_time() - before < AT_REST * nap:
            return
        left -= nap


def paired(
    candidates: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    rounds: int = ROUNDS,
    min_block_seconds: float = 0.02,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], object] = rest,
    probe: Callable[[], object] | None = None,
    probe_tolerance: float = 0.15,
    on_round: Callable[[str], object] | None = None,
) -> dict[str, Ratio]:
    """Time `candidates` against the one called `baseline`, interleaved; one Ratio each, the baseline's own being 1.

    In every round each candidate gets one block: so many calls, fixed beforehand, that they last `min_block_seconds`
    (16384 at most). A pair counts when the probes around its two blocks lie within `probe_tolerance` (0.15 is 15%) of
    each other. Rounds go on until every candidate has `rounds` pairs, or twice that many were run. `probe` defaults to
    a small layer norm on one thread. For a control, pass the baseline's callable once more under another name.
    `on_round` is called after each round, outside of what is timed.

    Where fewer than 6 pairs of a candidate count, its 6 steadiest are taken, and its Ratio says that it is not steady.
    Raises ValueError on wrong arguments or a candidate that takes no time on this clock.
    """
    found = paired_calls(
        {name: [call] for name, call in candidates.items()},
        baseline=baseline, rounds=rounds, min_block_seconds=min_block_seconds, clock=clock, sleep=sleep, probe=probe,
        probe_tolerance=probe_tolerance, on_round=on_round,
    )  # fmt: skip
    return {name: ratios.shapes[0] for name, ratios in found.items()}


def paired_calls(
    candidates: Mapping[str, Sequence[Callable[[], object]]],
    *,
    baseline: str,
    rounds: int = ROUNDS,
    min_block_seconds: float = 0.02,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], object] = rest,
    probe: Callable[[], object] | None = None,
    probe_tolerance: float = 0.15,
    pause: float = PAUSE,
    give_up_below: float = 0.0,
    give_up_behind: float = 0.0,
    leaders: Container[str] | None = None,
    until: Callable[[Ratios], bool] | None = None,
    on_round: Callable[[str], object] | None = None,
) -> dict[str, Ratios]:
    """As `paired`, where each candidate has several calls, such as one for each shape: the same number for all.

    The calls of a candidate follow each other in its block, so one pause serves them all: `sleep(pause)`, and 0 for
    calls of other processes, which have to pause by themselves. A candidate is no longer timed whose ratio was below
    `give_up_below` in each of its first SCREENING_PAIRS pairs, or whose median ratio, once it has more pairs than that,
    is below `give_up_behind` times that of one of `leaders` (by default, of any). Timing ends after MIN_PAIRS rounds if
    `until` then holds for the ratios of every candidate that is left. It is asked once only: asked after each round, it
    would stop as soon as noise makes it hold.
    """
    check(candidates, baseline, rounds)
    probe = probe or default_probe()
    probe()
    calls: dict[str, list[int]] = {}
    for name, several in candidates.items():
        calls[name] = [calls_per_block(name, call, min_block_seconds, clock) for call in several]
        sleep(pause)
    # A short call is slow after a pause: where one candidate's is repeated, all are called once before they are timed.
    warm = [max(times) > 1 for times in zip(*calls.values(), strict=True)]
    pairs: dict[str, list[Pair]] = {name: [] for name in candidates}
    counting: dict[str, list[Pair]] = {name: [] for name in candidates}
    run, remaining = 0, list(candidates)
    while run < 2 * rounds and min(len(counting[name]) for name in remaining) < rounds:
        blocks: dict[str, Block] = {}
        before = probe_seconds(probe, clock)
        for name in turns(remaining, run):
            block = zip(candidates[name], calls[name], warm, strict=True)
            seconds = [block_seconds(call, count, is_warm, clock) for call, count, is_warm in block]
            sleep(pause)
            after = probe_seconds(probe, clock)
            blocks[name] = Block(tuple(seconds), (before, after))
            before = after
        for name in remaining:
            pair = blocks[baseline], blocks[name]
            pairs[name].append(pair)
            counting[name] += [pair] if speed_change(pair) <= probe_tolerance else []
        run += 1
        if on_round is not None:
            on_round(f"round {run}")
        screened = [name for name in remaining if len(counting[name]) == SCREENING_PAIRS]
        given_up = [name for name in screened if max(ratios_in(counting[name])) < give_up_below]
        medians = {name: median(ratios_in(counting[name])) for name in remaining
                   if len(counting[name]) > SCREENING_PAIRS}  # fmt: skip
        leading = [found for name, found in medians.items() if leaders is None or name in leaders]
        least = give_up_behind * max(leading, default=0.0)
        given_up += [name for name, found in medians.items() if name != baseline and found < least]
        remaining = [name for name in remaining if name not in given_up]
        if given_up and remaining == [baseline]:
            break
        if until is not None and run == MIN_PAIRS and all(
            until(ratios_of(baseline, name, pairs[name], probe_tolerance)) for name in remaining if name != baseline
        ):  # fmt: skip
            break
    return {name: ratios_of(baseline, name, several_pairs, probe_tolerance) for name, several_pairs in pairs.items()}


def is_on() -> bool:
    """Whether the environment lets things be timed where nobody asked: GRAPHOPT_MEASURE=0 does not."""
    return os.environ.get("GRAPHOPT_MEASURE") != "0"


def slower_than(ratio: Ratio) -> bool:
    """Whether the candidate is slower than its baseline for certain: the 95% interval of its speed is below 1.

    6 pairs are enough, of 15 that were asked for: before anything is done about it, a second run has to say the same,
    so a false alarm costs little, while a model that is slower unnoticed goes out to the user.
    """
    return ratio.rounds >= MIN_PAIRS and ratio.high < 1.0


def geometric_mean(values: Iterable[float]) -> float:
    """The mean for ratios. Raises ValueError when there are none, or one isn't above 0."""
    ratios = list(values)
    if not ratios:
        raise ValueError("the geometric mean of no values is undefined")
    if not all(value > 0 for value in ratios):
        raise ValueError(f"the geometric mean takes values above 0, not {min(ratios)}")
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def check(candidates: Mapping[str, Sequence[object]], baseline: str, rounds: int) -> None:
    if not candidates:
        raise ValueError("there are no candidates to time")
    if len({len(calls) for calls in candidates.values()}) > 1 or not all(candidates.values()):
        raise ValueError("every candidate needs the same number of calls, at least one")
    if baseline not in candidates:
        raise ValueError(f"the baseline {baseline!r} is not among the candidates: {', '.join(candidates)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")


def turns(names: Sequence[str], run: int) -> list[str]:
    """The order of one round: rotated, and reversed in every other round.

    Rotation alone would let each candidate always follow the same one, whose threads may still be spinning.
    """
    start = run // 2 % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if run % 2 else order


def calls_per_block(name: str, call: Callable[[], object], least: float, clock: Clock) -> int:
    """The first power of two of calls that lasts `least` seconds, after one call to warm up."""
    call()
    calls = 1
    while (seconds := time_calls(call, calls, clock)) < least and calls < MAX_CALLS:
        calls *= 2
    if seconds <= 0:
        raise ValueError(f"{calls} calls of {name!r} took no time on this clock")
    return calls


def block_seconds(call: Callable[[], object], calls: int, warm: bool, clock: Clock) -> float:
    """Seconds of one call, as the mean of several. warm: after one more that is not timed."""
    if warm:
        call()
    return time_calls(call, calls, clock) / calls


def time_calls(call: Callable[[], object], calls: int, clock: Clock) -> float:
    """Seconds of so many calls together."""
    if isinstance(call, TimesItself):
        return call.seconds(calls)
    start = clock()
    for _ in range(calls):
        call()
    return clock() - start


def probe_seconds(probe: Callable[[], object], clock: Clock) -> float:
    return min(time_calls(probe, 1, clock) for _ in range(PROBE_RUNS))


def speed_change(pair: Pair) -> float:
    """Relative change of the machine's speed around two blocks, by the probes: 0.15 is 15%."""
    probes = pair[0].probes + pair[1].probes
    return max(probes) / min(probes) - 1


def ratios_of(baseline: str, name: str, pairs: Sequence[Pair], tolerance: float) -> Ratios:
    """Of the pairs where speed changed by at most `tolerance`; with too few of those, of the MIN_PAIRS steadiest."""
    kept = [pair for pair in pairs if speed_change(pair) <= tolerance]
    steady = len(kept) >= min(MIN_PAIRS, len(pairs))
    if not steady:
        kept = sorted(pairs, key=speed_change)[:MIN_PAIRS]
    dropped = len(pairs) - len(kept)

    def ratio(seconds: Callable[[Block], float]) -> Ratio:
        first, second = ([seconds(pair[index]) for pair in kept] for index in (0, 1))
        ratios = [before / after for before, after in zip(first, second, strict=True)]
        low, high = interval(ratios)
        spread = {baseline: percentiles(first), name: percentiles(second)}
        return Ratio(median(ratios), low, high, len(kept), dropped, spread, steady)

    number = len(kept[0][0].seconds)
    each = tuple(ratio(lambda block, index=index: block.seconds[index]) for index in range(number))  # type: ignore[misc]
    return Ratios(ratio(lambda block: geometric_mean(block.seconds)), each)


def ratios_in(pairs: Sequence[Pair]) -> list[float]:
    """The ratios of several pairs, each a geometric mean over the calls."""
    return [geometric_mean(before.seconds) / geometric_mean(after.seconds) for before, after in pairs]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the median, from order statistics: no assumption on the distribution.

    It runs from the k-th smallest to the k-th largest value, with the largest k for which a fair coin thrown n times
    shows fewer than k heads with a chance of at most 2.5%. Below 6 values there is no such k, and no bound.
    Source: David and Nagaraja, Order Statistics, 3rd edition, 2003, section 7.1.
    """
    ordered, count = sorted(values), len(values)
    tail, k = 0.0, 0
    while (tail := tail + math.comb(count, k) / 2**count) <= 0.025:
        k += 1
    return (ordered[k - 1], ordered[count - k]) if k else (0.0, math.inf)


def percentiles(seconds: Iterable[float]) -> tuple[float, float]:
    """p50, and p90 by nearest rank."""
    ordered = sorted(seconds)
    return median(ordered), ordered[math.ceil(0.9 * len(ordered)) - 1]


def default_probe() -> Callable[[], object]:
    """A fixed layer norm and tanh of about two milliseconds on one thread: memory-bound, as that slows down first.

    It has no matrix product, after which a BLAS's threads would go on spinning into the next block.
    """
    x = np.linspace(-1, 1, 512 * 384, dtype=np.float32).reshape(512, 384)

    def probe() -> object:
        centred = x - x.mean(axis=1, keepdims=True)
        return np.tanh(centred / np.sqrt((centred * centred).mean(axis=1, keepdims=True) + 1e-5))

    return probe
