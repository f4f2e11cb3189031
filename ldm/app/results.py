"""Statistics of people judging pictures: fooling rates, time thresholds by a staircase, preferences.

After HYPE (Zhou et al. 2019, "HYPE: A Benchmark for Human eYe Perceptual Evaluation of Generative Models"):
HYPE-infinity (section 2.2) without a time limit, HYPE-time (section 2.1) with flashes; pairs and preferences are ours.
HYPE's judges pass a test first, and its intervals resample people; here anyone judges, and intervals take answers as
independent: many answers of few people are less certain than they say.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

from scipy.stats import binomtest, quantile_test

from ldm.app.judgements import Judgement

START, SHORTEST, LONGEST = 500, 100, 1000  # ms
UP, DOWN, STREAK = 10, 30, 3  # ms after a wrong answer, and after so many right ones in a row
ENOUGH = 2 * STREAK * math.ceil((START - SHORTEST) / DOWN)  # answers, twice those from START to SHORTEST without errors
BLOCK = 150  # most answers of a round


def exposures(answers: Iterable[bool]) -> list[int]:
    """The staircase: how long, in ms, the pictures of all answers of a round and the next one are shown.

    The numbers are HYPE's (section 2.1). Steps up and down balance where p, the probability of a right answer, has
    p^3 30 = (1 - p^3) 10: at 63.0%, though HYPE says 75%.
    """
    shown, streak = [START], 0
    for right in answers:
        streak = streak + 1 if right else 0
        step = -DOWN * (streak % STREAK == 0) if right else UP
        shown.append(min(max(shown[-1] + step, SHORTEST), LONGEST))
    return shown


def results(judgements: Sequence[Judgement]) -> dict[str, dict[str, str]]:
    """Per model, the rows of its results; "wrong" of single pictures is HYPE-infinity, where 50% means that generated
    pictures cannot be told from real ones. Errors in flashes are left out: the staircase itself sets their rate."""
    models = {model for j in judgements for model in (j.model, j.other_model)} - {""}
    return {
        model: _rows(model, [j for j in judgements if model in (j.model, j.other_model)]) for model in sorted(models)
    }


def _rows(model: str, judgements: list[Judgement]) -> dict[str, str]:
    kinds = {kind: [j for j in judgements if j.kind == kind] for kind in ("single", "pair", "flash", "preference")}
    single, pairs, flashes, preferences = kinds.values()
    real, generated = ([not j.right for j in single if (j.answer == t) == j.right] for t in ("real", "generated"))
    rows = {
        "judgements": ", ".join(f"{len(answers)} {kind}" for kind, answers in kinds.items() if answers),
        "rounds": str(len({j.session for j in judgements})),
        "wrong, single": _rate(real + generated),
        "generated taken for real, single": _rate(generated),
        "real taken for generated, single": _rate(real),
        "generated chosen as real, pairs": _rate([not j.right for j in pairs]),
        "flash that fools, single": _flash(j for j in flashes if j.answer in ("real", "generated")),
        "flash that fools, pairs": _flash(j for j in flashes if j.answer in ("left", "right")),
    }
    for other in sorted({name for j in preferences for name in (j.model, j.other_model)} - {model}):
        between = [j for j in preferences if other in (j.model, j.other_model)]
        won = [(j.answer == "left") == (j.model == model) for j in between if j.answer != "tie"]
        counts = f"{sum(won)} won, {len(between) - len(won)} ties, {len(won) - sum(won)} lost"
        p = binomtest(sum(won), len(won)).pvalue if won else 1.0  # sign test without ties (Dixon and Mood 1946)
        rows[f"preferred to {other}"] = f"{_rate(won)}: {counts}, p = {p:.2g}"
    return rows


def _rate(outcomes: list[bool]) -> str:
    """The share of True with its score interval (Wilson 1927)."""
    if not outcomes:
        return "no answers yet"
    low, high = binomtest(sum(outcomes), len(outcomes)).proportion_ci(method="wilson")
    return f"{statistics.mean(outcomes):.0%} [{low:.0%}, {high:.0%}]"


def _flash(flashes: Iterable[Judgement]) -> str:
    """The median of the rounds' thresholds with its interval between order statistics, from the 6th round on.

    The threshold of a round with ENOUGH answers (HYPE-time) is its most frequent exposure, the shortest of equals; at
    either end of the range the true one may lie beyond.
    """
    rounds: dict[str, list[int]] = {}
    for j in flashes:
        rounds.setdefault(j.session, []).append(j.exposure_ms)
    thresholds = [min(statistics.multimode(shown)) for shown in rounds.values() if len(shown) >= ENOUGH]
    if not thresholds:
        return f"after {ENOUGH} flashes in one round"
    low, high = quantile_test(thresholds).confidence_interval(0.95)
    interval = f" [{low:.0f}, {high:.0f}]" if math.isfinite(low) else ""
    return f"{statistics.median(thresholds):.0f} ms{interval}, rounds: {len(thresholds)}"
