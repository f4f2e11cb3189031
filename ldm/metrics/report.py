"""The report of an evaluation: one HTML file with its pictures and plots inside, which opens offline.

A further section is a function (settings, results) -> HTML, "" where it has nothing to say, and its entry in
SECTIONS.
"""

import math
import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ldm.metrics.report_html import CSS, Gallery, plot, show, table


def find(results: Sequence[dict], metric: str, of: str, **where: Any) -> list[dict]:
    """The records of a metric that have a value and agree with `where`."""
    where |= {"metric": metric, "of": of}
    return [r for r in results if r["value"] is not None and all(r.get(key) == value for key, value in where.items())]


def best_guidance(results: Sequence[dict]) -> float:
    """The guidance of the highest compositional score; without one, of the lowest Frechet distance."""
    ranked = [(-r["value"]["mean"]["all"], r["guidance"]) for r in find(results, "compositional_score", "samples")]
    ranked = ranked or [(r["value"], r["guidance"]) for r in find(results, "frechet_distance", "samples")]
    ranked = ranked or [(r["value"], r["guidance"]) for r in find(results, "blank_pictures", "samples")]
    return min(ranked)[1]


def write_report(path: Path, settings: dict, results: Sequence[dict], galleries: Sequence[Gallery]) -> None:
    """Writes the HTML beside `path` and renames it into place."""
    title = f"Evaluation of {escape(str(settings['model']))} on {escape(settings['data'])}"
    body = [f"<h1>{title}</h1>", *(section(settings, results) for section in SECTIONS), *map(show, galleries)]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    html = f'<!doctype html>\n<html lang="en"><head>{head}<title>{title}</title><style>{CSS}</style></head>\n<body>'
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("\n".join([html, *filter(None, body), _settings(settings, results), "</body></html>\n"]))
    os.replace(temporary, path)


def _headline(settings: dict, results: Sequence[dict]) -> str:
    best = best_guidance(results)
    cards = [(f"{best:g}", "best guidance of those tried")]
    for r in find(results, "compositional_score", "samples", guidance=best):
        mean = r["value"]["mean"]
        cards.append((_percent(mean["all"]), f"compositional score, N = {r['n']}"))
        cards.append((_percent(mean["held_out"]), "of it on compositions never trained on"))
    for r in find(results, "frechet_distance", "samples", guidance=best):
        floors = find(results, "frechet_distance", "real train")
        beside = f"; real pictures: {floors[0]['value']:.2f}" if floors else ""
        cards.append((f"{r['value']:.2f}", f"Frechet distance, N = {r['n']}{beside}"))
    for r in find(results, "psnr_db", "reconstructions"):
        cards.append((f"{r['value']:.1f} dB", f"PSNR of the autoencoder, N = {r['n']}"))
    boxes = "".join(f'<div class="card"><b>{value}</b><span>{escape(text)}</span></div>' for value, text in cards)
    how = f"{settings['num']} captions of split {settings['split']}, {settings['size']} px, {settings['sampler']}"
    rescale = settings.get("guidance_rescale", 0)
    rescaled = f", guidance rescaled by {rescale:g}" if rescale else ""
    line = f"{how}, {settings['steps']} steps{rescaled}, seed {settings['seed']}"
    return f'<p class="soft">{escape(line)}</p><div class="cards">{boxes}</div>'


def _guidance(settings: dict, results: Sequence[dict]) -> str:
    """Every number over guidance: a table and a plot each."""
    best, rows = best_guidance(results), []
    distances = {r["guidance"]: r["value"] for r in find(results, "frechet_distance", "samples")}
    scores = {r["guidance"]: r["value"]["mean"] for r in find(results, "compositional_score", "samples")}
    blank = {r["guidance"]: r for r in find(results, "blank_pictures", "samples")}
    head = [
        "guidance",
        *(["Frechet distance"] if distances else []),
        *(["score", "seen", "held-out"] if scores else []),
    ]
    for g in settings["guidance"]:
        row = [f"{g:g}", *([f"{distances[g]:.2f}"] if distances else [])]
        row += [_percent(scores[g][key]) for key in ("all", "seen", "held_out")] if scores else []
        rows.append([*row, f"{blank[g]['value']} of {blank[g]['n']}"])
    shown = table([*head, "blank"], rows, best=list(settings["guidance"]).index(best))
    floors = [r["value"] for r in find(results, "frechet_distance", "real train")]
    plots = ""
    if scores:
        points = [(g, 100 * mean["all"]) for g, mean in sorted(scores.items())]
        plots += plot("Compositional score in percent, higher is better", points, best, 100)
    if distances:
        top = _round_up(max([*distances.values(), *floors]))
        points = sorted(distances.items())
        plots += plot("Frechet distance, lower is better", points, best, top, floors[0] if floors else None)
    return f'<h2>Guidance</h2>{shown}<div class="plots">{plots}</div>{_caution(results)}'


