"""The report of an autoencoder."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from ldm.evaluate.records import Record, find
from ldm.evaluate.report import called, failed, settings_table, write_page
from ldm.evaluate.report_html import Gallery, network, number, percent, short, show, table
from ldm.evaluate.report_plots import Line, plot
from ldm.metrics.codecs import CODECS

NAMES = {
    "psnr_db": ("PSNR in dB", 1),
    "ssim": ("SSIM", 1),
    "sharpness": ("sharpness, 1 as the originals", 1),
    "perceptual_distance": ("perceptual distance", 1),
    "frechet_distance": ("Frechet distance", 1),
    "frechet_distance_infinite": ("Frechet distance, N to infinity", 1),
    "kernel_distance": ("kernel distance x 1000", 1000),
    "precision": ("precision, %", 100),
    "recall": ("recall, %", 100),
    "density": ("density", 1),
    "coverage": ("coverage, %", 100),
    "bits_per_dimension": ("bits a dimension", 1),
    "bits_of_latent": ("of them for the latent", 1),
    "bits_of_rest": ("of them for what it leaves out", 1),
}


def write_autoencoder_report(
    path: Path, settings: dict, results: Sequence[Record], galleries: Sequence[Gallery]
) -> None:
    """Writes the report beside `path` and renames it into place."""
    title = f"Evaluation of the autoencoder {settings['autoencoder']} on {settings['data']}"
    sections = (failed, _numbers, _channels, _rates, _representation)
    body = [section(results) for section in sections] + [show(gallery) for gallery in galleries]
    write_page(path, title, [*body, settings_table(settings)])


def _numbers(results: Sequence[Record]) -> str:
    rows = []
    for metric, (name, factor) in NAMES.items():
        for r in find(results, metric, "reconstructions"):
            about = r.get("extractor", "")
            name = "LPIPS" if about.startswith("lpips") else name
            name = called(name, r).replace("FID", "rFID")
            rows.append([name, number(r, factor), str(r["n"]), network(r), r.get("resize", "")])
    (bound,) = find(results, "bits_per_dimension", "reconstructions")
    text = (
        "Held-out pictures through the autoencoder and back, from the mean of the latent, against themselves; 95%"
        f" intervals. Bits a dimension bound the code length from above: {bound['assumes']} ({bound['scale']:.4f})."
        " Only Inception features give an rFID; a Frechet distance compares at the same N, network and resize alone."
    )
    for r in find(results, "frechet_distance", "reconstructions"):
        if r["biased"]:
            text += (
                f" N = {r['n']} is no more than the {r['dimensions']} features, so its bias is large: it {r['note']}."
            )
    head = ["", "value", "N", "network", "resize"]
    return f"<h2>Reconstruction</h2><p>{escape(text)}</p>{table(head, rows)}"


def _channels(results: Sequence[Record]) -> str:
    (record,) = find(results, "latent_channels", "latents")
    rows = []
    for i, r in enumerate(record["value"]):
        rows.append([str(i), f"{r['mean']:.3f}", f"{r['std']:.3f}", percent(r["noise_share"]), f"{r['kl_nats']:.3f}"])
    head = ["channel", "mean", "deviation", "noise", "KL in nats a value"]
    text = (
        "The latents as diffusion sees them. Noise is the posterior's share of a channel's variance: a channel that is"
        " nearly all noise says nothing and costs the U-Net effort; fewer latent_channels or a lower loss.kl help."
    )
    return f"<h2>Latents</h2><p>{escape(text)}</p>{table(head, rows)}"


def _rates(results: Sequence[Record]) -> str:
    (record,) = find(results, "rate_distortion", "reconstructions")
    lines, rows = [], []
    for name, points in record["value"].items():
        own = len(points) == 1
        for size, level in points if own else ():
            rows.append([name, short(size), f"{level:.2f}", *(_at(record["value"][c], size) for c in CODECS)])
        if not own:
            lines.append(Line(name=name, points=[(math.log2(size), level) for size, level in points], dots=False))
    own = [(name, points[0]) for name, points in record["value"].items() if len(points) == 1]
    points, marks = [(math.log2(size), level) for _, (size, level) in own], [name for name, _ in own]
    lines.append(Line(name="this autoencoder", points=points, marks=marks, joined=False))
    drawing = plot(
        "PSNR in dB against bytes a picture: upper left is better",
        "bytes",
        lines,
        zero=False,
        x_text=lambda x: f"{2**x:.4g}",
    )
    text = (
        f"{record['n']} pictures. The latent as it is stored in 8 bits a value, and at the rate of its KL, which"
        " bits-back coding would reach; JPEG and WebP with all their headers, at ten qualities, between which their"
        " PSNR at as many bytes is interpolated."
    )
    shown = table(["code", "bytes", "PSNR in dB", *(f"{codec} of as many bytes" for codec in CODECS)], rows)
    return f'<h2>Rate and distortion</h2><p>{text}</p>{shown}<div class="plots">{drawing}</div>'


def _at(points: Sequence[tuple[float, float]], size: float) -> str:
    """A codec's PSNR at `size` bytes, on the lines between its points over the logarithm of bytes."""
    sizes, levels = zip(*sorted(points), strict=True)
    if size < sizes[0]:
        return f"none; {levels[0]:.2f} at {sizes[0]:.0f}"
    if size > sizes[-1]:
        return f"none; {levels[-1]:.2f} at {sizes[-1]:.0f}"
    return f"{np.interp(math.log(size), np.log(sizes), levels):.2f}"


def _representation(results: Sequence[Record]) -> str:
    probes = [r for r in results if r["metric"] == "linear_probe"]
    if not probes:
        return ""
    rows = []
    for r in probes:
        scores = [
            find(results, m, "latents", label=r["label"])[0] for m in ("homogeneity", "completeness", "v_measure")
        ]
        row = [r["label"], str(r["classes"]), number(r, 100), f"{100 * r['chance']:.1f}"]
        rows.append([*row, *(number(s) for s in scores), str(r["n"])])
    head = ["label", "classes", "linear probe, %", "chance, %", "homogeneity", "completeness", "V", "N"]
    text = "What can be read from the latents by a line, and which labels k-means finds in them alone."
    found = [r for r in results if r["metric"] in DISENTANGLED]
    whole = [f"{r['metric'].replace('_', ' ').replace('dci', 'DCI').replace('mig', 'MIG')} {number(r)}" for r in found]
    why = "DCI without intervals, for which its trees would have to grow many times; x and y are thirds of the picture"
    note = f"<p>Against the true factors, value by value: {', '.join(whole)} ({why}).</p>" if whole else ""
    return f"<h2>What the latents say</h2><p>{text}</p>{table(head, rows)}{note}"


DISENTANGLED = ("mig", "dci_disentanglement", "dci_completeness", "dci_informativeness")
