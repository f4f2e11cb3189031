"""Measuring a model on held-out captions. Images are sampled once and kept; every number is computed from them."""

import shutil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.config import UserError
from ldm.data.shapes import Scene
from ldm.distributed import processes
from ldm.evaluate.baseline import compare, read_baseline
from ldm.evaluate.config import EvaluateConfig
from ldm.evaluate.cost import cost_records
from ldm.evaluate.evaluation import Evaluation
from ldm.evaluate.pictures import Pictures, claim
from ldm.evaluate.probes import SHOWN, combinations, groups, memorization, robustness
from ldm.evaluate.records import (
    SHUFFLED,
    Record,
    alignment_records,
    best_guidance,
    biases,
    class_records,
    cmmd_record,
    distance_records,
    find,
    frechet_records,
    judge_fault,
    left_out,
    mean_record,
    named,
)
from ldm.evaluate.report import Row, check_installed, write_results
from ldm.images import to_float
from ldm.metrics import psnr, ssim
from ldm.metrics.attributes import ATTRIBUTES, paired
from ldm.metrics.compositional import Case, by_aspect, check, halves, tally
from ldm.metrics.compositional_parse import parse
from ldm.metrics.intervals import mean_interval


def evaluate(config: EvaluateConfig) -> list[str]:
    """Samples the images that are missing in `config.out`, measures, writes metrics.json and report.html there.

    Several processes (`accelerate launch`) share images and features. Returns the headline numbers, one per line.
    Raises UserError for wrong settings, too few images, or images of other settings; nothing is written then.
    """
    check_installed()
    e, new = Evaluation(config), not config.out.exists()
    baseline = read_baseline(config.baseline, e) if config.baseline else None
    claim(config.out, e.settings)
    try:
        measure_real(e)
    except UserError:
        if new and processes().is_main_process:
            shutil.rmtree(config.out)
        raise
    e.make(e.picture_set("pictures", e.captions), config.guidance, "sampling")
    if e.cases:
        e.make(e.picture_set("cases", [case.caption for case in e.cases]), config.guidance, "sampling cases")
    measure(e)
    if baseline:
        e.add(compare(baseline, e.results))
    best = best_guidance(e.results)
    show_samples(e, best)
    if processes().is_main_process:
        e.add([*cost_records(e, best), *left_out(e.dataset, e.train)])
        judge = e.judge.name if e.judge else "none"
        settings = e.settings | {"num": len(e.indices), "guidance": list(config.guidance), "judge": judge}
        write_results("model", config.out, settings, e.results, e.galleries)
    return summary(e.results)


def measure_real(e: Evaluation) -> None:
    """Real images: the best possible scores. Raises UserError for a judge that is hardly above chance on them."""
    e.add([e.real.blank_record(e.config.batch_size)])
    if not e.judge:
        return
    measure_alignment(e, e.embeddings(e.real), e.real.of)
    (record,) = find(e.results, "text_to_image@1", e.real.of)
    if fault := judge_fault(record):
        raise UserError(f"{fault}, so it cannot judge these; name another with --judge, or --judge none")


def measure(e: Evaluation) -> None:
    """Every number but those of real images and the cost."""
    measure_autoencoder(e)
    for source in (e.reconstructions, e.untrained, *([e.real_train] if e.bank else [])):
        measure_source(e, source)
    if e.features:
        network = e.features.network
        e.add(class_records(network.probabilities(e.features(e.real).to(e.pipe.device)), e.real.of, network.metadata))
        if not e.bank:
            record = {"metric": "frechet_distance", "of": "real train", "value": None, "n": 0, "note": e.train_note}
            e.add([record], **network.metadata)
    if e.cases:
        images = arrays(e.untrained)
        right = [check(x, case.required) for x, case in zip(images, e.cases, strict=False)]
        e.add([compositional_record(right, e.cases[: len(right)], "untrained")])
    for g, source in e.samples.items():
        measure_source(e, source, **e.about(g))
        if e.cases:
            measure_cases(e, g)
    best = best_guidance(e.results)
    if e.judge:
        texts, same = e.texts(e.captions).roll(1, 0), e.same.roll((1, 1), (0, 1))
        for source, fields in e.sources(best):
            of = f"{source.of}, shuffled captions"
            e.add(alignment_records(e.embeddings(source), texts, same, of, e.judge.metadata), **fields)
        for probe in (robustness, groups, combinations):
            probe(e, best)
    if e.features and e.bank:
        memorization(e, best)


def measure_source(e: Evaluation, source: Pictures, **fields: Any) -> None:
    """Blank images, distances to the real images, and alignment; of real training images, no alignment."""
    e.add([source.blank_record(e.config.batch_size)], **fields)
    if e.features:
        e.add(distance_records(e.features, source, e.real, e.config.seed), **fields)
    if e.judge:
        images = e.embeddings(source)
        pair = (images, e.embeddings(e.real), source.of, e.judge.metadata, e.config.seed)
        e.add([cmmd_record(*pair)], **fields)
        # of a judge's few dimensions a Frechet distance is hardly biased, and can be extrapolated
        e.add([r | {"metric": f"judge_{r['metric']}"} for r in frechet_records(*pair)], **fields)
        if source.of != "real train":
            measure_alignment(e, images, source.of, **fields)


