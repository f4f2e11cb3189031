"""The pictures of an evaluation's report."""

from PIL import Image

from ldm.evaluate.bench import Bench, Measured
from ldm.evaluate.pictures import PictureSet
from ldm.evaluate.records import best_guidance
from ldm.evaluate.report_html import Gallery, Row
from ldm.images import to_float, to_pil
from ldm.metrics.compositional_parse import parse

FAILURES = 48
SHOWN = 12  # captions in other wording, and with a group left open


def galleries(bench: Bench, measured: Measured) -> list[Gallery]:
    """Prompts at each guidance, reconstructions, and what the measures came upon."""
    g = best_guidance(measured.results)
    found = [_prompts(bench, measured), _reconstructions(measured), *_copies(bench, measured, g)]
    found += _wording(bench, measured, g) + [_opened(*item, g) for item in measured.opened]
    return found + ([_failures(bench, measured, g)] if bench.cases else [])


def _picture(made: PictureSet, g: float, i: int) -> Image.Image:
    return Image.fromarray(made.array(g, i))


def _prompts(bench: Bench, measured: Measured) -> Gallery:
    made, rows = bench.sets["pictures"], []
    for i, (real, _) in enumerate(measured.reconstructions):
        samples = [(f"{g:g}", _picture(made, g, i)) for g in bench.guidance]
        rows.append(Row(caption=made.captions[i], pictures=[("real", real), *samples]))
    return Gallery(title="Prompts", about="Held-out captions: the real picture, then each guidance.", rows=rows)


def _reconstructions(measured: Measured) -> Gallery:
    rows = [Row(caption="", pictures=[("real", x), ("decoded", y)]) for x, y in measured.reconstructions]
    return Gallery(title="Reconstructions", about="What the autoencoder alone keeps of real pictures.", rows=rows)


def _copies(bench: Bench, measured: Measured, g: float) -> list[Gallery]:
    rows = []
    for i, place, distance in measured.copies:
        (real,) = to_pil(to_float(bench.train[place]["image"])[None])
        pictures = [("sample", _picture(bench.sets["pictures"], g, i)), ("training", real)]
        note = f"distance {distance:.3g}; the training picture: {bench.train.captions(place)[0]}"
        rows.append(Row(caption=bench.captions[i], pictures=pictures, note=note))
    about = "The samples that lie nearest to a training picture, beside it. A good model's may look alike: what counts"
    about += " is whether they lie nearer than real held-out pictures do."
    return [Gallery(title="Nearest to the training set", about=about, rows=rows)] if rows else []


def _wording(bench: Bench, measured: Measured, g: float) -> list[Gallery]:
    rows = []
    for i in range(SHOWN if measured.variants else 0):
        first = [("as asked", _picture(bench.sets["pictures"], g, i))]
        others = [(kind, _picture(made, g, i)) for kind, made in measured.variants.items()]
        note = "; ".join(made.captions[i] for made in measured.variants.values())
        rows.append(Row(caption=bench.captions[i], pictures=first + others, note=note))
    about = "The same caption in other words, in upper case and with a typo, each from the same noise."
    return [Gallery(title="Other wording", about=about, rows=rows)] if rows else []


def _opened(name: str, made: PictureSet, seen: list[str], g: float) -> Gallery:
    rows = []
    for i, value in enumerate(seen[: 2 * SHOWN]):
        rows.append(Row(caption=made.captions[i], pictures=[("", _picture(made, g, i))], note=f"judged: {value}"))
    about = f"Captions that say no {name}, and which one the judge sees."
    return Gallery(title=f"No {name} asked for", about=about, rows=rows)


def _failures(bench: Bench, measured: Measured, g: float) -> Gallery:
    """The wrong pictures at the best guidance, with what the checker sees in them."""
    wrong = [i for i, right in enumerate(measured.right[g]) if not right]
    rows = []
    for i in wrong[:FAILURES]:
        case, picture = bench.cases[i], bench.sets["cases"].array(g, i)
        things = [" ".join(filter(None, (t.size, t.colour, t.shape))) for t in parse(picture)]
        note = f"{case.task}{', held-out' if case.held_out else ''}; seen: {', '.join(things) or 'nothing'}"
        rows.append(Row(caption=case.caption, pictures=[("", Image.fromarray(picture))], note=note))
    shown = f", the first {len(rows)} of them here" if len(rows) < len(wrong) else ""
    about = f"{len(wrong)} of {len(bench.cases)} pictures at guidance {g:g} do not show what their caption says{shown}."
    return Gallery(title="What went wrong", about=about, rows=rows)
