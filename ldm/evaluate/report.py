"""The report of an evaluation: one HTML file with its pictures and plots inside, which opens offline.

A further section is a function (settings, results) -> HTML, "" where it has nothing to say, and its entry in
SECTIONS.
"""

import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from ldm.evaluate.records import SHUFFLED, Record, best_guidance, find, named, ratio
from ldm.evaluate.report_extras import EXTRAS
from ldm.evaluate.report_html import CSS, Gallery, number, percent, short, show, table
from ldm.evaluate.report_plots import Line, plot
from ldm.evaluate.report_shapes import composed, links, tasks

# metric, name in the report, factor, which way is better, whether it is of alignment
ROWS = (
    ("frechet_distance", "Frechet distance", 1, "lower", False),
    ("frechet_distance_infinite", "Frechet distance, N to infinity", 1, "lower", False),
    ("kernel_distance", "kernel distance x 1000", 1000, "lower", False),
    ("precision", "precision, %", 100, "higher", False),
    ("recall", "recall, %", 100, "higher", False),
    ("density", "density", 1, "higher", False),
    ("coverage", "coverage, %", 100, "higher", False),
    ("inception_score", "Inception Score, by the network's classes", 1, "higher", True),
    ("clip_cosine", "cosine with the caption", 1, "higher", True),
    ("clip_score_100", "CLIP score, 100 max(cos, 0)", 1, "higher", True),
    ("clip_score", "CLIP score, 2.5 max(cos, 0)", 1, "higher", True),
    ("image_to_text@1", "right caption found first, %", 100, "higher", True),
    ("image_to_text@5", "right caption among 5, %", 100, "higher", True),
    ("text_to_image@1", "right picture found first, %", 100, "higher", True),
    ("text_to_image@5", "right picture among 5, %", 100, "higher", True),
    ("paired skin tone", "right skin tone preferred, %", 100, "higher", True),
    ("paired gender", "right gender preferred, %", 100, "higher", True),
    ("paired style", "right style preferred, %", 100, "higher", True),
    ("cmmd", "CMMD", 1, "lower", False),
    ("judge_frechet_distance", "Frechet distance, judge's features x 1000", 1000, "lower", False),
    ("judge_frechet_distance_infinite", "the same, N to infinity", 1000, "lower", False),
)
OF_INCEPTION = {
    "frechet_distance": "FID",
    "frechet_distance_infinite": "FID, N to infinity",
    "kernel_distance": "KID x 1000",
    "inception_score": "Inception Score",
}  # what they are called with FID's own network, and with no other
OVER_GUIDANCE = ("frechet_distance", "kernel_distance", "precision", "recall", "coverage", "clip_score_100")
OVER_GUIDANCE += ("image_to_text@1", "cmmd")


def called(name: str, record: Record) -> str:
    """A row's name in the report, for the network that its number is of."""
    return OF_INCEPTION.get(record["metric"], name) if record.get("extractor") == "inception" else name


def write_report(path: Path, settings: dict, results: Sequence[Record], galleries: Sequence[Gallery]) -> None:
    """Writes the report of a model beside `path` and renames it into place."""
    title = f"Evaluation of {settings['model']} on {settings['data']}"
    body = [*(section(settings, results) for section in SECTIONS), *map(show, galleries)]
    write_page(path, title, [*body, settings_table(settings)])


def write_page(path: Path, title: str, body: Sequence[str]) -> None:
    """Writes HTML that needs no other file, beside `path`, and renames it into place."""
    title = escape(title)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    html = f'<!doctype html>\n<html lang="en"><head>{head}<title>{title}</title><style>{CSS}</style></head>\n<body>'
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("\n".join([html, f"<h1>{title}</h1>", *filter(None, body), "</body></html>\n"]))
    os.replace(temporary, path)


