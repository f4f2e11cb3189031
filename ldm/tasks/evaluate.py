"""Measuring a model on held-out captions. Pictures are made once and kept; every number is computed from them."""

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm import weights
from ldm.cli import find_device
from ldm.config import UserError
from ldm.data import DataConfig, open_dataset
from ldm.data.latents import data_hash, vae_hash
from ldm.metrics.compositional import TASKS, Case, cases
from ldm.metrics.compositional_parse import parse
from ldm.metrics.features import feature_extractor
from ldm.metrics.report import best_guidance, find, write_report
from ldm.metrics.report_html import Gallery, Row
from ldm.pipeline import Pipeline
from ldm.samplers import make_grid
from ldm.tasks.evaluate_measure import Bench, Measured, measure
from ldm.tasks.evaluate_pictures import PictureSet, claim, generate

FEWEST = 16  # pictures; below it no number here says anything
SMALLEST = 11  # pixels a side that SSIM's window needs
FAILURES = 48  # pictures in the report


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured, and how."""

    model: str  # a shipped model's name, a run folder or a Stable Diffusion folder
    data: str  # shapes | emoji | folder | shards
    data_path: str = ""
    split: str = "test"
    num: int = 480  # held-out captions
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0)
    guidance_rescale: float = 0.0
    steps: int = 30
    sampler: str = ""  # empty: the model's own
    seed: int = 0  # picks the captions; picture i has seed + i
    batch_size: int = 32
    features: str = "effnet-lite0"  # network of the Frechet distances, or none


def evaluate(config: EvaluateConfig, out: Path, device: str = "") -> list[str]:
    """Makes the pictures that are missing in `out`, measures, writes metrics.json and report.html there.

    `device` defaults to cuda where there is one. Gives the headline numbers, a line each. UserError for wrong
    settings, too few pictures, or an `out` with pictures of other settings; nothing is written then.
    """
    bench, settings = open_bench(config, out, device)
    claim(out, settings)
    generate(bench.pipe, bench.sets.values(), config.guidance, settings, config.batch_size)
    measured = measure(bench)
    settings |= {"num": config.num, "guidance": list(config.guidance)}
    table = {"format": "ldm-evaluation-1", "settings": settings, "results": measured.results}
    weights.write_json(out / "metrics.json", table)
    write_report(out / "report.html", settings, measured.results, galleries(bench, measured))
    return summary(measured.results)


def open_bench(config: EvaluateConfig, out: Path, device: str = "") -> tuple[Bench, dict[str, Any]]:
    """Everything opened and checked, and the settings that the pictures depend on; writes nothing (UserError)."""
    check(config)
    pipe = Pipeline.from_pretrained(config.model, find_device(device))
    # refuses a sampler or steps before any work
    make_grid(pipe.schedule, config.sampler or pipe.schedule.config.sampler, config.steps)
    size = pipe.unet.config.sample_size * pipe.vae.factor
    if size < SMALLEST:
        raise UserError(f"the model makes {size} px pictures; they can be measured from {SMALLEST} px on")
    data = DataConfig(name=config.data, path=config.data_path, size=size)
    dataset = open_dataset(data, config.split)
    if config.num > len(dataset):
        raise UserError(f"--num {config.num} is too many: split {config.split!r} of {config.data} has {len(dataset)}")
    indices = sample_indices(len(dataset), config.num, config.seed)
    posed = pose(config.num, config.seed) if config.data == "shapes" else []
    extractor = None if config.features == "none" else feature_extractor(config.features).to(pipe.device)
    train, train_note = train_sample(data, config)
    settings = settings_of(config, pipe, dataset, size)
    bench = Bench(
        pipe=pipe,
        dataset=dataset,
        indices=indices,
        train=train,
        train_note=train_note,
        sets=picture_sets(out, dataset, indices, posed, config.seed),
        cases=posed,
        extractor=extractor,
        guidance=config.guidance,
        batch_size=config.batch_size,
        about={key: settings[key] for key in ("guidance_rescale", "steps", "sampler", "seed")},
    )
    return bench, settings


def picture_sets(out: Path, dataset: Any, indices: list[int], posed: list[Case], seed: int) -> dict[str, PictureSet]:
    """The captions to make pictures for: one of each held-out sample's, and those of the compositional cases."""
    captions = [random.Random(f"{seed}/{i}").choice(dataset[i]["captions"]) for i in indices]
    sets = {"pictures": PictureSet(folder=out / "pictures", captions=captions)}
    if posed:
        sets["cases"] = PictureSet(folder=out / "cases", captions=[case.caption for case in posed])
    return sets


