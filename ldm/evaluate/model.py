"""Measuring a model on held-out captions. Images are sampled once and kept; every number is computed from them."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from ldm.config import UserError
from ldm.diffusion import Denoiser, Schedule, guided
from ldm.distributed import processes
from ldm.evaluate.config import EvaluateConfig
from ldm.evaluate.evaluation import ModelEvaluation, Questions
from ldm.evaluate.pictures import Pictures
from ldm.evaluate.probes import SHOWN, probe
from ldm.evaluate.records import (
    SHUFFLED,
    Record,
    best_guidance,
    blank_record,
    criterion,
    find,
    judge_fault,
    left_out,
    mean_record,
    ratio,
    record,
)
from ldm.images import to_float
from ldm.metrics import psnr, ssim
from ldm.metrics.attributes import ATTRIBUTES, paired
from ldm.metrics.compositional import Case, by_aspect, check, halves, tally
from ldm.metrics.compositional_parse import parse
from ldm.metrics.intervals import mean_interval
from ldm.model_io import read_json
from ldm.samplers import get_sampler, make_grid

HEADLINES = ("frechet_distance", "clip_cosine", "image_to_text@1", "mean_kind_image_to_text@1", "compositional_score")
# settings that a folder is for; the same weights under another path are the same model
CLAIMED = ("model_sha256", "dtype", "data", "data_sha256", "split", "size", "seed")
CLAIMED += ("guidance_rescale", "steps", "sampler")
SHARED = ("data_sha256", "split", "size", "num", "seed")  # settings that determine the held-out captions
TIMED = 8  # images


def evaluate(config: EvaluateConfig) -> list[str]:
    """Samples the images that are missing in `config.out`, measures, writes metrics.json and report.html there.

    Several processes (`accelerate launch`) share images and features. Returns the headline numbers, one per line.
    Raises UserError for wrong settings, too few images, or images of other settings; nothing is written then.
    """
    e, new = ModelEvaluation(config), not config.out.exists()
    baseline = read_baseline(config.baseline, e) if config.baseline else None
    e.claim(*CLAIMED)
    try:
        measure_real(e)
    except UserError:
        if new and processes().is_main_process:
            shutil.rmtree(config.out)
        raise
    measure_bounds(e)
    choice = choose_guidance(e)
    e.guidance = best = choice["value"]
    if not find(e.results, "blank_pictures", "samples"):
        measure_samples(e, e.test, best)
    measure_curve(e)
    points = {"validation samples", *(asked.of for asked in e.curve)}
    for r in e.results:
        if r["of"] in points or r.get("guidance", best) != best:
            r["curve"] = True  # no result, but a point of the curve over guidance or over model passes
    probe(e)
    if baseline:
        e.add(*compare(baseline, e.results, best))
    show_samples(e)
    if processes().is_main_process:
        e.add(*cost_records(e), *left_out(e.test.dataset, e.train))
    e.settings |= {"guidance_choice": choice, "compiled": e.pipe.compiled}
    line = f"guidance: {best:g}{', the first that was named' if len(choice['values']) > 1 else ''}"
    if choice["split"]:
        line = f"best guidance: {best:g}, chosen on {choice['split']} by {choice['criterion'].replace('_', ' ')}"
    sources = ("real held-out", "real held-out, shuffled captions", "real train", f"samples at {best:g}")
    return [line, *e.finish("model", sources, HEADLINES)]


def measure_real(e: ModelEvaluation) -> None:
    """Real images: the best possible scores. Raises UserError for a judge that is hardly above chance on them."""
    real = e.test.real
    e.add(blank_record(real, e.config.batch_size))
    if e.features:
        e.add(*e.features.classes(real))
        if not e.bank:
            e.add(record("frechet_distance", None, e.real_train, note=e.train_note, **e.features.metadata))
    if e.judge:
        measure_alignment(e, e.test, real)
        (retrieval,) = find(e.results, "text_to_image@1", real.of)
        if fault := judge_fault(retrieval):
            raise UserError(f"{fault}, so it cannot judge these; name another with --judge, or --judge none")


def measure_bounds(e: ModelEvaluation) -> None:
    """What bounds samples: reconstructions, an untrained model, training images."""
    real, decoded = e.test.real, e.reconstructions
    x, y = (to_float(source.batch(0, source.count)) for source in (real, decoded))
    e.add(*(mean_record(name, f(x, y), decoded, latent="mean") for name, f in (("psnr_db", psnr), ("ssim", ssim))))
    for source in (decoded, e.untrained, *([e.real_train] if e.bank else [])):
        measure_source(e, e.test, source)
    if e.test.cases:
        scenes = [e.test.dataset.scene(i) for i in e.test.indices]
        e.add(*(mean_record("scene_accuracy", by_aspect(arrays(source), scenes), source) for source in (real, decoded)))
        e.add(compositional_record(e.untrained, e.test.cases))


def choose_guidance(e: ModelEvaluation) -> dict[str, Any]:
    """The guidance to report, and how it was chosen: among several by the first criterion that is measured, on the
    validation split, or on the reported captions where that was asked for or there is no other split."""
    values = list(e.config.guidance)
    asked, split = (e.validation, "val") if e.validation else (e.test, e.config.split)
    choice = {"values": values, "value": values[0], "split": None, "note": e.validation_note}
    for g in values if len(values) > 1 else ():
        measure_samples(e, asked, g)
    if len(values) == 1 or e.config.choose_on == "none":
        return choice
    metric, value = criterion(e.results, asked.of), best_guidance(e.results, asked.of)
    n = len(asked.cases if metric == "compositional_score" else asked.captions)
    return choice | {"value": value, "split": split, "criterion": metric, "n": n, "times": asked.times}


def measure_samples(e: ModelEvaluation, asked: Questions, g: float) -> None:
    """Samples at one guidance: of captions, and of cases for the exact checker."""
    measure_source(e, asked, e.sample(asked, g))
    if cases := asked.cases:
        source = e.sample(asked.about_cases, g)
        e.add(compositional_record(source, cases))
        if asked is e.test:
            e.add(compositional_record(source, [*cases[1:], *cases[:1]], of=SHUFFLED))
            aspects = by_aspect(arrays(source), [case.required for case in cases])
            e.add(mean_record("scene_accuracy", aspects, source))


def measure_curve(e: ModelEvaluation) -> None:
    """Quality against model passes: samples by every further sampler and number of steps, and the passes of all."""
    for asked in e.curve:
        measure_samples(e, asked, e.guidance)
    for asked in (e.test, *e.curve) if e.curve else ():
        source = e.sample(asked, e.guidance)
        e.add(record("model_passes", count_passes(e.pipe.schedule, **source.labels), source))


def count_passes(schedule: Schedule, *, sampler: str, steps: int, guidance: float, **_: Any) -> int:
    """How often each picture passes through the U-Net, counted without one: with guidance every call takes it twice,
    and some samplers call more often than once per step."""
    nothing, grid, passes = torch.zeros(1, 1, 1, 1), make_grid(schedule, sampler, steps), []

    def predict(z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        passes.append(len(z_t))
        return z_t

    denoise = guided(Denoiser(predict, grid.schedule), nothing, nothing, guidance)
    get_sampler(sampler)(denoise, nothing, grid, lambda: nothing)
    return sum(passes)


def measure_source(e: ModelEvaluation, asked: Questions, source: Pictures) -> None:
    """Blank images, distances to the real images, and alignment; of real training images, no alignment."""
    e.add(blank_record(source, e.config.batch_size))
    if e.features:
        e.add(*e.features.distances(source, asked.real))
    if e.judge:
        # of a judge's few dimensions a Frechet distance is hardly biased, and can be extrapolated
        e.add(*e.judge.frechet(source, asked.real, "judge_"), e.judge.cmmd(source, asked.real))
        if source is not e.real_train:
            measure_alignment(e, asked, source)


def measure_alignment(e: ModelEvaluation, asked: Questions, source: Pictures) -> None:
    """Alignment of images with their captions, and with the attributes that these name."""
    e.add(*e.judge.alignment(source, asked.captions, asked.same))
    for attribute in ATTRIBUTES:
        shares, rows = paired(e.judge(source), asked.captions, e.judge.texts, attribute)
        if rows:
            e.add(e.judge.mean(f"paired {attribute.name}", shares, source.rows(rows), chance=0.5))


def compositional_record(source: Pictures, cases: Sequence[Case], **fields: str) -> Record:
    """How many of the cases the images meet, by the exact checker, by task and half; "interval" is that of the mean
    over all."""
    right = [check(x, case.required) for x, case in zip(arrays(source), cases, strict=False)]
    cases = cases[: len(right)]
    intervals = {t: {half: mean_interval(r) for half, r in row.items()} for t, row in halves(right, cases).items()}
    fields = {"n": len(right), "intervals": intervals} | fields
    return record("compositional_score", tally(right, cases), source, intervals["mean"]["all"], **fields)


def arrays(source: Pictures) -> np.ndarray:
    """Images as the exact checker reads them, (N, H, W, 3)."""
    return source.batch(0, source.count).permute(0, 2, 3, 1).numpy()


def show_samples(e: ModelEvaluation) -> None:
    """The first prompts at every guidance, reconstructions, and the cases that failed, with what the checker sees."""
    scales = [r["guidance"] for r in find(e.results, "blank_pictures", "samples")]
    for i, caption in enumerate(e.test.captions[:SHOWN]):
        real = ("real", e.test.real.read(i))
        e.show("prompts", [real, *((f"{scale:g}", e.sample(e.test, scale).read(i)) for scale in scales)], caption)
        e.show("reconstructions", [real, ("decoded", e.reconstructions.read(i))])
    images = arrays(e.sample(e.test.about_cases, e.guidance)) if e.test.cases else ()
    for image, case in zip(images, e.test.cases, strict=True):
        if not check(image, case.required):
            things = [" ".join(filter(None, (t.size, t.colour, t.shape))) for t in parse(image)]
            note = f"{case.task}{', held-out' if case.held_out else ''}; seen: {', '.join(things) or 'nothing'}"
            e.show("failures", [("", torch.from_numpy(image).permute(2, 0, 1))], case.caption, note)


def read_baseline(folder: str, e: ModelEvaluation) -> dict:
    """metrics.json of an evaluation. Raises UserError where its numbers do not compare with those of `e`."""
    table = read_json(Path(folder) / "metrics.json")
    try:
        pairs = [(key, table["settings"][key], e.settings[key]) for key in SHARED]
        resizes = {r["extractor_sha256"]: r["resize"] for r in table["results"] if "extractor_sha256" in r}
        best_guidance(table["results"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder!r} holds no evaluation of a model by this version") from None
    for m in (each.metadata for each in (e.features, e.judge) if each):
        old = resizes.get(m["extractor_sha256"], "not measured")
        pairs.append((f"pictures for {m['extractor']} {m['extractor_sha256'][:8]}", old, m["resize"]))
    for key, old, new in pairs:
        if old != new:
            raise UserError(f"{folder!r} does not compare: {key} {old}, here {new}; measure both alike")
    return table


def compare(baseline: dict, results: list[Record], g: float) -> list[Record]:
    """For each number of the samples at the reported guidance: the baseline's at its own, `ours`, and the ratio."""
    settings, theirs = baseline["settings"], baseline["results"]
    # older evaluations chose it on the reported split
    choice = settings.get("guidance_choice") or {"value": best_guidance(theirs), "split": settings["split"]}
    ours, theirs = _comparable(results, g), _comparable(theirs, choice["value"])
    fields = {"of": "baseline", "model": settings["model"], "chosen_on": choice["split"]}
    pairs = [(ours[metric], r) for metric, r in theirs.items() if metric in ours]
    return [r | fields | {"ours": mine["value"], "ratio": ratio(mine, r)} for mine, r in pairs]


