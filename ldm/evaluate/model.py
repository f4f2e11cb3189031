"""Measuring a model on held-out captions. Pictures are made once and kept; every number is computed from them."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ldm import model_io as weights
from ldm.config import UserError
from ldm.data import DataConfig, open_dataset
from ldm.data.faults import readable
from ldm.data.latents import data_hash
from ldm.distributed import find_device, processes
from ldm.evaluate.baseline import against, read_baseline
from ldm.evaluate.bench import Bench, choose_caption
from ldm.evaluate.gallery import galleries
from ldm.evaluate.measure import ceiling, measure
from ldm.evaluate.pictures import PictureSet, claim, generate
from ldm.evaluate.records import Record, best_guidance, biases, find, named
from ldm.evaluate.report import write_report
from ldm.metrics.compositional import TASKS, Case, cases
from ldm.metrics.features import FeatureExtractor, feature_extractor, judged_by
from ldm.metrics.judges import JUDGES, ImageTextModel, image_text_model
from ldm.model_io import module_hash
from ldm.pipeline import Pipeline
from ldm.samplers import make_grid

FEWEST = 16  # pictures; below it no number here says anything
SMALLEST = 11  # pixels a side that SSIM's window needs
LARGEST = 4000  # pixels a side; more of a picture is not read either
USUAL = 480  # held-out captions where none are asked for by number, or all there are
FORMAT = "ldm-evaluation-2"
ALIGNED = (
    ("cosine with the caption", "clip_cosine", "real held-out"),
    ("right caption found", "image_to_text@1", "real held-out"),
)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured, and how."""

    model: str  # a shipped model's name, a run folder or a Stable Diffusion folder
    data: str  # shapes | emoji | folder | shards
    data_path: str = ""
    split: str = "test"
    num: int = 0  # held-out captions; 0: USUAL, or all where there are fewer
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 8.0)
    guidance_rescale: float = 0.0
    steps: int = 30
    sampler: str = ""  # empty: the model's own
    seed: int = 0  # picks the captions; picture i has seed + i
    batch_size: int = 32
    features: str = "effnet-lite0"  # network of the distances between sets of pictures, or none
    judge: str = ""  # image-text model; empty: the one that ships for these data, or none
    train_num: int = 10_000  # training pictures that copies are looked for among
    baseline: str = ""  # folder of an evaluation of another model on the same captions, to be compared with


def evaluate(config: EvaluateConfig, out: Path, device: str = "") -> list[str]:
    """Makes the pictures that are missing in `out`, measures, writes metrics.json and report.html there.

    `device` defaults to cuda where there is one. Several processes (`accelerate launch`) share the pictures and their
    features, in one `out`, and measure alike. Gives the headline numbers, a line each. UserError for wrong settings,
    too few pictures, or an `out` with pictures of other settings; nothing is written then.
    """
    bench = open_bench(config, out, device)
    baseline = read_baseline(config.baseline, bench) if config.baseline else None
    new = not out.exists()
    claim(out, bench.settings)
    try:
        if bench.judge:
            ceiling(bench)  # before the long work: refuses a judge that knows nothing
    except UserError:
        if new and processes().is_main_process:
            shutil.rmtree(out)
        raise
    generate(bench.pipe, bench.sets.values(), bench.guidance, bench.settings, bench.batch_size)
    measured = measure(bench)
    if baseline:
        measured.results += against(baseline, measured.results, baseline["settings"]["model"])
    judge = bench.judge.name if bench.judge else "none"
    settings = bench.settings | {"num": bench.n, "guidance": list(bench.guidance), "judge": judge}
    table = {"format": FORMAT, "settings": settings, "results": measured.results}
    if processes().is_main_process:
        weights.write_json(out / "metrics.json", table)
        write_report(out / "report.html", settings, measured.results, galleries(bench, measured))
    return summary(measured.results)