def _headline(settings: dict, results: Sequence[Record]) -> str:
    best = best_guidance(results)
    cards = [(f"{best:g}", "best guidance of those tried")]
    for r in find(results, "compositional_score", "samples", guidance=best):
        mean = r["value"]["mean"]
        cards.append((percent(mean["all"]), f"compositional score, N = {r['n']}"))
        cards.append((percent(mean["held_out"]), "of it on compositions never trained on"))
    for r in find(results, "frechet_distance", "samples", guidance=best):
        floors = find(results, "frechet_distance", "real train")
        beside = f"; real pictures: {floors[0]['value']:.2f}, a ratio of {ratio(r, floors[0]):.2f}" if floors else ""
        cards.append((f"{r['value']:.2f}", f"{called('Frechet distance', r)}, N = {r['n']}{beside}"))
    for r in find(results, "image_to_text@1", "samples", guidance=best):
        real = find(results, "image_to_text@1", "real held-out")[0]["value"]
        text = (
            f"of samples lead the judge to their caption; real pictures: {percent(real)}, chance {percent(r['chance'])}"
        )
        cards.append((percent(r["value"]), text))
    for r in find(results, "psnr_db", "reconstructions"):
        cards.append((f"{r['value']:.1f} dB", f"PSNR of the autoencoder, N = {r['n']}"))
    boxes = "".join(f'<div class="card"><b>{value}</b><span>{escape(text)}</span></div>' for value, text in cards)
    how = f"{settings['num']} captions of split {settings['split']}, {settings['size']} px, {settings['sampler']}"
    rescale = settings.get("guidance_rescale", 0)
    rescaled = f", guidance rescaled by {rescale:g}" if rescale else ""
    line = f"{how}, {settings['steps']} steps{rescaled}, seed {settings['seed']}"
    return f'<p class="soft">{escape(line)}</p><div class="cards">{boxes}</div>'


def _overview(settings: dict, results: Sequence[Record]) -> str:
    """Every number between what real pictures get and what an untrained model or other captions get."""
    best = best_guidance(results)
    rows = composed(results, best)
    for metric, name, factor, better, alignment in ROWS:
        samples = find(results, metric, "samples", guidance=best)
        if not samples:
            continue
        cells = [called(name, samples[0]), number(samples[0], factor)]
        for of in ("real held-out" if alignment else "real train", "reconstructions", "untrained"):
            cells.append(number(next(iter(find(results, metric, of)), None), factor))
        cells.append(number(next(iter(find(results, metric, SHUFFLED)), None), factor))
        rows.append([*cells, better])
    if not rows:
        return ""
    head = ["", f"samples at {best:g}", "real", "reconstructions", "untrained", "captions shuffled", "better"]
    text = (
        "With 95% intervals (bootstrap over pictures, which has no spread where all pictures agree; of distances only"
        " the spread, at this N; of neighbourhoods with the balls as they are). Real: for distances training pictures,"
        " which may have other subjects, against held-out ones; where captions are asked for the held-out pictures"
        " themselves. Untrained: the same network with random weights. Shuffled: samples with the captions of others."
        " The guidance is chosen on these captions."
    )
    return f"<h2>Between floor and ceiling</h2><p>{text}</p>{table(head, rows)}{_caution(results)}"


def _failed(settings: dict, results: Sequence[Record]) -> str:
    """What failed: pictures of one plain colour, and samples of the data that could not be used."""
    return failed(results)


def failed(results: Sequence[Record]) -> str:
    """Blank pictures, counted in every number as they are, and samples left out; "" for none."""
    texts = []
    blank = [r for r in results if r["metric"] == "blank_pictures" and r["value"]]
    if blank:
        found = "; ".join(f"{r['value']} of {r['n']} {named(r)}" for r in blank)
        texts.append(f"Blank pictures, of one plain colour, which are failures and count in every number: {found}.")
    for r in results:
        if r["metric"] == "left_out":
            texts.append(f"{r['value']} of {r['n']} samples of the data could not be used, the first: {r['note']}.")
    return "".join(f'<p class="failed">{escape(text)}</p>' for text in texts)


def _against(settings: dict, results: Sequence[Record]) -> str:
    """Beside another model."""
    others = {r["metric"]: r for r in results if r["of"] == "baseline"}
    if not others:
        return ""
    rows = []
    for metric, name, factor, better, _ in ROWS:
        if metric in others:
            r = others[metric]
            times = "-" if r["ratio"] is None else f"{r['ratio']:.3f}"
            rows.append([called(name, r), short(factor * r["ours"]), number(r, factor, False), times, better])
    other = next(iter(others.values()))
    text = f"Each at its own best guidance, the other's is {other['guidance']:g}; the same captions, networks and N."
    shown = table(["", "this model", f"{other['model']}", "ratio", "better"], rows)
    return f"<h2>Against {escape(other['model'])}</h2><p>{text}</p>{shown}"


def _caution(results: Sequence[Record]) -> str:
    """What the numbers depend on, and how far they can be trusted."""
    texts = [_distances(results), _judge(results)]
    return "".join(f'<p class="soft">{escape(text)}</p>' for text in texts)


