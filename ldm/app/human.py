"""The arithmetic of people judging pictures: fooling rates, a time threshold by a staircase, preferences.

After HYPE (Zhou et al. 2019, "HYPE: A Benchmark for Human eYe Perceptual Evaluation of Generative Models"):
HYPE-infinity (section 2.2) without a time limit, HYPE-time (section 2.1) with flashes. HYPE asks about single pictures;
pairs and preferences are ours. HYPE-infinity takes 50 real and 50 generated pictures a person, and HYPE's people have
passed a test first and its intervals resample people; here anyone judges as many as they like.

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
    """How long the next picture is shown, in ms, by the answers so far. The numbers are HYPE's (section 2.1): a block
    of 150 pictures begins at 500 ms; 3-up/1-down, that is, 30 ms shorter after three right answers in a row, 10 ms
    longer after each wrong one; from 100 to 1000 ms.

    It settles where steps up and down balance, p^streak down = (1 - p^streak) up, p being the probability of a right
    answer (`level`): 63.0% with these steps, though HYPE says 75%; Levitt's (1971) 79.4% with equal ones, 75% with
    Kaernbach's (1991) weighted rule streak=1, up=30, down=10. The judge is to be asked about one model, in one form of
    question.
    """

    start: int = 500
    shortest: int = 100
    longest: int = 1000
    up: int = 10
    down: int = 30
    streak: int = 3
    block: int = 150
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
        for number, right in enumerate(self.answers, start=1):
            row = row + 1 if right else 0
            step = self.up if not right else -self.down if row == self.streak else 0
            row %= self.streak
            found.append(min(max(found[-1] + step, self.shortest), self.longest))
            if number % self.block == 0:
                found[-1], row = self.start, 0
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
        """Answers of a block that a threshold needs, HYPE's full blocks being long: twice those in which who is always
        right comes from the start to the shortest (84)."""
        return 2 * self.streak * math.ceil((self.start - self.shortest) / self.down)

    def threshold(self) -> float | None:
        """What `perceptual_threshold` says of the answers."""
        return perceptual_threshold(self.exposures[:-1], self.enough, self.block)


def perceptual_threshold(exposures: Sequence[int], enough: int, block: int) -> float | None:
    """A person's HYPE-time in ms, of the exposures they were shown: the one shown most often (the shortest of equals)
    in each block, averaged over blocks; HYPE has three. Blocks of fewer than `enough` do not count; None without one.
    A value at either end of the range says only that the true one lies there or beyond."""
    blocks = [exposures[i : i + block] for i in range(0, len(exposures), block)]
    modes = [min(statistics.multimode(part)) for part in blocks if len(part) >= enough]
    return statistics.mean(modes) if modes else None