def settings_of(config: EvaluateConfig, pipe: Pipeline, dataset: Any, size: int) -> dict[str, Any]:
    """What the pictures of a run depend on, ready for JSON."""
    return {
        "model": config.model,
        "model_sha256": model_hash(pipe),
        "parameters": {p: count(getattr(pipe, p)) for p in ("vae", "text_encoder", "unet")},
        "data": config.data,
        "data_sha256": data_hash(dataset),
        "split": config.split,
        "size": size,
        "guidance_rescale": config.guidance_rescale,
        "steps": config.steps,
        "sampler": config.sampler or pipe.schedule.config.sampler,
        "seed": config.seed,
    }


def check(config: EvaluateConfig) -> None:
    """UserError for what can be refused without opening anything."""
    if config.num < FEWEST:
        raise UserError(f"--num {config.num} is too few to measure anything; use {FEWEST} or more, best 1000")
    if config.split not in ("test", "val"):
        raise UserError(f"split {config.split!r} cannot be evaluated on: held-out captions are in 'test' or 'val'")
    if config.batch_size < 1:
        raise UserError(f"--batch-size {config.batch_size} is not allowed; use 1 or more")
    if not 0 <= config.guidance_rescale <= 1:
        raise UserError(f"--guidance-rescale {config.guidance_rescale:g} is not allowed; use a number in [0, 1]")
    names = [f"{g:g}" for g in config.guidance]
    if not names or len(set(names)) < len(names) or not all(0 <= g < float("inf") for g in config.guidance):
        raise UserError(f"--guidance {','.join(names)} is not allowed; give different numbers of 0 or more")


def sample_indices(length: int, n: int, seed: int) -> list[int]:
    """`n` of `length` indices at random; fewer are the beginning of more, so that a larger run goes on."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:n].tolist()


def pose(num: int, seed: int) -> list[Case]:
    """About `num` compositional cases, equally many of each kind, dealt in turn: fewer are the beginning of more."""
    each = num // (2 * len(TASKS)) or 1
    posed = cases(each, seed)
    return [posed[kind * each + i] for i in range(each) for kind in range(2 * len(TASKS))]


def train_sample(data: DataConfig, config: EvaluateConfig) -> tuple[Any, str]:
    """As many real training pictures as are measured, for the floor: (data set, "") or (None, why there is none)."""
    try:
        train = open_dataset(data, "train")
    except UserError as error:
        return None, str(error)
    if len(train) < config.num:
        return None, f"the training split has only {len(train)} pictures"
    indices = sample_indices(len(train), config.num, config.seed)
    return torch.utils.data.Subset(train, indices), ""


def count(model: torch.nn.Module) -> int:
    """Parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def model_hash(pipe: Pipeline) -> str:
    """SHA-256 over the weights of all parts, the vocabulary and the schedule: what a picture comes from."""
    digest = hashlib.sha256()
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        digest.update(vae_hash(part).encode())
    digest.update(json.dumps([pipe.tokenizer.vocab, asdict(pipe.schedule.config)], sort_keys=True).encode())
    return digest.hexdigest()


def summary(results: list[dict]) -> list[str]:
    """The headline numbers at the best guidance, a line each."""
    g, lines = best_guidance(results), []
    for frechet in find(results, "frechet_distance", "samples", guidance=g):
        floor = "".join(f", real pictures {r['value']:.2f}" for r in find(results, "frechet_distance", "real train"))
        lines.append(f"Frechet distance ({frechet['extractor']}, N={frechet['n']}): {frechet['value']:.2f}{floor}")
    for composed in find(results, "compositional_score", "samples", guidance=g):
        mean = composed["value"]["mean"]
        held_out = f"held-out {mean['held_out']:.1%}" if "held_out" in mean else ""
        lines.append(f"compositional score (N={composed['n']}): {mean['all']:.1%}, {held_out}")
    return [f"best guidance: {g:g}", *lines]


def galleries(bench: Bench, measured: Measured) -> list[Gallery]:
    """The pictures of the report: prompts at each guidance, reconstructions, and on shapes the failures."""
    made = bench.sets["pictures"]
    rows = []
    for i, (real, _) in enumerate(measured.reconstructions):
        samples = [(f"{g:g}", Image.fromarray(made.array(g, i))) for g in bench.guidance]
        rows.append(Row(caption=made.captions[i], pictures=[("real", real), *samples]))
    found = [Gallery(title="Prompts", about="Held-out captions: the real picture, then each guidance.", rows=rows)]
    pairs = [Row(caption="", pictures=[("real", x), ("decoded", y)]) for x, y in measured.reconstructions]
    found.append(
        Gallery(title="Reconstructions", about="What the autoencoder alone keeps of real pictures.", rows=pairs)
    )
    return found + ([failures(bench, measured)] if bench.cases else [])


def failures(bench: Bench, measured: Measured) -> Gallery:
    """The wrong pictures at the best guidance, with what the checker sees in them."""
    g = best_guidance(measured.results)
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
