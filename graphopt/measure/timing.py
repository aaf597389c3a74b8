"""Paired, interleaved timing: how many times faster than a baseline, and how sure.

Machines change speed while one measures: frequency, neighbours on a shared host, page placement. So candidates take
turns, each is compared with the baseline's block of the same round, and a small fixed probe, timed between the blocks,
tells which pairs saw two different machines. Those are dropped, counted and run again. After each block everything
rests: an engine's worker threads spin for a while when its work is done, and would slow down whoever comes next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Clock = Callable[[], float]
"""Seconds from any origin, never backwards."""

ROUNDS = 15
"""Rounds that a verdict takes: the 4th and the 12th of 15 ratios bound the median with 96.5% confidence."""

FEWEST = 6
"""Pairs below which the median has no 95% interval."""

MOST_CALLS = 2**14
"""Calls in one block, at most."""

SCREENED = 2
"""Pairs after which a candidate that is hopelessly slow gives up its turns."""

REST = 0.15
"""Seconds between blocks. onnxruntime's workers spin for about 0.1: with none, int8 MiniLM seems 2.0 times as fast as
float where it is 3.1 times, each by itself (2 cores)."""

PROBE_RUNS = 3
"""Runs of the probe, of which the fastest counts: a single interrupt is not a change of speed."""


@dataclass(frozen=True)
class Ratio:
    """Baseline time over candidate time, paired within rounds: above 1 the candidate is faster."""

    median: float
    low: float
    """Lower end of the 95% interval of the median; 0 with fewer than 6 rounds, which can't bound it."""
    high: float
    """Upper end; infinite with fewer than 6 rounds."""
    rounds: int
    """Pairs that counted; fewer than asked for where the machine was too unsteady."""
    dropped: int
    """Pairs that saw a change of the machine's speed and didn't count."""
    seconds: dict[str, tuple[float, float]]
    """p50 and p90 of seconds per call over the blocks that counted, for the baseline and for the candidate."""
    steady: bool = True
    """False where the machine kept changing speed, and the steadiest few pairs had to do."""

    @property
    def certain(self) -> bool:
        """Whether the interval tells which of the two is faster; an unsteady machine makes it wide."""
        return self.low > 1 or self.high < 1


@dataclass(frozen=True)
class Contender:
    """How one candidate of several calls fared."""

    overall: Ratio
    """Of the geometric means over its calls, taken within each round."""
    shapes: tuple[Ratio, ...]
    """Of each call."""


@dataclass(frozen=True)
class Block:
    """One candidate's turn in one round."""

    seconds: tuple[float, ...]
    """Per call, of each of its calls."""
    probes: tuple[float, float]
    """Seconds of the probe just before and just after."""


Pair = tuple[Block, Block]
"""The baseline's turn and a candidate's of one round."""


def paired(
    candidates: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    rounds: int = ROUNDS,
    min_block_seconds: float = 0.02,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
    probe: Callable[[], object] | None = None,
    probe_tolerance: float = 0.15,
) -> dict[str, Ratio]:
    """Time `candidates` against the one called `baseline`, interleaved; one Ratio each, the baseline's own being 1.

    In every round each candidate gets one block: so many calls, fixed beforehand, that they last `min_block_seconds`
    (16384 at most). A pair counts when the probes around its two blocks lie within `probe_tolerance` (0.15 is 15%) of
    each other. Rounds go on until every candidate has `rounds` pairs, or twice that many were run. `probe` defaults to
    a small layer norm on one thread. For a control, pass the baseline's callable once more under another name.

    Where fewer than 6 pairs of a candidate count, its 6 steadiest are taken, and its Ratio says that it is not steady.
    Raises ValueError on wrong arguments or a candidate that takes no time on this clock.
    """
    found = contest(
        {name: [call] for name, call in candidates.items()},
        baseline=baseline, rounds=rounds, min_block_seconds=min_block_seconds, clock=clock, sleep=sleep, probe=probe,
        probe_tolerance=probe_tolerance,
    )  # fmt: skip
    return {name: contender.shapes[0] for name, contender in found.items()}


