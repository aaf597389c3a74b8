"""Paired timing on a simulated clock: no test here measures real time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from graphopt.measure import machine, timing
from graphopt.measure.timing import Ratio, geometric_mean, paired, slower_than


@dataclass
class Machine:
    """A clock that only calls advance. `speed` divides every duration; `log` holds what ran, runs in a row once."""

    now: float = 0.0
    speed: Callable[[float], float] = lambda now: 1.0
    log: list[str] = field(default_factory=list)
    rests: int = 0

    def clock(self) -> float:
        return self.now

    def task(self, name: str, *durations: float) -> Callable[[], None]:
        """A callable that takes these durations in turn."""
        count = 0

        def call() -> None:
            nonlocal count
            self.now += durations[count % len(durations)] / self.speed(self.now)
            count += 1
            if name != "probe" and self.log[-1:] != [name]:
                self.log.append(name)

        return call

    def paired(self, candidates: dict[str, Callable[[], None]], rounds: int = 15, **options: Any) -> dict[str, Ratio]:
        probe = self.task("probe", 0.001)
        return paired(
            candidates, baseline="base", rounds=rounds, clock=self.clock, sleep=self.rest, probe=probe, **options
        )

    def rest(self, seconds: float) -> None:
        self.rests += 1


def test_ratio_of_steady_tasks() -> None:
    machine = Machine()
    ratios = machine.paired({"base": machine.task("base", 0.06), "fast": machine.task("fast", 0.03)})
    fast = ratios["fast"]
    assert (fast.median, fast.low, fast.high) == pytest.approx((2.0, 2.0, 2.0), rel=1e-9)
    assert (fast.rounds, fast.dropped) == (15, 0)
    assert fast.seconds["base"] == pytest.approx((0.06, 0.06), rel=1e-9)
    assert fast.seconds["fast"] == pytest.approx((0.03, 0.03), rel=1e-9)


def test_everything_rests_after_each_block() -> None:
    """Worker threads that still spin would be timed with the next candidate."""
    machine = Machine()
    machine.paired({"base": machine.task("base", 0.06), "fast": machine.task("fast", 0.03)}, rounds=15)
    assert machine.rests == 2 + 15 * 2


def test_baseline_is_one_and_control_is_near() -> None:
    machine = Machine()
    base = machine.task("base", 0.030, 0.031, 0.032, 0.033, 0.034)
    ratios = machine.paired({"base": base, "control": base})
    assert (ratios["base"].median, ratios["base"].low, ratios["base"].high) == (1.0, 1.0, 1.0)
    assert set(ratios["base"].seconds) == {"base"}
    control = ratios["control"]
    assert control.low < 1.0 < control.high
    assert not slower_than(control)


def test_pairing_cancels_drift() -> None:
    """The machine slows down threefold in small steps: each task's times spread, their ratio doesn't."""
    machine = Machine(speed=lambda now: 1 / (1 + now))
    fast = machine.paired({"base": machine.task("base", 0.04), "fast": machine.task("fast", 0.02)}, probe_tolerance=1.0)
    p50, p90 = fast["fast"].seconds["fast"]
    assert p90 > 1.3 * p50
    assert fast["fast"].low == pytest.approx(fast["fast"].high, rel=0.1)


def test_median_and_interval_are_order_statistics() -> None:
    """Of 15 ratios 1..15 in any order: the 8th, and the 4th and 12th, which cover the median with 96.5%."""
    values = [float(value) for value in range(1, 16)]
    random.Random(0).shuffle(values)
    assert timing.interval(values) == (4.0, 12.0)
    assert timing.interval(values[:6]) == (min(values[:6]), max(values[:6]))
    assert timing.interval(values[:5]) == (0.0, math.inf)
    assert timing.interval([3.0]) == (0.0, math.inf)


@pytest.mark.parametrize("count", range(6, 60))
def test_interval_covers_the_median_with_95_percent_and_no_wider(count: int) -> None:
    low, high = timing.interval([float(value) for value in range(1, count + 1)])
    k = int(low)
    assert high == count + 1 - k
    miss = 2 * sum(math.comb(count, heads) for heads in range(k)) / 2**count
    narrower = 2 * sum(math.comb(count, heads) for heads in range(k + 1)) / 2**count
    assert miss <= 0.05 < narrower


def test_percentiles_of_the_blocks() -> None:
    seconds = [float(number) for number in range(10, 0, -1)]
    assert timing.percentiles(seconds) == (5.5, 9.0)
    assert timing.percentiles(seconds[:1]) == (10.0, 10.0)


def test_every_order_gets_its_turn() -> None:
    assert ["".join(timing.turns("ab", run)) for run in range(5)] == ["ab", "ba", "ba", "ab", "ab"]
    assert {"".join(timing.turns("abc", run)) for run in range(6)} == {"abc", "acb", "bac", "bca", "cab", "cba"}


def test_rounds_are_interleaved() -> None:
    machine = Machine()
    machine.paired({"base": machine.task("base", 0.03), "other": machine.task("other", 0.03)}, rounds=4)
    # Warm-up, then base other | other base | other base | base other; runs in a row are logged once.
    assert machine.log == ["base", "other", "base", "other", "base", "other", "base", "other"]


def test_short_calls_are_repeated_until_a_block_is_long_enough() -> None:
    machine = Machine()
    calls = timing.calls_per_block("short", machine.task("short", 0.003), 0.02, machine.clock)
    assert calls == 8
    assert timing.calls_per_block("long", machine.task("long", 0.5), 0.02, machine.clock) == 1
    assert timing.calls_per_block("tiny", machine.task("tiny", 1e-9), 0.02, machine.clock) == timing.MAX_CALLS


def test_one_warm_up_call_is_not_timed() -> None:
    machine = Machine()
    slow_start = machine.task("candidate", 100.0, *[0.05] * 1000)
    ratios = machine.paired({"base": machine.task("base", 0.05), "candidate": slow_start})
    assert ratios["candidate"].median == pytest.approx(1.0, rel=1e-9)
    assert ratios["candidate"].seconds["candidate"][1] == pytest.approx(0.05, rel=1e-9)


def test_all_are_warmed_up_alike() -> None:
    """One hiccup makes a block of one call where the same task has blocks of two: both start after a rest."""
    machine = Machine()
    rested, hiccups = False, iter([0.0, 0.01])

    def rest(seconds: float) -> None:
        nonlocal rested
        rested = True

    def call() -> None:
        nonlocal rested
        machine.now += 0.015 + 0.01 * rested + next(hiccups, 0.0)
        rested = False

    ratios = paired({"base": call, "control": call}, baseline="base", clock=machine.clock, sleep=rest,
                    probe=machine.task("probe", 0.001))  # fmt: skip
    assert ratios["control"].median == pytest.approx(1.0, rel=1e-9)


def test_pairs_that_straddle_a_change_of_speed_are_dropped_and_run_again() -> None:
    """From second 1 on the machine is 4 times slower; the block that straddles it and its pair don't count."""
    machine = Machine(speed=lambda now: 1.0 if now < 1.0 else 0.25)
    ratios = machine.paired({"base": machine.task("base", 0.04), "fast": machine.task("fast", 0.02)})
    fast = ratios["fast"]
    assert (fast.rounds, fast.dropped) == (15, 1)
    assert (fast.low, fast.high) == pytest.approx((2.0, 2.0), rel=1e-9)


