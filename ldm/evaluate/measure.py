"""What an evaluation measures of a model: quality, alignment, and on shapes what the exact checker sees.

A further metric is one function that yields records, called in `measure`, and a section of the report.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.config import UserError
from ldm.distributed import processes
from ldm.evaluate.bench import Bench, Measured, Source, blank_record, left_out
from ldm.evaluate.cost import efficiency
from ldm.evaluate.extras import combinations, groups, memorization, robustness
from ldm.evaluate.records import (
    Record,
    alignment_records,
    best_guidance,
    class_records,
    cmmd_record,
    find,
    frechet_records,
    mean_record,
    picture_records,
)
from ldm.evaluate.shapes import compositional, scene_record, untrained_cases
from ldm.images import to_float, to_pil, to_uint8
from ldm.metrics import psnr, ssim
from ldm.metrics.attributes import ATTRIBUTES, paired
from ldm.pipeline import Pipeline

KEPT = 12  # reconstructions for the report
FAR = 5.0  # times chance that a judge must find the right picture of a real caption: that, and LEAST; MOST is enough
LEAST, MOST = 0.1, 0.5
KINDS = {"real held-out": "real ", "reference": "reference "}


def measure(bench: Bench) -> Measured:
    """Every number, each part with a progress bar; UserError for a damaged picture or a judge that knows nothing."""
    measured = Measured()
    measured.results.append(blank_record(bench.real(), bench.batch_size))
    if bench.judge:
        measured.results += ceiling(bench)
    if bench.extractor:
        classes = bench.extractor.probabilities(bench.features(bench.real()).to(bench.pipe.device))
        measured.results += class_records(classes, "real held-out", bench.extractor.about)
    references = [_autoencoder(bench, measured), bench.untrained()]
    if bench.train is not None:
        references.append(bench.real_train())
    elif bench.extractor:
        record = {"metric": "frechet_distance", "of": "real train", "value": None, "n": 0}
        measured.results.append(record | {"note": bench.train_note, **bench.extractor.about})
    for source in references:
        measured.results += _pictures(bench, source, {})
    if bench.cases:
        measured.results.append(untrained_cases(bench))
    for g in bench.guidance:
        measured.results += _pictures(bench, bench.samples(g), {"guidance": g, **bench.about})
        if bench.cases:
            compositional(bench, measured, g)
    best = best_guidance(measured.results)
    if bench.judge:
        measured.results += _shuffled(bench, best)
        robustness(bench, measured, best)
        groups(bench, measured, best)
        combinations(bench, measured, best)
    if bench.extractor and bench.train is not None:
        memorization(bench, measured, best)
    if processes().is_main_process:  # in the others nothing is written
        measured.results += efficiency(bench, best) + left_out(bench.dataset, bench.train)
    return measured


def _pictures(bench: Bench, source: Source, about: Record) -> list[Record]:
    """What is measured of any pictures for the held-out captions; of real training pictures, quality alone."""
    found = [blank_record(source, bench.batch_size) | about]
    seed = bench.settings["seed"]
    if bench.extractor:
        features, real = bench.features(source), bench.features(bench.real())
        for records in (frechet_records, picture_records):
            found += [r | about for r in records(features, real, source.of, bench.extractor.about, seed)]
        classes = bench.extractor.probabilities(features.to(bench.pipe.device))
        found += [r | about for r in class_records(classes, source.of, bench.extractor.about)]
    if bench.judge:
        images, real = bench.embeddings(source), bench.embeddings(bench.real())
        found.append(cmmd_record(images, real, source.of, bench.judge.about, seed) | about)
        # of a judge's few dimensions a Frechet distance is hardly biased, and can be extrapolated
        for r in frechet_records(images, real, source.of, bench.judge.about, seed):
            found.append(r | about | {"metric": f"judge_{r['metric']}"})
        if source.of != "real train":
            found += [r | about for r in _alignment(bench, images, source.of)]
    return found


def _alignment(bench: Bench, images: Tensor, of: str) -> list[Record]:
    seed = bench.settings["seed"]
    texts = bench.texts(bench.captions)
    found = list(alignment_records(images, texts, bench.same(), of, bench.judge.about, seed))
    for attribute in ATTRIBUTES:
        shares, _ = paired(images, bench.captions, bench.texts, attribute)
        if len(shares):
            found.append(mean_record(f"paired {attribute.name}", of, shares, chance=0.5, **bench.judge.about))
    return found


def ceiling(bench: Bench) -> list[Record]:
    """The judge on real pictures, as the best model would score; UserError where it tells hardly more than chance."""
    real = bench.real()
    found = _alignment(bench, bench.embeddings(real), real.of)
    (record,) = find(found, "text_to_image@1", real.of)
    if complaint := knows_little(record):
        raise UserError(f"{complaint}, so it cannot judge these; name another with --judge, or --judge none")
    return found


def knows_little(record: Record) -> str:
    """What is wrong with a judge whose "text_to_image@1" of real pictures is `record`; "" where it beats chance far."""
    least = min(max(FAR * record["chance"], LEAST), MOST)
    if record["value"] >= least:
        return ""
    kind = KINDS.get(record["of"], "")
    return (
        f"judge {record['extractor']!r} finds the right one of {record['n']} {kind}pictures for a caption in"
        f" {record['value']:.1%} (chance {record['chance']:.1%}, {least:.1%} needed)"
    )


def _shuffled(bench: Bench, g: float) -> list[Record]:
    """Pictures with the captions of others: what an alignment that means nothing looks like."""
    found = []
    for source, about in ((bench.real(), {}), (bench.samples(g), {"guidance": g, **bench.about})):
        texts, same = bench.texts(bench.captions).roll(1, 0), bench.same().roll((1, 1), (0, 1))
        of = f"{source.of}, shuffled captions"
        records = alignment_records(bench.embeddings(source), texts, same, of, bench.judge.about)
        found += [r | about for r in records]
    return found


def _autoencoder(bench: Bench, measured: Measured) -> Source:
    """The autoencoder alone, through the mean of its latent, on held-out pictures; gives what it decoded."""
    quality: dict[str, list[Tensor]] = {"psnr_db": [], "ssim": []}
    decoded = []
    real = bench.real()
    total = -(-bench.n // bench.batch_size)
    for pixels in tqdm(real.batches(bench.batch_size), desc="autoencoder", total=total, unit="batch", leave=False):
        x = to_float(pixels)
        y = reconstruct(bench.pipe, x)
        quality["psnr_db"].append(psnr(x, y))
        quality["ssim"].append(ssim(x, y))
        measured.reconstructions += list(zip(to_pil(x), to_pil(y), strict=True))[: KEPT - len(measured.reconstructions)]
        decoded.append(to_uint8(y))
    for metric, values in quality.items():
        measured.results.append(mean_record(metric, "reconstructions", torch.cat(values), latent="mean"))
    pictures = torch.cat(decoded)
    if bench.cases:
        scenes = [bench.dataset.scene(i) for i in bench.indices]
        for of, images in ((real.of, torch.cat(list(real.batches(bench.n)))), ("reconstructions", pictures)):
            measured.results.append(scene_record(images, scenes, of))
    return Source(of="reconstructions", count=bench.n, get=pictures.__getitem__)


@torch.no_grad()
def reconstruct(pipe: Pipeline, x: Tensor) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> decoded from the mean of its latent, rounded to 256 levels as a file would be."""
    vae = pipe.vae
    y = vae.decode(vae.normalize(vae.encode(x.to(pipe.device)).mean))
    return to_float(to_uint8(y)).cpu()
