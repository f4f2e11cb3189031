"""Statistics of people judging pictures: fooling rates, time thresholds by a staircase, preferences.

After HYPE (Zhou et al. 2019, "HYPE: A Benchmark for Human eYe Perceptual Evaluation of Generative Models"):
HYPE-infinity (section 2.2) without a time limit, HYPE-time (section 2.1) with flashes; pairs and preferences are ours.
HYPE's judges pass a test first, and its intervals resample people; here anyone judges, and intervals take answers as
independent: many answers of few people are less certain than they say.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ldm.app.judgements import Judgement

BLOCK, START, SHORTEST, LONGEST = 150, 500, 100, 1000  # answers, and ms
UP, DOWN, STREAK = 10, 30, 3  # ms after a wrong answer, and after so many right ones in a row
ENOUGH = 2 * STREAK * math.ceil((START - SHORTEST) / DOWN)  # answers, twice those from START to SHORTEST without errors


class Interval(NamedTuple):
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float


def rate_interval(successes: float, total: int) -> Interval:
    """The share of successes with its score interval (Wilson 1927); (nan, 0, 1) of none at all. The lower end rounds
    half a success down, the upper end up."""
    from scipy.stats import binomtest

    if not total:
        return Interval(math.nan, 0.0, 1.0)
    low, high = (binomtest(f(successes), total).proportion_ci(method="wilson") for f in (math.floor, math.ceil))
    return Interval(successes / total, low.low, high.high)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of wins being as likely as losses; ties are left out (Dixon and Mood 1946)."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def median_interval(values: Sequence[float]) -> Interval:
    """The median with an interval between order statistics, which holds for any distribution; an interval of nan for
    fewer than the 6 values that it needs."""
    from scipy.stats import quantile_test

    return Interval(statistics.median(values), *quantile_test(values).confidence_interval(0.95))


def exposures(answers: Iterable[bool]) -> list[int]:
    """The staircase: how long, in ms, the pictures of all answers and the next one are shown.

    The numbers are HYPE's (section 2.1). Steps up and down balance where p, the probability of a right answer, has
    p^3 30 = (1 - p^3) 10: at 63.0%, though HYPE says 75%. All answers must be about one model, in one form of question.
    """
    shown, row = [START], 0
    for number, right in enumerate(answers, start=1):
        row = row + 1 if right else 0
        step = UP if not right else -DOWN if row == STREAK else 0
        row %= STREAK
        shown.append(min(max(shown[-1] + step, SHORTEST), LONGEST))
        if number % BLOCK == 0:
            shown[-1], row = START, 0
    return shown


def threshold(shown: Sequence[int]) -> float | None:
    """A person's HYPE-time in ms: the most frequent exposure (the shortest of equals) of each block, averaged over
    blocks with ENOUGH answers; None without one. At either end of the range the true one may lie beyond."""
    blocks = [shown[i : i + BLOCK] for i in range(0, len(shown), BLOCK)]
    modes = [min(statistics.multimode(block)) for block in blocks if len(block) >= ENOUGH]
    return statistics.mean(modes) if modes else None


def results(judgements: Sequence[Judgement]) -> dict[str, dict[str, str]]:
    """Per model, the rows of its results; "wrong" of single pictures is HYPE-infinity, where 50% means that generated
    pictures cannot be told from real ones. Errors in flashes are left out: the staircase itself sets their rate."""
    models = sorted({model for j in judgements for model in (j.model, j.other_model) if model})
    return {model: _rows(model, [j for j in judgements if model in (j.model, j.other_model)]) for model in models}


def _rows(model: str, judgements: list[Judgement]) -> dict[str, str]:
    kinds = defaultdict(list)
    for j in judgements:
        kinds[j.kind].append(j)
    single = [(not j.right, j.answer == ("real" if j.right else "generated")) for j in kinds["single"]]
    real, generated = ([wrong for wrong, is_real in single if is_real == truth] for truth in (True, False))
    rows = {
        "judgements": ", ".join(f"{len(found)} {kind}" for kind, found in kinds.items() if found),
        "visits": str(len({j.session for j in judgements})),
        "wrong, single": _share(real + generated),
        "generated taken for real, single": _share(generated),
        "real taken for generated, single": _share(real),
        "generated chosen as real, pairs": _share([not j.right for j in kinds["pair"]]),
        "flash that fools, single": _threshold(j for j in kinds["flash"] if j.answer in ("real", "generated")),
        "flash that fools, pairs": _threshold(j for j in kinds["flash"] if j.answer in ("left", "right")),
    }
    outcomes = defaultdict(Counter)
    for j in kinds["preference"]:
        side, other = ("left", j.other_model) if j.model == model else ("right", j.model)
        outcomes[other]["won" if j.answer == side else "tie" if j.answer == "tie" else "lost"] += 1
    for other, n in sorted(outcomes.items()):
        rate = rate_interval(n["won"] + n["tie"] / 2, n.total())  # too wide, never too narrow, where ties are many
        counts = f"{n['won']} won, {n['tie']} ties, {n['lost']} lost, p = {sign_test(n['won'], n['lost']):.2g}"
        rows[f"preferred to {other}"] = f"{_percent(rate)}: {counts}"
    return rows


def _share(wrong: list[bool]) -> str:
    return _percent(rate_interval(sum(wrong), len(wrong))) if wrong else "no answers yet"


def _percent(rate: Interval) -> str:
    return f"{rate.value:.0%} [{rate.low:.0%}, {rate.high:.0%}]"


def _threshold(flashes: Iterable[Judgement]) -> str:
    visits = defaultdict(list)
    for j in flashes:
        visits[j.session].append(j.exposure_ms)
    thresholds = [ms for shown in visits.values() if (ms := threshold(shown)) is not None]
    if not thresholds:
        return f"after {ENOUGH} flashes in one visit"
    median, low, high = median_interval(thresholds)
    interval = f" [{low:.0f}, {high:.0f}]" if math.isfinite(low) else ""
    return f"{median:.0f} ms{interval}, visits: {len(thresholds)}"
