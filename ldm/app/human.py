"""The arithmetic of people judging pictures: fooling rates, a time threshold by a staircase, preferences.

After HYPE (Zhou et al. 2019, "HYPE: A Benchmark for Human eYe Perceptual Evaluation of Generative Models"):
HYPE-infinity without a time limit, HYPE-time with flashes.

Intervals take answers as independent. Many by few people are less certain than they say.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self


class Rate(NamedTuple):
    """A number (a share of 0 to 1, or a median) with its interval."""

    rate: float
    low: float
    high: float


class Fooling(NamedTuple):
    """Errors on single pictures. `hype_infinity`: of all, at 50% real ones and generated ones cannot be told apart
    (above, the generated look more real); `fakes`, the fooling rate: generated ones taken for real; `reals`: real ones
    taken for generated."""

    hype_infinity: Rate
    fakes: Rate
    reals: Rate


class WinRate(NamedTuple):
    """Of two models: the share of wins, ties half each, with its interval, and p of a two-sided sign test."""

    rate: float
    low: float
    high: float
    p: float
    wins: int
    ties: int
    losses: int


def rate_interval(successes: float, total: int, level: float = 0.95) -> Rate:
    """The share of successes with its score interval (Wilson 1927); (nan, 0, 1) of none at all."""
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total}; they must be 0 to all")
    if not total:
        return Rate(math.nan, 0.0, 1.0)
    z, rate = statistics.NormalDist().inv_cdf(0.5 + level / 2), successes / total
    scale = 1 + z**2 / total
    centre = (rate + z**2 / (2 * total)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / total + z**2 / (4 * total**2))
    low = max(centre - half, 0.0) if successes else 0.0  # exactly, as rounding would not have it
    return Rate(rate, low, min(centre + half, 1.0) if successes < total else 1.0)


def fooling(fakes_wrong: int, fakes: int, reals_wrong: int, reals: int, level: float = 0.95) -> Fooling:
    """Of single pictures judged "real or generated?", how many wrongly (HYPE-infinity). In pairs "which is real?" the
    fooling rate is that of pairs whose generated picture was chosen, `rate_interval(wrong, pairs)`."""
    parts = ((fakes_wrong + reals_wrong, fakes + reals), (fakes_wrong, fakes), (reals_wrong, reals))
    return Fooling(*(rate_interval(wrong, total, level) for wrong, total in parts))


def win_rate(wins: int, ties: int, losses: int, level: float = 0.95) -> WinRate:
    """The interval is Wilson's with half a success a tie: too wide, never too narrow, where ties are many, as
    {0, 1/2, 1} varies less than {0, 1} of the same mean."""
    rate = rate_interval(wins + ties / 2, wins + ties + losses, level)
    return WinRate(*rate, sign_test(wins, losses), wins, ties, losses)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p, exact, of wins being as likely as losses; ties are left out (Dixon and Mood 1946). 1 of none."""
    return min(2 * _tail(wins + losses, min(wins, losses)), 1.0)


def median_interval(values: Iterable[float], level: float = 0.95) -> Rate:
    """The median with an interval between order statistics, which holds for any distribution (David and Nagaraja 2003,
    section 7.1). Fewer values than that takes (6 at 95%) leave it open: (median, -inf, inf)."""
    ranked = sorted(values)
    n = len(ranked)
    cut = sum(_tail(n, k) <= (1 - level) / 2 for k in range(n // 2))  # values to leave out on either side, plus 1
    median = statistics.median(ranked) if ranked else math.nan
    return Rate(median, ranked[cut - 1], ranked[n - cut]) if cut else Rate(median, -math.inf, math.inf)


def _tail(n: int, k: int) -> float:
    """P(X <= k) of n fair coins."""
    return sum(math.comb(n, i) for i in range(k + 1)) / 2**n


@dataclass(frozen=True, kw_only=True)
class Staircase:
    """How long the next picture is shown, in ms, by the answers so far: HYPE-time's 3-up/1-down rule, shorter by `down`
    after `streak` right answers in a row, longer by `up` after each wrong one. HYPE goes up to 1000 ms; here flashes
    end at 500.

    It settles where steps up and down balance, p^streak down = (1 - p^streak) up, p being the probability of a right
    answer (`level`): 63.0% with these steps, Levitt's (1971) 79.4% with equal ones, 75% with Kaernbach's (1991)
    weighted rule streak=1, up=30, down=10. The judge is to be asked about one model, in one form of question.
    """

    start: int = 500
    shortest: int = 100
    longest: int = 500
    up: int = 10
    down: int = 30
    streak: int = 3
    answers: tuple[bool, ...] = ()

    @classmethod
    def replay(cls, answers: Iterable[bool], **options: int) -> Self:
        """The staircase after these answers."""
        return cls(answers=tuple(answers), **options)

    def answer(self, right: bool) -> Self:
        """The staircase after one more answer."""
        return replace(self, answers=(*self.answers, right))

    @property
    def exposures(self) -> list[int]:
        """Those of all answers, and the next one."""
        found, row = [self.start], 0
        for right in self.answers:
            row = row + 1 if right else 0
            step = self.up if not right else -self.down if row == self.streak else 0
            row %= self.streak
            found.append(min(max(found[-1] + step, self.shortest), self.longest))
        return found

    @property
    def exposure(self) -> int:
        """Of the next picture."""
        return self.exposures[-1]

    @property
    def level(self) -> float:
        """The share of right answers at which it stays."""
        return (self.up / (self.up + self.down)) ** (1 / self.streak)

    @property
    def enough(self) -> int:
        """Answers that a threshold needs: twice those in which who is always right comes from top to bottom (84)."""
        return 2 * self.streak * math.ceil((self.longest - self.shortest) / self.down)

    def threshold(self) -> int | None:
        """HYPE's: the exposure that was shown most often, the shortest of equals; None before `enough` answers.
        One at either end says only that the true one lies there or beyond."""
        return modal_exposure(self.exposures[:-1], self.enough)


def modal_exposure(exposures: Sequence[int], enough: int = 1) -> int | None:
    """The most frequent exposure, the shortest of equals; None of fewer than `enough`."""
    return min(statistics.multimode(exposures)) if len(exposures) >= max(enough, 1) else None