def _comparable(results: list[Record], g: float) -> dict[str, Record]:
    """By metric, the numbers of features of all samples at one guidance."""
    samples = [r for r in results if (r["of"], r.get("guidance")) == ("samples", g) and "extractor" in r]
    parts = {"group", "bank", "kind"}
    return {r["metric"]: r for r in samples if isinstance(r["value"], float) and not parts & {*r}}


def cost_records(e: ModelEvaluation) -> list[Record]:
    """Seconds and bytes per image, in a batch after a first one to warm up, parameters, and seconds along the curve.

    Memory is what the batch takes on a GPU beyond weights and all else, shared by its images, and None on a CPU;
    `peak` is the most that torch held on the GPU, on a CPU what the process holds.
    """
    captions, device, source = e.test.captions[:TIMED], e.pipe.device, e.sources[1]
    n, gpu = len(captions), device.type == "cuda"
    fields = {"n": n, "device": str(device), "threads": torch.get_num_threads()}

    def timed(asked: Questions, **labels: bool) -> Record:
        made, start = e.sample(asked, e.guidance), time.perf_counter()
        e.pipe(captions, batch_size=n, **made.labels)
        return record("seconds_per_picture", (time.perf_counter() - start) / n, made, **fields, **labels)

    timed(e.test)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before, seconds = torch.cuda.memory_allocated(device) if gpu else 0, timed(e.test)
    peak = torch.cuda.max_memory_allocated(device) if gpu else psutil.Process().memory_info().rss
    memory = (peak - before) / n if gpu else None
    return [
        seconds,
        record("parameters", sum(e.settings["parameters"].values()), source, **fields),
        record("memory_per_picture_bytes", memory, source, peak=peak, **fields),
        *(timed(asked, curve=True) for asked in e.curve),
    ]
