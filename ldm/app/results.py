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
from dataclasses import dataclass
from typing import NamedTuple

from ldm.app.judgements import Judgement


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


@dataclass(frozen=True, kw_only=True)
class Staircase:
    """How long the next picture is shown, in ms. The defaults are HYPE's (section 2.1): blocks of 150 pictures that
    begin at 500 ms; 30 ms shorter after three right answers in a row, 10 ms longer after each wrong one; from 100 to
    1000 ms.

    It settles where p, the probability of a right answer, has p^streak down = (1 - p^streak) up: 63.0% by these
    steps, though HYPE says 75%; Levitt's (1971) 79.4% by equal ones, 75% by Kaernbach's (1991) streak=1, up=30,
    down=10. All answers must be about one model, in one form of question.
    """

    start: int = 500
    shortest: int = 100
    longest: int = 1000
    up: int = 10
    down: int = 30
    streak: int = 3
    block: int = 150

    @property
    def enough(self) -> int:
        """Answers of a block that a threshold needs: twice those that lead from the start to the shortest exposure if
        all are right (84)."""
        return 2 * self.streak * math.ceil((self.start - self.shortest) / self.down)

    def exposures(self, answers: Iterable[bool]) -> list[int]:
        """The exposures of all answers and of the next one."""
        exposures, row = [self.start], 0
        for number, right in enumerate(answers, start=1):
            row = row + 1 if right else 0
            step = self.up if not right else -self.down if row == self.streak else 0
            row %= self.streak
            exposures.append(min(max(exposures[-1] + step, self.shortest), self.longest))
            if number % self.block == 0:
                exposures[-1], row = self.start, 0
        return exposures

    def threshold(self, exposures: Sequence[int]) -> float | None:
        """A person's HYPE-time in ms: the most frequent exposure (the shortest of equals) of each block, averaged over
        blocks with `enough` answers; None without one. At either end of the range the true one may lie beyond."""
        blocks = [exposures[i : i + self.block] for i in range(0, len(exposures), self.block)]
        modes = [min(statistics.multimode(block)) for block in blocks if len(block) >= self.enough]
        return statistics.mean(modes) if modes else None


def results(judgements: Sequence[Judgement]) -> dict[str, dict[str, str]]:
    """Per model, the rows of its results; "wrong" of single pictures is HYPE-infinity, where 50% means that generated
    pictures cannot be told from real ones. Errors in flashes are left out: the staircase itself sets their rate."""
    models = sorted({model for j in judgements for model in (j.model, j.other_model) if model})
    return {model: _rows(model, [j for j in judgements if model in (j.model, j.other_model)]) for model in models}


def _rows(model: str, judgements: list[Judgement]) -> dict[str, str]:
    kinds: dict[str, list[Judgement]] = defaultdict(list)
    for j in judgements:
        kinds[j.kind].append(j)
    real, generated = (
        [not j.right for j in kinds["single"] if bool(j.right) == (j.answer == truth)]
        for truth in ("real", "generated")
    )
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
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
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
    visits: dict[str, list[int]] = defaultdict(list)
    for j in flashes:
        visits[j.session].append(j.exposure_ms)
    thresholds = [t for exposures in visits.values() if (t := Staircase().threshold(exposures)) is not None]
    if not thresholds:
        return f"after {Staircase().enough} flashes in one visit"
    median, low, high = median_interval(thresholds)
    interval = f" [{low:.0f}, {high:.0f}]" if math.isfinite(low) else ""
    return f"{median:.0f} ms{interval}, visits: {len(thresholds)}"
