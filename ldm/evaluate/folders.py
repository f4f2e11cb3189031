"""Measuring a folder of pictures against another, whoever made them."""

import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm import model_io as weights
from ldm.config import UserError
from ldm.data.folder import captioned
from ldm.distributed import find_device, processes
from ldm.evaluate.bench import Source, blank_record
from ldm.evaluate.features import FeatureCache
from ldm.evaluate.measure import knows_little
from ldm.evaluate.model import FEWEST, FORMAT, LARGEST, check_numbers
from ldm.evaluate.pictures import claim
from ldm.evaluate.records import (
    Record,
    alignment_records,
    class_records,
    cmmd_record,
    find,
    frechet_records,
    picture_records,
)
from ldm.evaluate.report import ROWS, called, failed, settings_table, write_page
from ldm.evaluate.report_html import Gallery, Row, line, network, number, show, table
from ldm.images import ImageError, image_size, read_image, to_float
from ldm.metrics.features import FeatureExtractor, feature_extractor, judged_by
from ldm.metrics.judges import ImageTextModel, image_text_model
from ldm.train.clip import sharing

SHOWN = 24  # pictures of each folder in the report


@dataclass(frozen=True, kw_only=True)
class FolderEvaluation:
    """What is measured, and how."""

    images: Path
    reference: Path
    size: int | None = None  # side in pixels that all are resized to; None: they must be squares of one size
    features: str = "effnet-lite0"
    judge: str = ""  # image-text model for CMMD and, where images have captions, alignment; empty: none
    without_frechet: bool = False
    seed: int = 0
    batch_size: int = 32


def evaluate_folders(config: FolderEvaluation, out: Path, device: str = "") -> list[str]:
    """Measures, and writes metrics.json and report.html into `out`. Gives the headline numbers, a line each.

    UserError for pictures that are missing, unreadable, of different sizes or too few; nothing is written then.
    """
    check_numbers(config.batch_size, config.seed)
    if config.size is not None and not 1 <= config.size <= LARGEST:
        raise UserError(f"--size {config.size} is not allowed; use 1 to {LARGEST}")
    names = [_names(folder, config.seed) for folder in (config.images, config.reference)]
    judged = config.judge not in ("", "none")
    if not judged and config.features == "none":
        raise UserError("nothing is measured with --features none and no --judge; leave out the one or name the other")
    if judged:
        for option, found in zip(("--images", "--reference"), names, strict=True):
            _check_captions(found, option)
    size = config.size or _side([config.images / n for n in names[0]] + [config.reference / n for n in names[1]])
    fake, real = (
        _source(folder, list(found), size, of)
        for folder, found, of in zip((config.images, config.reference), names, ("images", "reference"), strict=True)
    )
    place = find_device(device)
    name = judged_by(config.features, config.judge)
    extractor = None if name == "none" else feature_extractor(name).to(place)
    judge = image_text_model(config.judge).to(place) if judged else None
    if extractor and not config.without_frechet:
        _check_count(extractor, min(fake.count, real.count), fake, place)
    results = [blank_record(source, config.batch_size) for source in (fake, real)]  # reads all: refuses a broken one
    settings = {"images": str(config.images), "reference": str(config.reference), "size": size, "seed": config.seed}
    claim(out, settings)
    if extractor:
        features = (_seen(extractor, source, config, out, place) for source in (fake, real))
        results += _distances(config, extractor, *features, place)
    if judge:
        results += _alignment(config, judge, [list(found.values()) for found in names], (fake, real), out, place)
    settings |= {"number_of_images": fake.count, "number_of_references": real.count}
    if processes().is_main_process:
        weights.write_json(out / "metrics.json", {"format": FORMAT, "settings": settings, "results": results})
        _report(out / "report.html", settings, results, (fake, real))
    return [line(r) for r in results if r["of"] == "images" and r["value"] is not None]


def _names(folder: Path, seed: int) -> dict[str, list[str]]:
    """The pictures of a folder with their captions, if they have any, in random order: names may sort them by what
    they show, and parts are taken of them (UserError)."""
    if not folder.is_dir():
        raise UserError(f"folder of pictures {str(folder)!r} does not exist")
    found = captioned(folder, need_captions=False)
    if len(found) < FEWEST:
        raise UserError(f"{str(folder)!r} has {len(found)} pictures, too few to measure anything; {FEWEST} are needed")
    names = list(found)
    random.Random(seed).shuffle(names)
    return {name: found[name] for name in names}


def _check_captions(found: dict[str, list[str]], option: str) -> None:
    """UserError where some pictures of the folder that `option` names have captions and others have none."""
    missing = [name for name, captions in found.items() if not captions]
    if 0 < len(missing) < len(found):
        raise UserError(
            f"{len(missing)} of {len(found)} {option} have no caption, {min(missing)!r} for one; give all of them one,"
            " or none"
        )


