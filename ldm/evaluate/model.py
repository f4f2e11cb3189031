"""Measuring a model on held-out captions. Images are sampled once and kept; every number is computed from them."""

import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

from ldm.config import UserError
from ldm.data.shapes import Scene
from ldm.distributed import processes
from ldm.evaluate.config import EvaluateConfig
from ldm.evaluate.evaluation import Evaluation
from ldm.evaluate.pictures import Pictures, claim
from ldm.evaluate.probes import SHOWN, combinations, groups, memorization, robustness
from ldm.evaluate.records import (
    SHUFFLED,
    Record,
    alignment_records,
    best_guidance,
    blank_record,
    class_records,
    cmmd_record,
    distance_records,
    find,
    frechet_records,
    headlines,
    judge_fault,
    left_out,
    mean_record,
    ratio,
    record,
)
from ldm.evaluate.report import write_results
from ldm.images import to_float
from ldm.metrics import psnr, ssim
from ldm.metrics.attributes import ATTRIBUTES, paired
from ldm.metrics.compositional import Case, by_aspect, check, halves, tally
from ldm.metrics.compositional_parse import parse
from ldm.metrics.intervals import mean_interval
from ldm.model_io import read_json

HEADLINES = ("frechet_distance", "clip_cosine", "image_to_text@1", "compositional_score")  # on the terminal
SHARED = ("data_sha256", "split", "size", "num", "seed")  # settings that determine the held-out captions
TIMED = 8  # images


def evaluate(config: EvaluateConfig) -> list[str]:
    """Samples the images that are missing in `config.out`, measures, writes metrics.json and report.html there.

    Several processes (`accelerate launch`) share images and features. Returns the headline numbers, one per line.
    Raises UserError for wrong settings, too few images, or images of other settings; nothing is written then.
    """
    e, new = Evaluation(config), not config.out.exists()
    baseline = read_baseline(config.baseline, e) if config.baseline else None
    claim(config.out, e.settings)
    try:
        measure_real(e)
    except UserError:
        if new and processes().is_main_process:
            shutil.rmtree(config.out)
        raise
    measure_samples(e)
    best = best_guidance(e.results)
    measure_best(e, best)
    if baseline:
        e.add(*compare(baseline, e.results))
    show_samples(e, best)
    if processes().is_main_process:
        e.add(*cost_records(e, best), *left_out(e.dataset, e.train))
    judge = e.judge.network.name if e.judge else "none"
    settings = e.settings | {"num": len(e.indices), "guidance": list(config.guidance), "judge": judge}
    write_results("model", config.out, settings, e.results, e.galleries)
    sources = ("real held-out", "real held-out, shuffled captions", "real train", f"samples at {best:g}")
    return [f"best guidance: {best:g}", *headlines(e.results, sources, HEADLINES)]


def measure_real(e: Evaluation) -> None:
    """Real images: the best possible scores. Raises UserError for a judge that is hardly above chance on them."""
    e.add(blank_record(e.real, e.config.batch_size))
    if e.features:
        e.add(*class_records(e.features, e.real, e.config.seed))
        if not e.bank:
            note, of = e.train_note, e.real_train.of
            e.add(record("frechet_distance", None, of=of, n=0, note=note, **e.features.metadata))
    if e.judge:
        measure_alignment(e, e.real)
        (retrieval,) = find(e.results, "text_to_image@1", e.real.of)
        if fault := judge_fault(retrieval):
            raise UserError(f"{fault}, so it cannot judge these; name another with --judge, or --judge none")


def measure_samples(e: Evaluation) -> None:
    """Samples at every guidance, and what bounds them: reconstructions, an untrained model, training images."""
    x, y = (to_float(torch.cat([*source.batches(e.config.batch_size)])) for source in (e.real, e.reconstructions))
    for metric, values in (("psnr_db", psnr(x, y)), ("ssim", ssim(x, y))):
        e.add(mean_record(metric, values, of=e.reconstructions.of, latent="mean"))
    for source in (*e.samples.values(), e.reconstructions, e.untrained, *([e.real_train] if e.bank else [])):
        measure_source(e, source)
    if e.cases:
        scenes = [e.dataset.scene(i) for i in e.indices]
        e.add(scene_record(e.real, scenes), scene_record(e.reconstructions, scenes))
        e.add(compositional_record(e.untrained, e.cases))
        for source in e.case_samples.values():
            e.add(compositional_record(source, e.cases))
            e.add(compositional_record(source, e.cases[1:] + e.cases[:1], of=SHUFFLED))
            e.add(scene_record(source, [case.required for case in e.cases]))


def measure_source(e: Evaluation, source: Pictures) -> None:
    """Blank images, distances to the real images, and alignment; of real training images, no alignment."""
    e.add(blank_record(source, e.config.batch_size))
    if e.features:
        e.add(*distance_records(e.features, source, e.real, e.config.seed))
    if e.judge:
        pair, fields = (e.judge(source), e.judge(e.real)), source.labels | {"against": e.real.of} | e.judge.metadata
        # of a judge's few dimensions a Frechet distance is hardly biased, and can be extrapolated
        e.add(*frechet_records(*pair, e.config.seed, "judge_", **fields), cmmd_record(*pair, e.config.seed, **fields))
        if source is not e.real_train:
            measure_alignment(e, source)


def measure_alignment(e: Evaluation, source: Pictures) -> None:
    """Alignment of images with the held-out captions, and with the attributes that these name."""
    images, fields = e.judge(source), source.labels | e.judge.metadata
    e.add(*alignment_records(images, e.judge.texts(e.captions), e.same, **fields))
    for attribute in ATTRIBUTES:
        shares, _ = paired(images, e.captions, e.judge.texts, attribute)
        if len(shares):
            e.add(mean_record(f"paired {attribute.name}", shares, chance=0.5, **fields))