def contest(
    candidates: Mapping[str, Sequence[Callable[[], object]]],
    *,
    baseline: str,
    rounds: int = ROUNDS,
    min_block_seconds: float = 0.02,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
    probe: Callable[[], object] | None = None,
    probe_tolerance: float = 0.15,
    hopeless: float = 0.0,
    until: Callable[[Contender], bool] | None = None,
) -> dict[str, Contender]:
    """As `paired`, where each candidate has several calls, such as one a shape: the same number of them for all.

    The calls of a candidate follow each other in its block, so that it has to rest once for all of them. One that in
    each of its first SCREENED pairs was less than `hopeless` times as fast as the baseline takes no further part. After
    FEWEST rounds, and only then, all ends where `until` holds for every candidate that is left, as it has fared so far:
    who looks after each round stops at the first chance.
    """
    check(candidates, baseline, rounds)
    probe = probe or default_probe()
    probe()
    calls: dict[str, list[int]] = {}
    for name, several in candidates.items():
        calls[name] = [calls_per_block(name, call, min_block_seconds, clock) for call in several]
        sleep(REST)
    # A short call is slow after a rest: where one candidate is repeated, all are called once before they are timed.
    warm = [max(times) > 1 for times in zip(*calls.values(), strict=True)]
    pairs: dict[str, list[Pair]] = {name: [] for name in candidates}
    counting: dict[str, list[Pair]] = {name: [] for name in candidates}
    run, racing = 0, list(candidates)
    while run < 2 * rounds and min(len(counting[name]) for name in racing) < rounds:
        blocks: dict[str, Block] = {}
        before = probe_seconds(probe, clock)
        for name in turns(racing, run):
            seconds = [block_seconds(*one, clock) for one in zip(candidates[name], calls[name], warm, strict=True)]
            sleep(REST)
            after = probe_seconds(probe, clock)
            blocks[name] = Block(tuple(seconds), (before, after))
            before = after
        for name in racing:
            pair = blocks[baseline], blocks[name]
            pairs[name].append(pair)
            counting[name] += [pair] if unsteadiness(pair) <= probe_tolerance else []
        run += 1
        lost = [name for name in racing if len(counting[name]) == SCREENED and fastest(counting[name]) < hopeless]
        racing = [name for name in racing if name not in lost]
        if lost and racing == [baseline]:
            break
        if until is not None and run == FEWEST and all(
            until(contender(baseline, name, pairs[name], probe_tolerance)) for name in racing if name != baseline
        ):  # fmt: skip
            break
    return {name: contender(baseline, name, several_pairs, probe_tolerance) for name, several_pairs in pairs.items()}


def slower_than(ratio: Ratio) -> bool:
    """Whether the candidate is slower than its baseline at one shape, as the rule "never slower" has it.

    That is: the lower 95% bound of candidate time over baseline time is above 1.00. Of 15 rounds that were asked for,
    as few as 6 may count on an unsteady machine: who asks for a second run before acting on it loses little by a false
    alarm, and a loss that is missed goes out to the user.
    """
    return ratio.rounds >= FEWEST and ratio.high < 1.0


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
    while (seconds := time_calls(call, calls, clock)) < least and calls < MOST_CALLS:
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
    start = clock()
    for _ in range(calls):
        call()
    return clock() - start


def probe_seconds(probe: Callable[[], object], clock: Clock) -> float:
    return min(time_calls(probe, 1, clock) for _ in range(PROBE_RUNS))


def unsteadiness(pair: Pair) -> float:
    """By how much the machine's speed differed around two blocks: 0.15 is 15%."""
    probes = pair[0].probes + pair[1].probes
    return max(probes) / min(probes) - 1


def contender(baseline: str, name: str, pairs: Sequence[Pair], tolerance: float) -> Contender:
    kept = [pair for pair in pairs if unsteadiness(pair) <= tolerance]
    steady = len(kept) >= min(FEWEST, len(pairs))
    if not steady:
        kept = sorted(pairs, key=unsteadiness)[:FEWEST]
    dropped = len(pairs) - len(kept)

    def of(seconds: Callable[[Block], float]) -> Ratio:
        first, second = ([seconds(pair[index]) for pair in kept] for index in (0, 1))
        ratios = [one / other for one, other in zip(first, second, strict=True)]
        low, high = interval(ratios)
        spread = {baseline: percentiles(first), name: percentiles(second)}
        return Ratio(median(ratios), low, high, len(kept), dropped, spread, steady)

    number = len(kept[0][0].seconds)
    each = tuple(of(lambda block, index=index: block.seconds[index]) for index in range(number))  # type: ignore[misc]
    return Contender(of(lambda block: geometric_mean(block.seconds)), each)


def fastest(pairs: Sequence[Pair]) -> float:
    """The largest of the ratios of several pairs, over all calls."""
    return max(geometric_mean(one.seconds) / geometric_mean(other.seconds) for one, other in pairs)


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
    """A fixed layer norm and tanh, about two milliseconds on one thread: memory traffic shows a slow machine most.

    No matrix product: the workers of a BLAS would go on spinning into the block that follows.
    """
    import numpy as np

    x = np.linspace(-1, 1, 512 * 384, dtype=np.float32).reshape(512, 384)

    def probe() -> object:
        centred = x - x.mean(axis=1, keepdims=True)
        return np.tanh(centred / np.sqrt((centred * centred).mean(axis=1, keepdims=True) + 1e-5))

    return probe