def test_a_change_between_the_two_blocks_of_a_pair_is_seen() -> None:
    """Neither block's own probes differ, but the two blocks ran on machines of different speed."""
    fast, slow = (1.0, 1.0), (1.3, 1.3)
    for one, other, change in ((fast, slow, 0.3), (fast, (1.14, 1.15), 0.15), ((1.0, 1.2), fast, 0.2)):
        pair = timing.Block((1.0,), one), timing.Block((1.0,), other)
        assert timing.speed_change(pair) == pytest.approx(change)


def test_only_the_pairs_of_straddling_blocks_are_dropped() -> None:
    """The change falls into other's block, the last of a round: base and fast ran before it and still count."""
    machine = Machine()
    changed = False

    def other() -> None:
        nonlocal changed
        blocks = machine.log.count("other")
        if blocks == 2 and not changed:  # the warm-up was the first
            machine.speed, changed = (lambda now: 0.25), True
        task()

    task = machine.task("other", 0.03)
    candidates = {"base": machine.task("base", 0.03), "fast": machine.task("fast", 0.03), "other": other}
    ratios = machine.paired(candidates, rounds=7)
    assert ratios["fast"].dropped == 0
    assert ratios["base"].dropped == 0
    assert ratios["other"].dropped == 1
    assert ratios["other"].rounds == 7


def test_an_unsteady_machine_gives_fewer_rounds_after_twice_as_many() -> None:
    """The probe is steady through every third round only. A round of two blocks has three probes."""
    machine = Machine()
    steady, changing = [1.0] * 3 * timing.PROBE_RUNS, [1.0] * timing.PROBE_RUNS + [2.0] * 2 * timing.PROBE_RUNS
    warm_up, *durations = [1.0, *steady, *changing, *changing]
    probe = machine.task("probe", warm_up, *durations * 10)
    tasks = {"base": machine.task("base", 0.04), "slow": machine.task("slow", 0.05)}
    slow = paired(tasks, baseline="base", clock=machine.clock, sleep=machine.rest, probe=probe)["slow"]
    assert (slow.rounds, slow.dropped) == (10, 20)
    assert slow.high < 1.0
    assert slower_than(slow)