def _caution(results: Sequence[dict]) -> str:
    """What the Frechet distances depend on, and how far they can be trusted."""
    records = [r for r in results if r["metric"] == "frechet_distance" and r["of"] == "samples"]
    if not records:
        return '<p class="soft">Frechet distances were not asked for.</p>'
    r = records[0]
    floors = [f for f in results if f["metric"] == "frechet_distance" and f["of"] == "real train"]
    text = (
        f"Frechet distance of {r['extractor']} features (weights {r['extractor_sha256'][:12]}, {r['resize']})"
        f" between {r['n']} samples and {r['n']} real held-out pictures. It is not FID, whose features are Inception's,"
        " and compares only with numbers of the same N, network and resize: fewer pictures give a larger distance."
    )
    if r["biased"]:
        text += f" N = {r['n']} is no more than the {r['dimensions']} features, so its bias is large."
    for floor in floors:
        known = floor["value"] is not None
        beside = f"real training pictures are {floor['value']:.2f} away" if known else f"unknown, {floor['note']}"
        text += f" The floor at this N: {beside}."
    return f'<p class="soft">{escape(text)}</p>'


def _tasks(settings: dict, results: Sequence[dict]) -> str:
    """The six compositional tasks at each guidance."""
    records = find(results, "compositional_score", "samples")
    if not records:
        return ""
    best, text = (
        best_guidance(results),
        "Share of pictures that show exactly what the caption says, by an exact checker.",
    )
    head = ["task", *(f"at {r['guidance']:g}" for r in records), "seen", "held-out", "pictures"]
    chosen = next(r["value"] for r in records if r["guidance"] == best)
    rows = [
        [task, *(_percent(r["value"][task]["all"]) for r in records)]
        + [_percent(chosen[task]["seen"]), _percent(chosen[task]["held_out"]), str(chosen[task]["n"])]
        for task in chosen
    ]
    text += f" All at each guidance, then seen and held-out compositions at guidance {best:g}."
    return f"<h2>What the captions ask for</h2><p>{text}</p>{table(head, rows, best=len(rows) - 1)}"


def _links(settings: dict, results: Sequence[dict]) -> str:
    """Where along the chain a picture goes wrong."""
    records = [r for of in ("real held-out", "reconstructions") for r in find(results, "scene_accuracy", of)]
    if not records:
        return ""
    samples = find(results, "scene_accuracy", "samples")
    named = [(r["of"], r) for r in records] + [(f"samples at {r['guidance']:g}", r) for r in samples]
    aspects = list(records[0]["value"])
    rows = [[name, *(_percent(r["value"][aspect]) for aspect in aspects), str(r["n"])] for name, r in named]
    text = "The same checker on each link of the chain: the first row that falls short is what limits the model."
    return f"<h2>Link by link</h2><p>{text}</p>{table(['pictures', *aspects, 'N'], rows)}"


def _autoencoder(settings: dict, results: Sequence[dict]) -> str:
    """Reconstruction quality."""
    kinds = {"psnr_db": "PSNR in dB", "ssim": "SSIM", "frechet_distance": "Frechet distance"}
    found = [(name, r) for kind, name in kinds.items() for r in find(results, kind, "reconstructions")]
    rows = [[name, f"{r['value']:.4g}", str(r["n"])] for name, r in found]
    text = "Held-out pictures through the autoencoder and back, from the mean of the latent, against themselves."
    return f"<h2>Autoencoder</h2><p>{text}</p>{table(['', 'value', 'N'], rows)}"


SECTIONS: tuple[Callable[[dict, Sequence[dict]], str], ...] = (_headline, _guidance, _tasks, _links, _autoencoder)


def _settings(settings: dict, results: Sequence[dict]) -> str:
    rows = []
    for key, value in settings.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v:,}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(f"{v:g}" for v in value)
        rows.append([key.replace("_", " "), str(value)])
    return f"<h2>Settings</h2>{table([], rows, kind='settings')}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 6, 8, 10 times a power of ten: quarters of it are short numbers."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value)
