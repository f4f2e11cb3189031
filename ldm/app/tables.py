"""What people's judgements come to, as HTML."""

import math
from html import escape
from typing import Any

from ldm.app.human import Rate, Staircase
from ldm.app.parts import said


def share(rate: Rate) -> str:
    """A share with its interval, in words."""
    if math.isnan(rate.rate):
        return "no answers yet"
    return f"{rate.rate:.0%} [{rate.low:.0%}, {rate.high:.0%}]"


def milliseconds(rate: Rate, sessions: int) -> str:
    """A median threshold with its interval, in words."""
    if not sessions:
        return f"after {Staircase().enough} flashes in one visit"
    interval = f" [{rate.low:.0f}, {rate.high:.0f}]" if math.isfinite(rate.low) else ""
    return f"{rate.rate:.0f} ms{interval}, {sessions} {'visit' if sessions == 1 else 'visits'}"


def table(results: dict[str, dict[str, Any]]) -> str:
    """All results as HTML: for each model how often people were fooled."""
    if not results:
        return said("Nothing has been judged yet.")
    parts = []
    for model, found in results.items():
        rows = [
            ("judgements", ", ".join(f"{count} {kind}" for kind, count in found["judgements"].items())),
            ("visits", str(found["sessions"])),
            ("generated taken for real, single", share(found["single"].fakes)),
            ("real taken for generated, single", share(found["single"].reals)),
            ("wrong of all, single", share(found["single"].hype_infinity)),
            ("generated chosen as real, pairs", share(found["pair"])),
            ("how long a flash fools, single", milliseconds(found["threshold_ms"], found["thresholds"])),
            ("how long a flash fools, pairs", milliseconds(found["pair_threshold_ms"], found["pair_thresholds"])),
        ]
        for other, win in found["preference"].items():
            counts = f"{win.wins} won, {win.ties} ties, {win.losses} lost, p = {win.p:.2g}"
            rows.append((f"preferred to {other}", f"{share(Rate(*win[:3]))}: {counts}"))
        body = "".join(f"<tr><th scope='row'>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
        parts.append(f"<table><caption>{escape(model)}</caption>{body}</table>")
    note = (
        "At 50% people cannot tell generated pictures from real ones. The median time of a flash at which they begin to"
        " (HYPE, Zhou et al. 2019) is in milliseconds: longer is better for the model. Intervals are 95%."
    )
    return f'<div class="results">{"".join(parts)}<p>{note}</p></div>'