def test_a_machine_that_is_never_steady_is_an_error() -> None:
    machine = Machine()

    def growing() -> None:
        machine.now *= 1.01

    tasks = {"base": machine.task("base", 0.04), "same": machine.task("same", 0.04)}
    options = {"clock": machine.clock, "sleep": machine.rest, "probe": growing, "probe_tolerance": 0.0}
    same = paired(tasks, baseline="base", **options)["same"]  # type: ignore[arg-type]
    assert (same.steady, same.rounds, same.dropped) == (False, 6, 24)
    assert same.median == pytest.approx(1.0)


def test_an_interrupt_in_one_run_of_the_probe_is_no_change_of_speed() -> None:
    machine = Machine()
    assert timing.probe_seconds(machine.task("probe", 0.001, 0.1, 0.001), machine.clock) == pytest.approx(0.001)


def test_errors_name_the_fact() -> None:
    machine = Machine()
    task = machine.task("base", 0.03)
    with pytest.raises(ValueError, match="no candidates"):
        paired({}, baseline="base", clock=machine.clock, sleep=machine.rest)
    with pytest.raises(ValueError, match="'float' is not among the candidates: base, fast"):
        paired({"base": task, "fast": task}, baseline="float", clock=machine.clock, sleep=machine.rest)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        paired({"base": task}, baseline="base", rounds=0, clock=machine.clock, sleep=machine.rest)
    with pytest.raises(ValueError, match="16384 calls of 'base' took no time"):
        paired({"base": lambda: None}, baseline="base", clock=machine.clock, sleep=machine.rest)


def verdict(high: float, rounds: int = 15) -> bool:
    return slower_than(Ratio(median=0.9, low=0.8, high=high, rounds=rounds, dropped=0, seconds={}))


def test_slower_needs_the_whole_interval_below_one_and_6_rounds() -> None:
    assert verdict(0.99)
    assert verdict(0.99, rounds=6)
    assert not verdict(1.0)
    assert not verdict(1.01)
    assert not verdict(0.99, rounds=5)


def test_slower_on_a_clock() -> None:
    machine = Machine()
    durations = {"base": 0.030, "slow": 0.031, "fast": 0.029}
    ratios = machine.paired({name: machine.task(name, seconds) for name, seconds in durations.items()})
    assert {name: slower_than(ratio) for name, ratio in ratios.items()} == {"base": False, "slow": True, "fast": False}


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0, rel=1e-12)
    assert geometric_mean(iter([3.0])) == pytest.approx(3.0, rel=1e-12)
    with pytest.raises(ValueError, match="no values"):
        geometric_mean([])
    with pytest.raises(ValueError, match=r"above 0, not 0\.0"):
        geometric_mean([1.0, 0.0])


def test_cpu_flags_that_matter() -> None:
    first = "processor : 0\nmodel name\t: Fast CPU\nflags\t\t: fpu amx_int8 avx512_vnni avx2\n"
    assert machine.cpu(first + "\nmodel name : Other\nflags : sve\n") == ("Fast CPU", "avx2 avx512_vnni amx_int8")
    assert machine.cpu("Features : fp asimddp i8mm") == ("", "asimddp i8mm")
    assert machine.cpu("") == ("", "")


def test_environment_and_header() -> None:
    found = machine.environment()
    assert {"cpu", "flags", "cores", "threads", "os", "python", "torch", "numpy", "onnxruntime"} <= set(found)
    text = machine.header(found | {"cpu": "Fast CPU", "flags": "avx2", "cores": "4", "torch": "2.13.0"}, threads=2)
    assert text.startswith("Fast CPU, 4 cores, 2 threads, ")
    assert "flags: avx2" in text
    assert "torch 2.13.0" in text
    assert "flags: unknown" in machine.header(found | {"flags": ""}, threads=2)


def test_a_package_that_is_not_there() -> None:
    assert machine.version("no-such-package-at-all") == "not installed"


def test_the_default_probe_runs_and_is_fixed() -> None:
    first, second = timing.default_probe()(), timing.default_probe()()
    assert bytes(first) == bytes(second)  # type: ignore[call-overload]


# --- timing that ends early ----------------------------------------------------------------------------------------


