"""Measuring a folder of images against another, whoever made them."""

import random
import warnings
from pathlib import Path

from ldm.config import UserError
from ldm.data.folder import captioned
from ldm.evaluate.config import FEWEST, FolderEvaluation
from ldm.evaluate.evaluation import Evaluation
from ldm.evaluate.pictures import of_files
from ldm.evaluate.records import blank_record, find, judge_fault
from ldm.images import image_size, to_float
from ldm.metrics.alignment import sharing

SHOWN = 24  # images of each folder in the report


def evaluate_folders(config: FolderEvaluation) -> list[str]:
    """Measures, and writes metrics.json and report.html into `config.out`. Returns the headline numbers, one per line.

    Raises UserError for images that are missing, unreadable, of different sizes or too few; nothing is written then.
    """
    judge = config.judge or "none"
    if judge == config.features == "none":
        raise UserError("nothing is measured with --features none and no --judge; leave out the one or name the other")
    folders = {"images": config.images, "reference": config.reference}
    captions = {of: read_captions(of, folder, config.seed, judge != "none") for of, folder in folders.items()}
    paths = {of: [folders[of] / name for name in names] for of, names in captions.items()}
    size = config.size or common_size([*paths["images"], *paths["reference"]])
    fake, real = sources = [of_files(of, files, size) for of, files in paths.items()]
    counts = {"number_of_images": fake.count, "number_of_references": real.count}
    e = Evaluation(config, size=size, **{of: str(folder) for of, folder in folders.items()}, **counts)
    if e.features and not config.without_frechet:
        first = fake.batch(0, 1)
        n, dimensions = min(counts.values()), e.features.network(to_float(first).to(e.features.device)).shape[1]
        if n <= dimensions:
            raise UserError(
                f"{n} pictures are too few for a Frechet distance of {dimensions} features; {dimensions + 1}"
                " are needed on both sides: take --without-frechet (kernel distance and CMMD need no more), or"
                " --features with fewer of them, as judge:FOLDER"
            )
    e.add(*(blank_record(source, config.batch_size) for source in sources))  # reads all: refuses a broken one
    e.claim("images", "reference", "size", "seed")
    if e.features:
        both = {"n_images": fake.count, "n_reference": real.count}
        e.add(*e.features.distances(fake, real, not config.without_frechet, **both))
    if e.judge:
        e.add(e.judge.cmmd(fake, real))
        for source in sources:
            texts = [*captions[source.of].values()]
            if all(texts):
                e.add(*e.judge.alignment(source, [text for text, *_ in texts], sharing(texts)))
        for r in find(e.results, "text_to_image@1", real.of):
            if fault := judge_fault(r):
                warnings.warn(f"{fault}: its alignment says little", stacklevel=2)
    for source in sources:
        for i in range(min(SHOWN, source.count)):
            e.show(source.of, [("", source.read(i))])
    return e.finish("folders", [fake.of])


def read_captions(of: str, folder: Path, seed: int, all_or_none: bool) -> dict[str, list[str]]:
    """The captions of a folder's images by name, in random order, as names may sort them by content and subsets are
    taken."""
    if not folder.is_dir():
        raise UserError(f"folder of pictures {str(folder)!r} does not exist")
    captions = captioned(folder)
    if len(captions) < FEWEST:
        count = f"{str(folder)!r} has {len(captions)} pictures"
        raise UserError(f"{count}, too few to measure anything; {FEWEST} are needed")
    missing = [name for name, texts in captions.items() if not texts]
    if all_or_none and 0 < len(missing) < len(captions):
        count = f"{len(missing)} of {len(captions)} --{of} have no caption"
        raise UserError(f"{count}, {min(missing)!r} for one; give all of them one, or none")
    names = list(captions)
    random.Random(seed).shuffle(names)
    return {name: captions[name] for name in names}


def common_size(paths: list[Path]) -> int:
    """The side of all images. Raises UserError unless they are squares of one size."""
    side = image_size(paths[0])[0]
    for path in paths:
        width, height = image_size(path)
        if (width, height) != (side, side):
            raise UserError(
                f"picture {str(path)!r} is {width}x{height} px, not {side}x{side}; numbers compare at one size only:"
                " give --size N to resize all (their centre squares) to N px"
            )
    return side
