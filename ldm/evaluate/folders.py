"""Measuring a folder of images against another, whoever made them."""

import random
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ldm import model_io
from ldm.config import UserError
from ldm.data.folder import captioned
from ldm.distributed import find_device, processes
from ldm.evaluate.config import FEWEST, FolderEvaluation
from ldm.evaluate.features import Features
from ldm.evaluate.gallery import Row
from ldm.evaluate.pictures import Pictures, claim
from ldm.evaluate.records import (
    Record,
    alignment_records,
    class_records,
    cmmd_record,
    find,
    frechet_records,
    headline,
    judge_fault,
    picture_records,
    sharing,
)
from ldm.evaluate.report import check_installed, write_report
from ldm.evaluate.samples import open_extractor
from ldm.images import ImageError, image_size, read_image, to_float
from ldm.metrics.judges import image_text_model

FORMAT = "ldm-evaluation-2"
SHOWN = 24  # images of each folder in the report
Captions = dict[str, list[str]]  # by name of image


def evaluate_folders(config: FolderEvaluation) -> list[str]:
    """Measures, and writes metrics.json and report.html into `config.out`. Returns the headline numbers, one per line.

    Raises UserError for images that are missing, unreadable, of different sizes or too few; nothing is written then.
    """
    check_installed()
    judged = config.judge not in ("", "none")
    if not judged and config.features == "none":
        raise UserError("nothing is measured with --features none and no --judge; leave out the one or name the other")
    captions = [_captions(folder, config.seed) for folder in (config.images, config.reference)]
    if judged:
        for option, each in zip(("--images", "--reference"), captions, strict=True):
            _check_captions(each, option)
    folders = list(zip((config.images, config.reference), captions, strict=True))
    size = config.size or _common_size([folder / name for folder, names in folders for name in names])
    fake, real = (_pictures(*each, size, of) for each, of in zip(folders, ("images", "reference"), strict=True))
    device = find_device(config.device)
    extractor = open_extractor(config.features, config.judge)
    judge = image_text_model(config.judge) if judged else None
    if extractor and not config.without_frechet:
        dimensions = extractor(to_float(fake.batch(0, 1))).shape[1]
        _check_count(min(fake.count, real.count), dimensions)
    results = [source.blank_record(config.batch_size) for source in (fake, real)]  # reads all: refuses a broken one
    settings = {"images": str(config.images), "reference": str(config.reference), "size": size, "seed": config.seed}
    claim(config.out, settings)
    open_features = lambda network: Features(config.out / "features", network, device, config.batch_size)  # noqa: E731
    if extractor:
        features = open_features(extractor)
        results += distances(config, features, fake, real)
    if judge:
        embeddings = open_features(judge)
        results += alignment(config, embeddings, (fake, real), captions)
    settings |= {"number_of_images": fake.count, "number_of_references": real.count}
    if processes().is_main_process:
        model_io.write_json(config.out / "metrics.json", {"format": FORMAT, "settings": settings, "results": results})
        rows = {
            source.of: [Row(pictures=[("", source.read(i))]) for i in range(min(SHOWN, source.count))]
            for source in (fake, real)
        }
        write_report("folders", config.out, settings, results, rows)
    return [headline(r) for r in results if r["of"] == "images" and r["value"] is not None]


def distances(config: FolderEvaluation, features: Features, fake: Pictures, real: Pictures) -> list[Record]:
    """Distances between the folders, and the Inception Score of the images."""
    network, x, y = features.network, features(fake), features(real)
    fields = {"n_images": len(x), "n_reference": len(y), "against": "reference"}
    kinds = (picture_records,) if config.without_frechet else (frechet_records, picture_records)
    records = [r | fields for compute in kinds for r in compute(x, y, fake.of, network.about, config.seed)]
    return records + class_records(network.probabilities(x.to(features.device)), fake.of, network.about)


def alignment(
    config: FolderEvaluation, embeddings: Features, sources: tuple[Pictures, Pictures], captions: list[Captions]
) -> list[Record]:
    """CMMD, and alignment of each folder whose images have captions, the reference's to hold the images' against."""
    judge = embeddings.network
    fake, real = (embeddings(source) for source in sources)
    records = [cmmd_record(fake, real, "images", judge.about, config.seed) | {"against": "reference"}]
    for source, images, each in zip(sources, (fake, real), captions, strict=True):
        if all(each.values()):
            texts = torch.cat([judge.texts([first]).cpu() for first, *_ in each.values()])
            records += alignment_records(images, texts, sharing([*each.values()]), source.of, judge.about, config.seed)
    for record in find(records, "text_to_image@1", "reference"):
        if fault := judge_fault(record):
            warnings.warn(f"{fault}: its alignment says little", stacklevel=2)
    return records


def _captions(folder: Path, seed: int) -> Captions:
    """The images of a folder in random order, as names may sort them by content and subsets are taken."""
    if not folder.is_dir():
        raise UserError(f"folder of pictures {str(folder)!r} does not exist")
    captions = captioned(folder, need_captions=False)
    if len(captions) < FEWEST:
        count = len(captions)
        raise UserError(f"{str(folder)!r} has {count} pictures, too few to measure anything; {FEWEST} are needed")
    names = list(captions)
    random.Random(seed).shuffle(names)
    return {name: captions[name] for name in names}


def _check_captions(captions: Captions, option: str) -> None:
    missing = [name for name, texts in captions.items() if not texts]
    if 0 < len(missing) < len(captions):
        without = f"{len(missing)} of {len(captions)} {option} have no caption, {min(missing)!r} for one"
        raise UserError(f"{without}; give all of them one, or none")


def _check_count(n: int, dimensions: int) -> None:
    if n <= dimensions:
        raise UserError(
            f"{n} pictures are too few for a Frechet distance of {dimensions} features; {dimensions + 1} are needed on"
            " both sides: take --without-frechet (kernel distance and CMMD need no more), or --features with fewer of"
            " them, as judge:FOLDER"
        )


def _common_size(paths: list[Path]) -> int:
    """The side of all images, which must be squares of one size."""
    try:
        sizes = {path: image_size(path) for path in paths}
    except ImageError as error:
        raise UserError(f"{error}; repair or remove it") from None
    side, _ = sizes[paths[0]]
    for path, (width, height) in sizes.items():
        if (width, height) != (side, side):
            raise UserError(
                f"picture {str(path)!r} is {width}x{height} px, not {side}x{side}; numbers compare at one size only:"
                " give --size N to resize all (their centre squares) to N px"
            )
    return side


def _pictures(folder: Path, captions: Captions, size: int, of: str) -> Pictures:
    names = list(captions)

    def read(i: int) -> Tensor:
        try:
            return read_image(folder / names[i], size)
        except ImageError as error:
            raise UserError(f"{error}; repair or remove it") from None

    return Pictures(of=of, count=len(names), read=read)