def open_bench(config: EvaluateConfig, out: Path, device: str = "") -> Bench:
    """Everything opened and checked; writes nothing (UserError)."""
    check(config)
    pipe = Pipeline.from_pretrained(config.model, find_device(device))
    # refuses a sampler or steps before any work
    make_grid(pipe.schedule, config.sampler or pipe.schedule.config.sampler, config.steps)
    size = pipe.unet.config.sample_size * pipe.vae.factor
    if size < SMALLEST:
        raise UserError(f"the model makes {size} px pictures; they can be measured from {SMALLEST} px on")
    data = trained_on(config.model, config.data, config.data_path, size)
    dataset = open_dataset(data, config.split)
    num = config.num or min(USUAL, len(dataset))
    if not FEWEST <= num <= len(dataset):
        have = f"split {config.split!r} of {config.data} has {len(dataset)}"
        raise UserError(f"--num {num} is not possible: {have}, and {FEWEST} or more are needed, best 1000")
    indices = readable(dataset, sample_indices(len(dataset), num, config.seed))
    num = len(indices)
    if num < FEWEST:
        raise UserError(f"only {num} of the held-out pictures can be read; {FEWEST} or more are needed")
    captions = [choose_caption(dataset.captions(i), config.seed, i) for i in indices]
    sets = {"pictures": PictureSet(folder=out / "pictures", captions=captions, size=size)}
    posed = pose(num, config.seed) if config.data == "shapes" else []
    if posed:
        sets["cases"] = PictureSet(folder=out / "cases", captions=[case.caption for case in posed], size=size)
    train, bank, train_note = train_sample(data, config, num)
    return Bench(
        out=out,
        pipe=pipe,
        dataset=dataset,
        indices=indices,
        train=train,
        train_note=train_note,
        bank=bank,
        sets=sets,
        cases=posed,
        extractor=open_extractor(config, pipe),
        judge=open_judge(config, pipe),
        guidance=config.guidance,
        batch_size=config.batch_size,
        settings=settings_of(config, pipe, dataset, size),
    )


def trained_on(model: str, name: str, path: str, size: int) -> DataConfig:
    """The data `name` at `path` as the model's run had them, where it tells: their length, and the seed of a split by
    captions."""
    root = weights.find_root(model)
    run = root.parent.parent if root.parent.name == "checkpoints" else root
    told = weights.read_json(run / "config.json").get("data", {}) if (run / "config.json").is_file() else {}
    keys = ("length", "seed", "max_pixels", "max_broken")
    own = {key: told[key] for key in keys if told.get("name") == name and told.get(key) is not None}
    return DataConfig(name=name, path=path, size=size, **own)


def open_extractor(config: EvaluateConfig, pipe: Pipeline) -> FeatureExtractor | None:
    """The feature network asked for, on the pipeline's device; None for "none"."""
    name = judged_by(config.features, judge_name(config.judge, config.data))
    return None if name == "none" else feature_extractor(name).to(pipe.device)


def judge_name(judge: str, data: str) -> str:
    """The judge asked for, else the one that ships for the data, else "none"."""
    return judge or (data if (JUDGES / data).is_dir() else "none")


def open_judge(config: EvaluateConfig, pipe: Pipeline) -> ImageTextModel | None:
    """The judge asked for, else the one that ships for the data, if there is one. UserError for the model's own text
    encoder: it would find its own pictures good."""
    name = judge_name(config.judge, config.data)
    if name == "none":
        return None
    judge = image_text_model(name).to(pipe.device)
    if judge.learned_val and config.split == "val":
        raise UserError(
            f"judge {name!r} learned from the validation split, and cannot judge it; take --split test, --judge none or"
            " a clip:FOLDER"
        )
    tower = getattr(judge.network, "text_model", None)
    if tower is not None and module_hash(tower) == module_hash(pipe.text_encoder.text_model):
        raise UserError(
            f"judge {name!r} is the text encoder of {config.model!r}, which would judge itself; train another with"
            " judge=true (configs/*/judge.toml)"
        )
    return judge


