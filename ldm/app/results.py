"""Statistics of people judging pictures: fooling rates, time thresholds by a staircase, preferences.

After HYPE (Zhou et al. 2019, "HYPE: A Benchmark for Human eYe Perceptual Evaluation of Generative Models"):
HYPE-infinity (section 2.2) without a time limit, HYPE-time (section 2.1) with flashes; pairs and preferences are ours.
HYPE's judges pass a test first, and its intervals resample people; here anyone judges, and intervals take answers as
independent: many answers of few people are less certain than they say.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

from ldm.app.judgements import Judgement

BLOCK, START, SHORTEST, LONGEST = 150, 500, 100, 1000  # answers, and ms
UP, DOWN, STREAK = 10, 30, 3  # ms after a wrong answer, and after so many right ones in a row
ENOUGH = 2 * STREAK * math.ceil((START - SHORTEST) / DOWN)  # answers, twice those from START to SHORTEST without errors


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
    kinds: dict[str, list[Judgement]] = {}
    for j in judgements:
        kinds.setdefault(j.kind, []).append(j)
    single, pairs, flashes = (kinds.get(kind, []) for kind in ("single", "pair", "flash"))
    generated = [not j.right for j in single if (j.answer == "generated") == j.right]
    real = [not j.right for j in single if (j.answer == "real") == j.right]
    rows = {
        "judgements": ", ".join(f"{len(answers)} {kind}" for kind, answers in kinds.items()),
        "visits": str(len({j.session for j in judgements})),
        "wrong, single": _rate(real + generated),
        "generated taken for real, single": _rate(generated),
        "real taken for generated, single": _rate(real),
        "generated chosen as real, pairs": _rate([not j.right for j in pairs]),
        "flash that fools, single": _threshold(j for j in flashes if j.answer in ("real", "generated")),
        "flash that fools, pairs": _threshold(j for j in flashes if j.answer in ("left", "right")),
    }
    preferences = kinds.get("preference", [])
    for other in sorted({j.model if j.model != model else j.other_model for j in preferences}):
        between = [j for j in preferences if other in (j.model, j.other_model)]
        won = [(j.answer == "left") == (j.model == model) for j in between if j.answer != "tie"]
        counts = f"{sum(won)} won, {len(between) - len(won)} ties, {len(won) - sum(won)} lost"
        rows[f"preferred to {other}"] = f"{_rate(won)}: {counts}, p = {sign_test(sum(won), len(won)):.2g}"
    return rows


def sign_test(wins: int, total: int) -> float:
    """Two-sided p of wins being as likely as losses; ties are left out (Dixon and Mood 1946)."""
    from scipy.stats import binomtest

    return float(binomtest(wins, total).pvalue) if total else 1.0


def _rate(outcomes: list[bool]) -> str:
    """The share of True with its score interval (Wilson 1927)."""
    from scipy.stats import binomtest

    if not outcomes:
        return "no answers yet"
    interval = binomtest(sum(outcomes), len(outcomes)).proportion_ci(method="wilson")
    return f"{statistics.mean(outcomes):.0%} [{interval.low:.0%}, {interval.high:.0%}]"


def _threshold(flashes: Iterable[Judgement]) -> str:
    """The median of the visits' thresholds with its interval between order statistics, from the 6th visit on."""
    from scipy.stats import quantile_test

    visits: dict[str, list[int]] = {}
    for j in flashes:
        visits.setdefault(j.session, []).append(j.exposure_ms)
    thresholds = [ms for shown in visits.values() if (ms := threshold(shown)) is not None]
    if not thresholds:
        return f"after {ENOUGH} flashes in one visit"
    low, high = quantile_test(thresholds).confidence_interval(0.95)
    interval = f" [{low:.0f}, {high:.0f}]" if math.isfinite(low) else ""
    return f"{statistics.median(thresholds):.0f} ms{interval}, visits: {len(thresholds)}"
