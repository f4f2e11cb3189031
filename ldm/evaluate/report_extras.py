"""Further sections of a model's report: the autoencoder, copies of the training set, wording, groups, cost."""

from collections.abc import Sequence
from html import escape

from ldm.evaluate.records import Record, best_guidance, find
from ldm.evaluate.report_html import number, percent, table
from ldm.evaluate.report_plots import Line, plot


def _autoencoder(settings: dict, results: Sequence[Record]) -> str:
    kinds = {"psnr_db": "PSNR in dB", "ssim": "SSIM", "frechet_distance": "Frechet distance"}
    found = [(name, r) for kind, name in kinds.items() for r in find(results, kind, "reconstructions")]
    rows = [[name, number(r), str(r["n"])] for name, r in found]
    text = "Held-out pictures through the autoencoder and back, from the mean of the latent, against themselves."
    return f"<h2>Autoencoder</h2><p>{text}</p>{table(['', 'value', 'N'], rows)}"


def _copies(settings: dict, results: Sequence[Record]) -> str:
    """How near samples lie to the training set, beside held-out pictures."""
    found = find(results, "memorized", "samples")
    if not found:
        return ""
    samples, real = found[0], find(results, "memorized", "real held-out")[0]
    whole = "the whole training set" if samples["bank_is_whole"] else "a random part of the training set"
    text = (
        f"Distance of each picture to the nearest of {samples['bank']:,} training pictures, {whole}, in"
        f" {samples['extractor']} features. Nearer than the nearest {percent(samples['near'])} of real held-out"
        f" pictures: {percent(samples['value'])} of samples at guidance {samples['guidance']:g}"
        f" ({_between(samples['interval'])}); nearer than every one of them: {percent(samples['nearer_than_any'])}"
        f" ({_between(samples['nearer_interval'])}). Of real held-out pictures about {percent(samples['near'])} and"
        " none are so near by definition; many more would be copies."
    )
    lines = []
    for r in (samples, real):
        steps = len(r["quantiles"]) - 1
        points = [(value, 100 * i / steps) for i, value in enumerate(r["quantiles"])]
        lines.append(Line(name=r["of"], points=points, dots=False))
    drawing = plot("Share of pictures in percent that lie nearer than this", "distance to the training set", lines)
    return f'<h2>Does it copy?</h2><p>{escape(text)}</p><div class="plots">{drawing}</div>'


def _between(interval: Sequence[float]) -> str:
    low, high = (percent(bound) for bound in interval)
    return f"95% interval {low} to {high}"


def _wording(settings: dict, results: Sequence[Record]) -> str:
    """What other wording does to alignment."""
    changes = [r for r in results if r["metric"] == "clip_cosine_change"]
    if not changes:
        return ""
    rows = [[r["of"], number(r, 100), str(r["n"])] for r in changes]
    text = (
        "Change of the CLIP score (100 cos) with the caption as first worded, each picture against its own, where a"
        " caption can be changed so. Exactly 0: the tokenizer reads both alike."
    )
    return f"<h2>Other wording</h2><p>{text}</p>{table(['captions', 'change', 'N'], rows)}"


def _groups(settings: dict, results: Sequence[Record]) -> str:
    """Samples and real pictures of each group that captions name."""
    cosines = [r for r in results if r["metric"] == "group_clip_cosine" and r["of"] == "samples"]
    if not cosines:
        return ""
    rows = []
    for r in cosines:
        place = {"attribute": r["attribute"], "group": r["group"]}
        row = [f"{r['attribute']}: {r['group']}", str(r["n"])]
        for metric, factor in (("group_clip_cosine", 100), ("group_paired", 100), ("group_diversity", 1)):
            row += [number(find(results, metric, of, **place)[0], factor) for of in ("samples", "real held-out")]
        rows.append(row)
    head = ["group", "N", "100 cos", "100 cos, real", "preferred, %", "preferred, real", "diversity", "diversity, real"]
    (network,) = {r["extractor"] for r in results if r["metric"] == "group_diversity"}
    text = (
        "Samples beside real held-out pictures: alignment with the caption, how often its own value is preferred to"
        " each wrong one by the judge (chance 50%), and diversity: the mean distance between two pictures of the group"
        f" in {network} features, which grows with how much its captions differ."
    )
    return f"<h2>Groups</h2><p>{escape(text)}</p>{table(head, rows)}{_combinations(results)}{_left_open(results)}"


def _combinations(results: Sequence[Record]) -> str:
    rows = []
    for r in results:
        if r["metric"] == "new_combinations":
            every = {"value": r["every"], "interval": r["every_interval"]}
            rows.append([r["of"], number(r, 100), number(every, 100), str(r["n"])])
    text = (
        "Pictures of a role with a skin tone and gender that it never has in training: how many of the other"
        " combinations, of what the caption names of the two, the judge finds worse (chance 50%), and how often all."
    )
    return f"<p>{text}</p>{table(['pictures', 'of the others, %', 'all, %', 'N'], rows)}" if rows else ""


def _left_open(results: Sequence[Record]) -> str:
    found = [r for r in results if r["metric"] == "left_open"]
    parts = []
    for r in found:
        shares = [(name, {"value": share, "interval": r["interval"][name]}) for name, share in r["value"].items()]
        rows = [[name, number(share, 100)] for name, share in shares]
        text = f"What {r['n']} captions that name no {r['attribute']} turn into: the caption that the judge prefers."
        parts.append(f"<p>{escape(text)}</p>{table([r['attribute'], 'share, %'], rows)}")
    return "".join(parts)


def _cost(settings: dict, results: Sequence[Record]) -> str:
    """Time, memory and size."""
    g, rows = best_guidance(results), []
    for r in find(results, "seconds_per_picture", "samples", guidance=g):
        threads = f"{r['threads']} thread{'s' if r['threads'] > 1 else ''}"
        where = f"{r['device']}, {threads}, batch of {r['n']}, {r['steps']} steps"
        rows.append(["time a picture", f"{r['value']:.3f} s", where])
    for r in results:
        if r["metric"] == "memory_per_picture_bytes":
            whole = f"{r['peak'] / 2**20:,.0f} MiB"
            each = f"{r['value'] / 2**20:,.1f} MiB" if r["value"] is not None else "-"
            at_most = f"beside weights and all else, which make {whole} at the peak of a batch of {r['n']}"
            unknown = f"the system does not tell; the whole process took {whole} so far"
            rows.append(["memory a picture", each, unknown if r["value"] is None else at_most])
    for r in find(results, "parameters", "samples", guidance=g):
        parts = ", ".join(f"{name} {count:,}" for name, count in settings["parameters"].items())
        rows.append(["parameters", f"{r['value']:,}", parts])
    return f"<h2>Cost</h2>{table(['', '', ''], rows)}" if rows else ""


EXTRAS = (_autoencoder, _copies, _wording, _groups, _cost)
