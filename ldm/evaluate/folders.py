"""Measuring a folder of images against another, whoever made them."""

import random
import warnings
from pathlib import Path

import torch

from ldm.config import UserError
from ldm.data.folder import captioned
from ldm.distributed import find_device, processes
from ldm.evaluate.config import FEWEST, FolderEvaluation
from ldm.evaluate.features import Features
from ldm.evaluate.pictures import Pictures, claim, read
from ldm.evaluate.records import (
    Record,
    alignment_records,
    cmmd_record,
    distance_records,
    find,
    headline,
    judge_fault,
    sharing,
)
from ldm.evaluate.report import Row, check_installed, write_results
from ldm.evaluate.samples import open_extractor
from ldm.images import ImageError, image_size, to_float
from ldm.metrics.judges import image_text_model

SHOWN = 24  # images of each folder in the report
WAY_OUT = "repair or remove it"
Captions = dict[str, list[str]]  # by name of image


def evaluate_folders(config: FolderEvaluation) -> list[str]:
    """Measures, and writes metrics.json and report.html into `config.out`. Returns the headline numbers, one per line.

    Raises UserError for images that are missing, unreadable, of different sizes or too few; nothing is written then.
    """
    check_installed()
    judged = config.judge not in ("", "none")
    if not judged and config.features == "none":
        raise UserError("nothing is measured with --features none and no --judge; leave out the one or name the other")
    folders = {"images": config.images, "reference": config.reference}
    captions = {of: read_captions(folder, f"--{of}", config.seed, judged) for of, folder in folders.items()}
    size = config.size or common_size([folders[of] / name for of, names in captions.items() for name in names])
    fake, real = (open_pictures(folders[of], list(names), size, of) for of, names in captions.items())
    device = find_device(config.device)
    extractor = open_extractor(config.features, config.judge)
    judge = image_text_model(config.judge) if judged else None
    if extractor and not config.without_frechet:
        n, dimensions = min(fake.count, real.count), extractor(to_float(fake.batch(0, 1))).shape[1]
        if n <= dimensions:
            raise UserError(
                f"{n} pictures are too few for a Frechet distance of {dimensions} features; {dimensions + 1} are needed"
                " on both sides: take --without-frechet (kernel distance and CMMD need no more), or --features with"
                " fewer of them, as judge:FOLDER"
            )
    results = [source.blank_record(config.batch_size) for source in (fake, real)]  # reads all: refuses a broken one
    settings = {"images": str(config.images), "reference": str(config.reference), "size": size, "seed": config.seed}
    claim(config.out, settings)
    features, embeddings = (
        network and Features(config.out / "features", network, device, config.batch_size)
        for network in (extractor, judge)
    )
    if features:
        fields = {"n_images": fake.count, "n_reference": real.count}
        for record in distance_records(features, fake, real, config.seed, not config.without_frechet):
            results.append(record | ({"against": "reference"} | fields if "against" in record else {}))
    if embeddings:
        pair = embeddings(fake), embeddings(real)
        results.append(cmmd_record(*pair, "images", judge.about, config.seed) | {"against": "reference"})
        for images, (of, names) in zip(pair, captions.items(), strict=True):
            results += aligned(embeddings, images, of, list(names.values()))
    settings |= {"number_of_images": fake.count, "number_of_references": real.count}
    if processes().is_main_process:
        rows = {s.of: [Row(pictures=[("", s.read(i))]) for i in range(min(SHOWN, s.count))] for s in (fake, real)}
        write_results("folders", config.out, settings, results, rows)
    return [headline(r) for r in results if r["of"] == "images" and r["value"] is not None]


def aligned(embeddings: Features, images: torch.Tensor, of: str, captions: list[list[str]]) -> list[Record]:
    """Alignment of embedded images with their first captions; nothing where they have none."""
    if not all(captions):
        return []
    judge = embeddings.network
    texts = torch.cat([judge.texts([first]).cpu() for first, *_ in captions])
    records = list(alignment_records(images, texts, sharing(captions), of, judge.about))
    for record in find(records, "text_to_image@1", "reference"):
        if fault := judge_fault(record):
            warnings.warn(f"{fault}: its alignment says little", stacklevel=2)
    return records


def read_captions(folder: Path, option: str, seed: int, all_or_none: bool) -> Captions:
    """The images of a folder in random order, as names may sort them by content and subsets are taken."""
    if not folder.is_dir():
        raise UserError(f"folder of pictures {str(folder)!r} does not exist")
    captions = captioned(folder)
    if len(captions) < FEWEST:
        count = f"{str(folder)!r} has {len(captions)} pictures"
        raise UserError(f"{count}, too few to measure anything; {FEWEST} are needed")
    missing = [name for name, texts in captions.items() if not texts]
    if all_or_none and 0 < len(missing) < len(captions):
        count = f"{len(missing)} of {len(captions)} {option} have no caption"
        raise UserError(f"{count}, {min(missing)!r} for one; give all of them one, or none")
    names = list(captions)
    random.Random(seed).shuffle(names)
    return {name: captions[name] for name in names}


def common_size(paths: list[Path]) -> int:
    """The side of all images. Raises UserError unless they are squares of one size."""
    side = 0
    for path in paths:
        try:
            width, height = image_size(path)
        except ImageError as error:
            raise UserError(f"{error}; {WAY_OUT}") from None
        side = side or width
        if (width, height) != (side, side):
            raise UserError(
                f"picture {str(path)!r} is {width}x{height} px, not {side}x{side}; numbers compare at one size only:"
                " give --size N to resize all (their centre squares) to N px"
            )
    return side


def open_pictures(folder: Path, names: list[str], size: int, of: str) -> Pictures:
    return Pictures(of=of, count=len(names), read=lambda i: read(folder / names[i], size, WAY_OUT))