def _distances(results: Sequence[Record]) -> str:
    found = [r for r in results if r["metric"] == "frechet_distance" and r["of"] == "samples"]
    if not found:
        return "Distances between sets of pictures were not asked for."
    r = found[0]
    which = (
        "This is FID's network" if r["extractor"] == "inception" else "It is not FID, whose features are Inception's"
    )
    text = (
        f"Distances, neighbourhoods and Inception Score are of {r['extractor']} features (weights"
        f" {r['extractor_sha256'][:12]}, {r['resize']}), {r['n']} pictures against {r['n']} real held-out ones."
        f" {which}; it compares only with numbers of the same N, network and resize: fewer pictures give a larger one."
    )
    if r["biased"]:
        text += f" N = {r['n']} is no more than the {r['dimensions']} features, so its bias is large: it {r['note']}."
        text += " The kernel distance and CMMD need no more, and of the judge's fewer features less is needed."
    for floor in results:
        if floor["metric"] == "frechet_distance" and floor["of"] == "real train" and floor["value"] is None:
            text += f" The floor at this N: unknown, {floor['note']}."
    for endless in (x for x in results if x["metric"] == "frechet_distance_infinite" and x["value"] is None):
        return f"{text} Extrapolating to N -> infinity {endless['note']}."
    return text


def _judge(results: Sequence[Record]) -> str:
    found = [r for r in results if r["metric"] == "clip_cosine" and r["of"] == "samples"]
    if not found:
        return "There was no judge of alignment."
    r = found[0]
    return (
        f"Alignment is judged by {r['extractor']} (weights {r['extractor_sha256'][:12]}, {r['resize']}), which does not"
        f" condition the model; retrieval among {r['n']} captions. CLIP scores compare only within one judge."
    )


def _guidance(settings: dict, results: Sequence[Record]) -> str:
    """The main numbers over guidance, and the trade of quality against alignment."""
    best = best_guidance(results)
    scores = {r["guidance"]: r["value"]["mean"] for r in find(results, "compositional_score", "samples")}
    blank = {r["guidance"]: r for r in find(results, "blank_pictures", "samples")}
    shown = [row for row in ROWS if row[0] in OVER_GUIDANCE and find(results, row[0], "samples")]
    rows = []
    for g in settings["guidance"]:
        row = [f"{g:g}", *([percent(scores[g][key]) for key in ("all", "seen", "held_out")] if scores else [])]
        row += [number(find(results, m, "samples", guidance=g)[0], factor, False) for m, _, factor, *_ in shown]
        rows.append([*row, f"{blank[g]['value']} of {blank[g]['n']}"])
    names = [called(name, find(results, metric, "samples")[0]) for metric, name, *_ in shown]
    names = [name.replace("100 max(cos, 0)", "of 100") for name in names]
    head = ["guidance", *(["score", "seen", "held-out"] if scores else []), *names, "blank"]
    marked = table(head, rows, best=list(settings["guidance"]).index(best))
    return f'<h2>Guidance</h2>{marked}<div class="plots">{_plots(results, scores, best)}</div>'


def _plots(results: Sequence[Record], scores: dict[float, dict], best: float) -> str:
    distances = {r["guidance"]: r["value"] for r in find(results, "frechet_distance", "samples")}
    cosines = {r["guidance"]: r["value"] for r in find(results, "clip_score_100", "samples")}
    floors = [("real pictures", r["value"]) for r in find(results, "frechet_distance", "real train")]
    plots = []
    if distances and cosines:
        order = sorted(distances)
        points, marks = [(cosines[g], distances[g]) for g in order], [f"{g:g}" for g in order]
        line = Line(name="guidance", points=points, marks=marks, ring=order.index(best))
        title = "Frechet distance against CLIP score over guidance: lower right is better"
        plots.append(plot(title, "CLIP score, 100 max(cos, 0)", [line], floors))
    for title, values in (
        ("Compositional score in percent, higher is better", {g: 100 * m["all"] for g, m in scores.items()}),
        ("Frechet distance, lower is better", distances),
    ):
        if values:
            order = sorted(values)
            line = Line(name="", points=[(g, values[g]) for g in order], ring=order.index(best))
            plots.append(plot(title, "guidance", [line], floors if values is distances else ()))
    return "".join(plots)


def settings_table(settings: dict) -> str:
    """All that the numbers depend on."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v:,}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(f"{v:g}" for v in value)
        rows.append([key.replace("_", " "), str(value)])
    return f"<h2>Settings</h2>{table([], rows, kind='settings')}"


Section = Callable[[dict, Sequence[Record]], str]
SECTIONS: tuple[Section, ...] = (_headline, _failed, _overview, _against, _guidance, tasks, links, *EXTRAS)