def settings_of(config: EvaluateConfig, pipe: Pipeline, dataset: Any, size: int) -> dict[str, Any]:
    """What the pictures of a run depend on, ready for JSON."""
    return {
        "model": config.model,
        "model_sha256": model_hash(pipe),
        "parameters": {p: parameters(getattr(pipe, p)) for p in ("vae", "text_encoder", "unet")},
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
    if config.num and config.num < FEWEST:
        raise UserError(f"--num {config.num} is too few to measure anything; use {FEWEST} or more, best 1000")
    if config.train_num < 1:
        raise UserError(f"--train-num {config.train_num} is not allowed; use 1 or more")
    if config.split not in ("test", "val"):
        raise UserError(f"split {config.split!r} cannot be evaluated on: held-out captions are in 'test' or 'val'")
    check_numbers(config.batch_size, config.seed)
    if not 0 <= config.guidance_rescale <= 1:
        raise UserError(f"--guidance-rescale {config.guidance_rescale:g} is not allowed; use a number in [0, 1]")
    names = [f"{g:g}" for g in config.guidance]
    if not names or len(set(names)) < len(names) or not all(0 <= g < float("inf") for g in config.guidance):
        raise UserError(f"--guidance {','.join(names)} is not allowed; give different numbers of 0 or more")


def check_numbers(batch_size: int, seed: int) -> None:
    """UserError for what no evaluation can do."""
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size} is not allowed; use 1 or more")
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed {seed} is not allowed; use 0 or more, below 2 to the 31st")


def sample_indices(length: int, n: int, seed: int) -> list[int]:
    """`n` of `length` indices at random; fewer are the beginning of more, so that a larger run goes on."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:n].tolist()


def pose(num: int, seed: int) -> list[Case]:
    """About `num` compositional cases, equally many of each kind, dealt in turn: fewer are the beginning of more."""
    each = num // (2 * len(TASKS)) or 1
    posed = cases(each, seed)
    return [posed[kind * each + i] for i in range(each) for kind in range(2 * len(TASKS))]


def train_sample(data: DataConfig, config: EvaluateConfig, num: int) -> tuple[Any, list[int], str]:
    """The training split and which of its pictures are used: (data set, indices, "") or (None, [], why none are)."""
    try:
        train = open_dataset(data, "train")
    except UserError as error:
        return None, [], str(error)
    if len(train) < num:
        return None, [], f"the training split has only {len(train)} pictures"
    tried = min(max(config.train_num, num), len(train))
    bank = readable(train, sample_indices(len(train), tried, config.seed))
    if len(bank) < num:
        return None, [], f"only {len(bank)} of {tried} training pictures can be read"
    return train, bank, ""


def parameters(model: torch.nn.Module) -> int:
    """Parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def model_hash(pipe: Pipeline) -> str:
    """SHA-256 over the weights of all parts, the vocabulary and the schedule: what a picture comes from."""
    digest = hashlib.sha256()
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        digest.update(module_hash(part).encode())
    digest.update(json.dumps([pipe.tokenizer.vocab, asdict(pipe.schedule.config)], sort_keys=True).encode())
    return digest.hexdigest()


def summary(results: list[Record]) -> list[str]:
    """The headline numbers at the best guidance, a line each."""
    g, lines = best_guidance(results), []
    for name, metric, of in (("Frechet distance", "frechet_distance", "real train"), *ALIGNED):
        for r in find(results, metric, "samples", guidance=g):
            real = "".join(f", real pictures {x['value']:.3g}" for x in find(results, metric, of))
            low, high = r["interval"]
            about = f"{r['extractor']}, N={r['n']}"
            lines.append(f"{name} ({about}): {r['value']:.3g} [{low:.3g}, {high:.3g}]{real}")
    for composed in find(results, "compositional_score", "samples", guidance=g):
        mean = composed["value"]["mean"]
        held_out = f", held-out {mean['held_out']:.1%}" if "held_out" in mean else ""
        lines.append(f"compositional score (N={composed['n']}): {mean['all']:.1%}{held_out}")
    failed = [r for r in results if r["metric"] in ("blank_pictures", "left_out") and r["value"]]
    lines += [f"{r['metric'].replace('_', ' ')}: {r['value']} of {r['n']} {named(r)}" for r in failed]
    return [f"best guidance: {g:g}", *lines, *biases(results)]