def measure_best(e: Evaluation, g: float) -> None:
    """At the best guidance: captions of other images, and the probes."""
    if e.judge:
        texts, same = e.judge.texts(e.captions).roll(1, 0), e.same.roll((1, 1), (0, 1))
        for source in (e.real, e.samples[g]):
            fields = source.labels | e.judge.metadata | {"of": f"{source.of}, shuffled captions"}
            e.add(*alignment_records(e.judge(source), texts, same, **fields))
        for probe in (robustness, groups, combinations):
            probe(e, g)
    if e.features and e.bank:
        memorization(e, g)


def compositional_record(source: Pictures, cases: list[Case], **fields: str) -> Record:
    """How many of the cases the images meet, by the exact checker, by task and half; "interval" is that of the mean
    over all."""
    right = [check(x, case.required) for x, case in zip(arrays(source), cases, strict=False)]
    cases = cases[: len(right)]
    intervals = {t: {half: mean_interval(r) for half, r in row.items()} for t, row in halves(right, cases).items()}
    fields = source.labels | {"n": len(right), "intervals": intervals} | fields
    return record("compositional_score", tally(right, cases), intervals["mean"]["all"], **fields)


def scene_record(source: Pictures, scenes: list[Scene]) -> Record:
    """How many images are right in each aspect of their scene."""
    right = by_aspect(arrays(source), scenes)
    value = {aspect: float(np.mean(each)) for aspect, each in right.items()}
    interval = {aspect: mean_interval(each) for aspect, each in right.items()}
    return record("scene_accuracy", value, interval, n=source.count, **source.labels)


def arrays(source: Pictures) -> list[np.ndarray]:
    """Images as the exact checker reads them, (H, W, 3)."""
    return [source.read(i).permute(1, 2, 0).numpy() for i in range(source.count)]


def show_samples(e: Evaluation, g: float) -> None:
    """The first prompts at every guidance, reconstructions, and the cases that failed, with what the checker sees."""
    for i, caption in enumerate(e.captions[:SHOWN]):
        real = ("real", e.real.read(i))
        e.show("prompts", [real, *((f"{scale:g}", source.read(i)) for scale, source in e.samples.items())], caption)
        e.show("reconstructions", [real, ("decoded", e.reconstructions.read(i))])
    for i, case in enumerate(e.cases):
        pixels = e.case_samples[g].read(i)
        image = pixels.permute(1, 2, 0).numpy()
        if not check(image, case.required):
            things = [" ".join(filter(None, (t.size, t.colour, t.shape))) for t in parse(image)]
            note = f"{case.task}{', held-out' if case.held_out else ''}; seen: {', '.join(things) or 'nothing'}"
            e.show("failures", [("", pixels)], case.caption, note)


def read_baseline(folder: str, e: Evaluation) -> dict:
    """metrics.json of an evaluation. Raises UserError where its numbers do not compare with those of `e`."""
    table, now = read_json(Path(folder) / "metrics.json"), e.settings | {"num": len(e.indices)}
    try:
        pairs = [(key, table["settings"][key], now[key]) for key in SHARED]
        resizes = {r["extractor_sha256"]: r["resize"] for r in table["results"] if "extractor_sha256" in r}
        best_guidance(table["results"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder!r} holds no evaluation of a model by this version") from None
    for metadata in (each.metadata for each in (e.features, e.judge) if each):
        sha256 = metadata["extractor_sha256"]
        name = f"pictures for {metadata['extractor']} {sha256[:8]}"
        pairs.append((name, resizes.get(sha256, "not measured"), metadata["resize"]))
    for key, old, new in pairs:
        if old != new:
            raise UserError(f"{folder!r} does not compare: {key} {old}, here {new}; measure both alike")
    return table


def compare(baseline: dict, results: list[Record]) -> list[Record]:
    """For each number of the samples at the best guidance: the baseline's at its own best, `ours`, and the ratio."""
    records, others = [], _comparable(baseline["results"])
    fields = {"of": "baseline", "model": baseline["settings"]["model"]}
    for metric, r in _comparable(results).items():
        if metric in others:
            records.append(others[metric] | fields | {"ours": r["value"], "ratio": ratio(r, others[metric])})
    return records


def _comparable(results: list[Record]) -> dict[str, Record]:
    """By metric, the numbers of features of all samples at the best guidance."""
    best = best_guidance(results)
    samples = [r for r in results if r["of"] == "samples" and r.get("guidance") == best and "extractor" in r]
    return {r["metric"]: r for r in samples if isinstance(r["value"], float) and not {"group", "bank"} & {*r}}


def cost_records(e: Evaluation, g: float) -> list[Record]:
    """Seconds and bytes per image, in a batch after a first one to warm up, and parameters.

    Memory is what the batch takes on a GPU beyond weights and all else, shared by its images, and None on a CPU;
    `peak` is the most that torch held on the GPU, on a CPU what the process holds.
    """
    captions, device, source = e.captions[:TIMED], e.pipe.device, e.samples[g]
    sample, gpu = partial(e.pipe, captions, batch_size=len(captions), **source.sampling), device.type == "cuda"
    sample()
    before = torch.cuda.memory_allocated(device) if gpu else None
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    sample()
    seconds = (time.perf_counter() - start) / len(captions)
    peak = torch.cuda.max_memory_allocated(device) if gpu else psutil.Process().memory_info().rss
    fields = {"n": len(captions), **source.labels, "device": str(device), "threads": torch.get_num_threads()}
    return [
        record("seconds_per_picture", seconds, **fields),
        record("parameters", sum(e.settings["parameters"].values()), **fields),
        record("memory_per_picture_bytes", (peak - before) / len(captions) if gpu else None, peak=peak, **fields),
    ]
