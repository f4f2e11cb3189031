"""Measuring a model on held-out captions. Images are sampled once and kept; every number is computed from them."""

import shutil

import numpy as np
import torch
from torch import Tensor

from ldm import model_io
from ldm.config import UserError
from ldm.distributed import processes
from ldm.evaluate.baseline import compare, read_baseline
from ldm.evaluate.config import EvaluateConfig
from ldm.evaluate.cost import cost_records
from ldm.evaluate.evaluation import Evaluation, to_arrays
from ldm.evaluate.gallery import galleries
from ldm.evaluate.pictures import Pictures, claim
from ldm.evaluate.probes import combinations, groups, memorization, robustness
from ldm.evaluate.records import (
    SHUFFLED,
    Record,
    alignment_records,
    best_guidance,
    biases,
    class_records,
    cmmd_record,
    find,
    frechet_records,
    judge_fault,
    left_out,
    mean_record,
    named,
    picture_records,
)
from ldm.evaluate.report import check_installed, write_report
from ldm.images import to_float
from ldm.metrics import psnr, ssim
from ldm.metrics.attributes import ATTRIBUTES, paired
from ldm.metrics.compositional import Case, by_aspect, check, halves, tally
from ldm.metrics.intervals import mean_interval

FORMAT = "ldm-evaluation-2"


def evaluate(config: EvaluateConfig) -> list[str]:
    """Samples the images that are missing in `config.out`, measures, writes metrics.json and report.html there.

    Several processes (`accelerate launch`) share images and features. Returns the headline numbers, one per line. Raises
    UserError for wrong settings, too few images, or a folder with images of other settings; nothing is written then.
    """
    check_installed()
    e = Evaluation(config)
    baseline = read_baseline(config.baseline, e) if config.baseline else None
    new = not e.out.exists()
    claim(e.out, e.settings)
    try:
        ceiling = judged_real(e)
    except UserError:
        if new and processes().is_main_process:
            shutil.rmtree(e.out)
        raise
    e.make([e.sampled, *([e.sampled_cases] if e.cases else [])], e.guidance)
    results = [e.real.blank_record(config.batch_size), *ceiling, *measure(e)]
    if baseline:
        results += compare(baseline, results)
    if processes().is_main_process:
        results += [*cost_records(e, best_guidance(results)), *left_out(e.dataset, e.train)]
        judge = e.judge.name if e.judge else "none"
        settings = e.settings | {"num": len(e.indices), "guidance": list(e.guidance), "judge": judge}
        model_io.write_json(e.out / "metrics.json", {"format": FORMAT, "settings": settings, "results": results})
        write_report("model", e.out, settings, results, galleries(e, results))
    return summary(results)


def measure(e: Evaluation) -> list[Record]:
    """Every number but those of real images and the cost."""
    results = [*autoencoder_records(e)]
    for source in (e.reconstructions, e.untrained, *([e.real_train] if e.bank else [])):
        results += source_records(e, source)
    if e.features:
        network = e.features.network
        results += class_records(network.probabilities(e.features(e.real).to(e.pipe.device)), e.real.of, network.about)
        if not e.bank:
            record = {"metric": "frechet_distance", "of": "real train", "value": None, "n": 0, "note": e.train_note}
            results.append(record | network.about)
    if e.cases:
        untrained = to_arrays(e.untrained.read(i) for i in range(min(len(e.cases), e.untrained.count)))
        right = [check(x, case.required) for x, case in zip(untrained, e.cases, strict=False)]
        results.append(compositional_record(right, e.cases[: len(right)], "untrained"))
    for g, source in e.samples.items():
        records = source_records(e, source) + (case_records(e, g) if e.cases else [])
        results += [record | {"guidance": g, **e.about} for record in records]
    best = best_guidance(results)
    if e.judge:
        for source, fields in e.sources(best):
            texts, same = e.texts(e.captions).roll(1, 0), e.same.roll((1, 1), (0, 1))
            of = f"{source.of}, shuffled captions"
            results += [r | fields for r in alignment_records(e.embeddings(source), texts, same, of, e.judge.about)]
        for probe in (robustness, groups, combinations):
            results += probe(e, best)
    return results + (memorization(e, best) if e.features and e.bank else [])


