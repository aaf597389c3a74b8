"""How figures are written everywhere: counts, sizes, SQNRs, times, and ratios with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def count(number: int) -> str:
    """12, 22.6 M: three digits and a suffix."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            scaled = number / limit
            return f"{scaled:.{max(0, 2 - int(math.log10(scaled)))}f} {suffix}"
    return str(number)


def size(in_bytes: int) -> str:
    """12 B, 90.3 MB: decimal, as file managers count."""
    return f"{count(in_bytes)}B" if in_bytes >= 1000 else f"{in_bytes} B"


def counts(kinds: Mapping[str, int]) -> str:
    """linear 37, gelu 6."""
    return ", ".join(f"{kind} {number}" for kind, number in kinds.items())


def decibels(sqnr: float) -> str:
    """31.2 dB, or `equal` for an SQNR of infinity."""
    return "equal" if sqnr == math.inf else f"{sqnr:.1f} dB"


def cosine(similarity: float) -> str:
    """Five digits: 0.99912."""
    return f"{similarity:.5f}"


def share(part: float | None) -> str:
    """98.5 %, or - where there is none."""
    return "-" if part is None else f"{100 * part:.1f} %"


def milliseconds(seconds: float) -> str:
    """Three digits after the point, without the unit."""
    return f"{1000 * seconds:.3f}"


def interval(median: float, low: float, high: float, steady: bool = True) -> str:
    """A median and its 95% interval, 2.00 [1.80, 2.20]. Too few rounds give no interval; ~: an unsteady machine."""
    bounds = f" [{low:.2f}, {high:.2f}]" if math.isfinite(high) else ""
    return f"{'' if steady else '~'}{median:.2f}{bounds}"


def times(ratio: float) -> str:
    """How many times, for a headline: 4.3, and two digits after the point where 1 is near: 1.04."""
    return f"{ratio:.2f}" if ratio < 1.15 else f"{ratio:.1f}"


def ratios(by_form: Mapping[str, Sequence[float]]) -> str:
    """Form by form: median, and the 95% interval."""
    return ", ".join(f"{form} {interval(median, low, high)}" for form, (median, low, high) in by_form.items())


def shortened(line: str, width: int) -> str:
    """At most `width` characters, the last three of them dots where something was cut off."""
    return line if len(line) <= width else line[: width - 3] + "..."