def raced(machine: Machine, seconds: dict[str, tuple[float, ...]], **options: Any) -> dict[str, timing.Ratios]:
    """Timing of tasks that take these seconds, one call each."""
    calls = {name: [machine.task(name, *several)] for name, several in seconds.items()}
    probe = machine.task("probe", 0.001)
    return timing.paired_calls(calls, baseline="base", clock=machine.clock, sleep=machine.rest, probe=probe, **options)


def test_a_candidate_that_is_far_too_slow_is_given_up() -> None:
    machine = Machine()
    found = raced(machine, {"base": (0.06,), "slow": (0.1,), "near": (0.07,)}, rounds=6, give_up_below=0.8)
    slow, near = found["slow"].overall, found["near"].overall
    assert (slow.rounds, slow.low, slow.high) == (timing.SCREENING_PAIRS, 0.0, math.inf)
    assert slow.median == pytest.approx(0.6, rel=1e-9)
    assert near.rounds == 6 and near.low == pytest.approx(6 / 7, rel=1e-9)
    assert machine.log.count("slow") == 1 + timing.SCREENING_PAIRS  # one to count calls


def test_a_candidate_far_behind_the_fastest_is_given_up() -> None:
    """But not the baseline, which all are compared with."""
    found = raced(
        Machine(), {"base": (0.06,), "slow": (0.05,), "near": (0.03,), "fast": (0.02,)}, rounds=6, give_up_behind=0.6
    )
    rounds = {name: ratios.overall.rounds for name, ratios in found.items()}
    assert rounds == {"base": 6, "slow": timing.SCREENING_PAIRS + 1, "near": 6, "fast": 6}


def test_a_pause_is_kept_behind_each_block() -> None:
    machine, rests = Machine(), list[float]()
    calls = {name: [machine.task(name, 0.06)] for name in ("base", "other")}
    timing.paired_calls(calls, baseline="base", rounds=2, clock=machine.clock, sleep=rests.append, pause=0.5,
                        probe=machine.task("probe", 0.001))  # fmt: skip
    assert rests == [0.5] * 6


@pytest.mark.parametrize(("spinning", "slept"), [(0.0, 0.01), (0.035, 0.05), (9.0, 0.15)])
def test_a_rest_ends_with_the_work_of_threads(monkeypatch: pytest.MonkeyPatch, spinning: float, slept: float) -> None:
    """spinning: seconds for which a thread works on."""
    naps: list[float] = []
    monkeypatch.setattr("time.sleep", naps.append)
    monkeypatch.setattr("time.process_time", lambda: min(sum(naps), spinning))
    timing.rest(0.15)
    assert sum(naps) == pytest.approx(slept)


def test_timing_ends_where_all_others_are_given_up() -> None:
    found = raced(Machine(), {"base": (0.06,), "slow": (0.1,), "slower": (0.2,)}, rounds=6, give_up_below=0.8)
    assert found["base"].overall.rounds == timing.SCREENING_PAIRS


def test_one_good_pair_of_the_first_is_hope() -> None:
    """The first two durations are those that count calls."""
    found = raced(Machine(), {"base": (0.06,), "late": (0.1, 0.1, 0.1, 0.06)}, rounds=6, give_up_below=0.8)
    assert found["late"].overall.rounds == 6


def faster(ratios: timing.Ratios) -> bool:
    return ratios.overall.low > 1


def test_what_is_faster_for_certain_needs_no_more_rounds() -> None:
    found = raced(Machine(), {"base": (0.06,), "fast": (0.03,)}, rounds=15, until=faster)
    assert found["fast"].overall.rounds == timing.MIN_PAIRS and found["fast"].shapes[0].low > 1


def test_a_tie_takes_all_rounds() -> None:
    found = raced(Machine(), {"base": (0.06,), "same": (0.05, 0.06, 0.07)}, rounds=15, until=faster)
    assert found["same"].overall.rounds == 15


def test_an_unsteady_machine_tells_what_is_certain_in_as_few_rounds() -> None:
    """Every probe takes another time, so that no pair counts; all the same, each has the same winner."""
    machine = Machine()
    calls = {"base": [machine.task("base", 0.06)], "fast": [machine.task("fast", 0.02, 0.03)]}
    probe = machine.task("probe", *(0.001 * 1.2**n for n in range(9)))
    found = timing.paired_calls(calls, baseline="base", clock=machine.clock, sleep=machine.rest, probe=probe,
                            until=lambda one: one.overall.certain)["fast"].overall  # fmt: skip
    assert (found.rounds, found.dropped) == (timing.MIN_PAIRS, 0)  # no more were run
    assert not found.steady and found.low > 1