def measure_alignment(e: Evaluation, images: Tensor, of: str, **fields: Any) -> None:
    """Alignment of embedded images with the held-out captions, and with the attributes that these name."""
    e.add(alignment_records(images, e.texts(e.captions), e.same, of, e.judge.metadata), **fields)
    for attribute in ATTRIBUTES:
        shares, _ = paired(images, e.captions, e.texts, attribute)
        if len(shares):
            e.add([mean_record(f"paired {attribute.name}", of, shares, chance=0.5)], **e.judge.metadata, **fields)


def measure_autoencoder(e: Evaluation) -> None:
    """How near reconstructions are to the held-out images; on shapes, what the exact checker sees in either."""
    x, y = (to_float(torch.cat([*source.batches(e.config.batch_size)])) for source in (e.real, e.reconstructions))
    for metric, values in (("psnr_db", psnr(x, y)), ("ssim", ssim(x, y))):
        e.add([mean_record(metric, "reconstructions", values, latent="mean")])
    if e.cases:
        scenes = [e.dataset.scene(i) for i in e.indices]
        e.add(scene_record(arrays(source), scenes, source.of) for source in (e.real, e.reconstructions))


def measure_cases(e: Evaluation, g: float) -> None:
    """Whether the images of the cases show their captions, and those of other cases, by the exact checker."""
    images, scenes = arrays(e.case_samples[g]), [case.required for case in e.cases]
    for of, cases in (("samples", e.cases), (SHUFFLED, e.cases[1:] + e.cases[:1])):
        right = [check(x, case.required) for x, case in zip(images, cases, strict=True)]
        e.add([compositional_record(right, cases, of)], **e.about(g))
    e.add([scene_record(images, scenes, "samples")], **e.about(g))


def compositional_record(right: list[bool], cases: list[Case], of: str) -> Record:
    """How many cases are right by task and half; "interval" is that of the mean over all."""
    intervals = {t: {half: mean_interval(r) for half, r in row.items()} for t, row in halves(right, cases).items()}
    base = {"metric": "compositional_score", "of": of, "value": tally(right, cases), "n": len(right)}
    return base | {"interval": intervals["mean"]["all"], "intervals": intervals}


def scene_record(images: list[np.ndarray], scenes: list[Scene], of: str) -> Record:
    """How many images (H, W, 3) are right in each aspect of their scene."""
    right = by_aspect(images, scenes)
    value = {aspect: float(np.mean(each)) for aspect, each in right.items()}
    intervals = {aspect: mean_interval(each) for aspect, each in right.items()}
    return {"metric": "scene_accuracy", "of": of, "value": value, "interval": intervals, "n": len(images)}


def arrays(pictures: Pictures) -> list[np.ndarray]:
    """Images as the exact checker reads them, (H, W, 3)."""
    return [pictures.read(i).permute(1, 2, 0).numpy() for i in range(pictures.count)]


def show_samples(e: Evaluation, g: float) -> None:
    """The first prompts at every guidance, reconstructions, and the cases that failed, with what the checker sees."""
    for i in range(min(SHOWN, len(e.captions))):
        real = ("real", e.real.read(i))
        samples = [(f"{scale:g}", source.read(i)) for scale, source in e.samples.items()]
        e.show("prompts", Row(caption=e.captions[i], pictures=[real, *samples]))
        e.show("reconstructions", Row(pictures=[real, ("decoded", e.reconstructions.read(i))]))
    images = arrays(e.case_samples[g]) if e.cases else []
    for i, (case, image) in enumerate(zip(e.cases, images, strict=True)):
        if not check(image, case.required):
            things = [" ".join(filter(None, (t.size, t.colour, t.shape))) for t in parse(image)]
            note = f"{case.task}{', held-out' if case.held_out else ''}; seen: {', '.join(things) or 'nothing'}"
            e.show("failures", Row(caption=case.caption, pictures=[("", e.case_samples[g].read(i))], note=note))


def summary(results: list[Record]) -> list[str]:
    """The headline numbers at the best guidance, one per line."""
    g = best_guidance(results)
    lines = [f"best guidance: {g:g}"]
    for name, metric, of in (
        ("Frechet distance", "frechet_distance", "real train"),
        ("cosine with the caption", "clip_cosine", "real held-out"),
        ("right caption found", "image_to_text@1", "real held-out"),
    ):
        for r in find(results, metric, "samples", guidance=g):
            real = "".join(f", real pictures {x['value']:.3g}" for x in find(results, metric, of))
            low, high = r["interval"]
            lines.append(f"{name} ({r['extractor']}, N={r['n']}): {r['value']:.3g} [{low:.3g}, {high:.3g}]{real}")
    for r in find(results, "compositional_score", "samples", guidance=g):
        mean = r["value"]["mean"]
        held_out = f", held-out {mean['held_out']:.1%}" if "held_out" in mean else ""
        lines.append(f"compositional score (N={r['n']}): {mean['all']:.1%}{held_out}")
    failed = [r for r in results if r["metric"] in ("blank_pictures", "left_out") and r["value"]]
    lines += [f"{r['metric'].replace('_', ' ')}: {r['value']} of {r['n']} {named(r)}" for r in failed]
    return [*lines, *biases(results)]