def _side(paths: list[Path]) -> int:
    """The side of all pictures, which must be squares of one size (UserError)."""
    side = 0
    for path in tqdm(paths, desc="sizes", unit="picture", leave=False):
        try:
            width, height = image_size(path)
        except ImageError as error:
            raise UserError(f"{error}; repair or remove it") from None
        side = side or width
        if (width, height) != (side, side):
            raise UserError(
                f"picture {str(path)!r} is {width}x{height} px, not {side}x{side}; numbers compare at one size only:"
                " give --size N to resize all (their centre squares) to N px"
            )
    return side


def _source(folder: Path, names: list[str], size: int, of: str) -> Source:
    def get(i: int) -> Tensor:
        try:
            return read_image(folder / names[i], size)
        except ImageError as error:
            raise UserError(f"{error}; repair or remove it") from None

    return Source(of=of, count=len(names), get=get)


def _seen(
    network: FeatureExtractor | ImageTextModel,
    source: Source,
    config: FolderEvaluation,
    out: Path,
    device: torch.device,
) -> Tensor:
    call = network.images if isinstance(network, ImageTextModel) else network
    cache = FeatureCache(out / "features", network.name, network.sha256, call, device)
    total = -(-source.count // config.batch_size)
    return cache(lambda n: source.batch(n, config.batch_size), total, f"{network.name}: {source.of}")


def _check_count(extractor: FeatureExtractor, n: int, source: Source, device: torch.device) -> None:
    dimensions = extractor(to_float(source.get(0)[None]).to(device)).shape[1]
    if n <= dimensions:
        raise UserError(
            f"{n} pictures are too few for a Frechet distance of {dimensions} features; {dimensions + 1} are needed on"
            " both sides: take --without-frechet (kernel distance and CMMD need no more), or --features with fewer of"
            " them, as judge:FOLDER"
        )


def _distances(
    config: FolderEvaluation, extractor: FeatureExtractor, fake: Tensor, real: Tensor, device: torch.device
) -> list[Record]:
    about = {"n_images": len(fake), "n_reference": len(real), "against": "reference"}
    kinds = (picture_records,) if config.without_frechet else (frechet_records, picture_records)
    found = [r | about for kind in kinds for r in kind(fake, real, "images", extractor.about, config.seed)]
    classes = extractor.probabilities(fake.to(device))
    return found + list(class_records(classes, "images", extractor.about))


def _alignment(
    config: FolderEvaluation,
    judge: ImageTextModel,
    captions: list[list[list[str]]],
    sources: tuple[Source, Source],
    out: Path,
    device: torch.device,
) -> list[Record]:
    """CMMD, and alignment of each folder whose pictures all have captions, that of the reference to hold it against."""
    about = judge.about
    seen = [_seen(judge, source, config, out, device) for source in sources]
    found = [cmmd_record(*seen, "images", about, config.seed) | {"against": "reference"}]
    for source, images, own in zip(sources, seen, captions, strict=True):
        if all(own):
            texts = torch.cat([judge.texts([first]).cpu() for first, *_ in own])
            found += alignment_records(images, texts, sharing(own), source.of, about, config.seed)
    for record in find(found, "text_to_image@1", "reference"):
        if complaint := knows_little(record):
            warnings.warn(f"{complaint}: its alignment says little", stacklevel=2)
    return found


def _report(path: Path, settings: dict, results: list[Record], sources: tuple[Source, Source]) -> None:
    names = {metric: (name, factor, better) for metric, name, factor, better, _ in ROWS}
    rows = []
    for r in results:
        if r["of"] == "images" and r["metric"] in names:
            name, factor, better = names[r["metric"]]
            beside = number(next(iter(find(results, r["metric"], "reference")), None), factor)
            rows.append([called(name, r), number(r, factor), beside, str(r["n"]), network(r), r["resize"], better])
    text = "With 95% intervals. Distances are between the folders; alignment is of each with its own captions."
    judged = any(r["metric"] == "cmmd" for r in results)
    if judged and not find(results, "clip_cosine", "images"):
        text += " The images have no captions, so that their alignment is not known."
    if len({source.count for source in sources}) > 1:
        text += " The folders differ in number: compare these only with numbers of the same two."
    head = ["", "images", "reference", "N", "network", "resize", "better"]
    body = [failed(results), f"<h2>Numbers</h2><p>{text}</p>{table(head, rows)}"]
    for source in sources:
        chosen = range(min(SHOWN, source.count))
        pictures = [Image.fromarray(source.get(i).permute(1, 2, 0).numpy()) for i in chosen]
        gallery = Gallery(
            title=source.of.capitalize(), about="", rows=[Row(caption="", pictures=[("", p)]) for p in pictures]
        )
        body.append(show(gallery))
    write_page(path, f"{settings['images']} against {settings['reference']}", [*body, settings_table(settings)])