def source_records(e: Evaluation, source: Pictures) -> list[Record]:
    """Blank images, distances to the real images, and alignment; of real training images, no alignment."""
    records, seed = [source.blank_record(e.config.batch_size)], e.config.seed
    if e.features:
        network, x = e.features.network, e.features(source)
        for compute in (frechet_records, picture_records):
            records += compute(x, e.features(e.real), source.of, network.about, seed)
        records += class_records(network.probabilities(x.to(e.pipe.device)), source.of, network.about)
    if e.judge:
        pair = e.embeddings(source), e.embeddings(e.real)
        records.append(cmmd_record(*pair, source.of, e.judge.about, seed))
        # of a judge's few dimensions a Frechet distance is hardly biased, and can be extrapolated
        frechet = frechet_records(*pair, source.of, e.judge.about, seed)
        records += [record | {"metric": f"judge_{record['metric']}"} for record in frechet]
        if source is not e.real_train:
            records += judged(e, pair[0], source.of)
    return records


def judged(e: Evaluation, images: Tensor, of: str) -> list[Record]:
    """Alignment of embedded images with the held-out captions, and with the attributes that these name."""
    about, texts = e.judge.about, e.texts(e.captions)
    records = [*alignment_records(images, texts, e.same, of, about, e.config.seed)]
    for attribute in ATTRIBUTES:
        shares, _ = paired(images, e.captions, e.texts, attribute)
        if len(shares):
            records.append(mean_record(f"paired {attribute.name}", of, shares, chance=0.5, **about))
    return records


def judged_real(e: Evaluation) -> list[Record]:
    """The judge on real images: the score of the best possible model. Raises UserError where it is hardly above chance."""
    if not e.judge:
        return []
    records = judged(e, e.embeddings(e.real), e.real.of)
    (record,) = find(records, "text_to_image@1", e.real.of)
    if fault := judge_fault(record):
        raise UserError(f"{fault}, so it cannot judge these; name another with --judge, or --judge none")
    return records


def autoencoder_records(e: Evaluation) -> list[Record]:
    """How near reconstructions are to the held-out images; on shapes, what the exact checker sees in either."""
    x, y = to_float(torch.cat([*e.real.batches(e.config.batch_size)])), to_float(e.reconstructed)
    records = [mean_record(m.__name__, "reconstructions", m(x, y), latent="mean") for m in (psnr, ssim)]
    records[0]["metric"] = "psnr_db"
    if e.cases:
        scenes = [e.dataset.scene(i) for i in e.indices]
        for source in (e.real, e.reconstructions):
            records.append(scene_record(to_arrays(map(source.read, range(source.count))), scenes, source.of))
    return records


def case_records(e: Evaluation, g: float) -> list[Record]:
    """Whether the images of the cases show their captions, and those of other cases, by the exact checker."""
    images, others = e.case_arrays(g), e.cases[1:] + e.cases[:1]
    by_chance = [check(x, case.required) for x, case in zip(images, others, strict=True)]
    records = [compositional_record(by_chance, others, SHUFFLED), compositional_record(e.right[g], e.cases, "samples")]
    return [*records, scene_record(images, [case.required for case in e.cases], "samples")]


def compositional_record(right: list[bool], cases: list[Case], of: str) -> Record:
    """How many cases are right by task and half; "interval" is that of the mean over all."""
    intervals = {t: {half: mean_interval(r) for half, r in row.items()} for t, row in halves(right, cases).items()}
    base = {"metric": "compositional_score", "of": of, "value": tally(right, cases), "n": len(right)}
    return base | {"interval": intervals["mean"]["all"], "intervals": intervals}


def scene_record(images: list[np.ndarray], scenes: list, of: str) -> Record:
    """How many images (H, W, 3) are right in each aspect of their scene."""
    right = by_aspect(images, scenes)
    value = {aspect: float(np.mean(each)) for aspect, each in right.items()}
    intervals = {aspect: mean_interval(each) for aspect, each in right.items()}
    return {"metric": "scene_accuracy", "of": of, "value": value, "interval": intervals, "n": len(images)}


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
