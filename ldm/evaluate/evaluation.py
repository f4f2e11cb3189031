"""A model, the captions and images that it is measured with, the networks that look at them, and the results."""

import hashlib
import json
import random
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.config import UserError
from ldm.data import open_dataset
from ldm.data.faults import readable
from ldm.data.latents import data_hash
from ldm.distributed import find_device, processes
from ldm.evaluate.config import SMALLEST, EvaluateConfig
from ldm.evaluate.features import Features, judge_name, open_networks
from ldm.evaluate.pictures import (
    USUAL,
    Pictures,
    data_config,
    held_out_indices,
    of_dataset,
    of_files,
    perceptual_teacher,
    sample_indices,
    write_captions,
)
from ldm.evaluate.records import Record, sharing
from ldm.evaluate.report import Row
from ldm.images import save_png, to_float, to_uint8
from ldm.metrics.compositional import TASKS, Case, cases
from ldm.model_io import atomic_write, module_hash
from ldm.pipeline import Pipeline
from ldm.pipeline_io import Parts
from ldm.samplers import make_grid
from ldm.unet import UNet

UNTRAINED = 1.0  # guidance of the untrained model
SAMPLING = ("guidance_rescale", "steps", "sampler", "seed")  # settings that every record of samples carries


@dataclass(frozen=True, kw_only=True, eq=False)
class Questions:
    """Captions for each of which the model samples one image, and the real images that they belong to."""

    of: str  # the name of the samples in records
    folder: str  # of the samples, in --out
    dataset: Any
    indices: list[int]  # of the real images
    captions: list[str]  # those of all real images once, or several times over with other captions and noise
    same: Tensor  # (N, N) bool: which captions are right for each other's images too
    real: Pictures
    cases: list[Case]  # for the exact checker, of shapes alone

    @property
    def kinds(self) -> list[str]:
        """Of each real image; "all" where the data set names no kinds."""
        return [getattr(self.dataset, "kind", lambda index: "all")(i) for i in self.indices]


def pose(
    dataset: Any, indices: list[int], seed: int, of: str, real: str, folder: str = "", times: int = 1, posed: Any = ()
) -> Questions:
    """Questions on some images of a data set, one of the captions of each, `times` over."""
    alternatives = [dataset.captions(i) for i in indices]
    keys = [f"{seed}/{i}" + (f"/{k}" if k else "") for k in range(times) for i in indices]
    captions = [random.Random(key).choice(texts) for key, texts in zip(keys, times * alternatives, strict=True)]
    pictures, same = of_dataset(real, dataset, indices), sharing(times * alternatives)
    named = {"of": of, "folder": folder, "dataset": dataset, "indices": indices, "cases": list(posed)}
    return Questions(captions=captions, same=same, real=pictures, **named)


class Evaluation:
    """Opens and checks everything, and writes nothing. Raises UserError for settings that cannot be measured."""

    def __init__(self, config: EvaluateConfig):
        self.config, seed = config, config.seed
        self.results: list[Record] = []
        self.galleries: dict[str, list[Row]] = defaultdict(list)
        self.made: dict[tuple[str, float], Pictures] = {}
        with warnings.catch_warnings(record=True) as notes:
            self.pipe = pipe = Pipeline.from_pretrained(config.model, find_device(config.device))
        for note in notes:
            warnings.warn_explicit(note.message, note.category, note.filename, note.lineno)
        sampler, size = config.sampler or pipe.schedule.config.sampler, pipe.unet.config.sample_size * pipe.vae.factor
        make_grid(pipe.schedule, sampler, config.steps)  # refuses an unknown sampler or a wrong number of steps
        if size < SMALLEST:
            raise UserError(f"the model makes {size} px pictures; they can be measured from {SMALLEST} px on")
        data = data_config(config.model, config.data, config.data_path, size)
        dataset, self.train, self.bank, self.train_note = open_dataset(data, config.split), None, [], ""
        indices, is_shapes = held_out_indices(dataset, config), config.data == "shapes"
        posed = pose_cases(len(indices), seed) if is_shapes else []
        self.test = pose(dataset, indices, seed, "samples", "real held-out", posed=posed)
        self.validation, self.validation_note = None, ""
        if config.choose_on == "val" != config.split and len(config.guidance) > 1:
            try:
                self.validation = pose_validation(open_dataset(data, "val"), config)
            except UserError as error:
                self.validation_note = f"chosen on the reported captions themselves, as {error}"
                warnings.warn(f"the guidance is {self.validation_note}", stacklevel=2)
        n = len(indices)
        try:
            self.train = open_dataset(data, "train")
            tried = sample_indices(len(self.train), max(config.train_num, n), seed)
            self.bank = readable(self.train, tried)  # the training images that samples are compared with
            if len(self.bank) < n:
                raise UserError(f"only {len(self.bank)} training pictures can be read, and {n} are needed")
        except UserError as error:
            self.bank, self.train_note = [], str(error)
        judge, options = judge_name(config.judge, config.data), (config.out, pipe.device, config.batch_size)
        teacher = perceptual_teacher(config.model)
        self.features, self.judge = open_networks(config.features, judge, teacher, *options)
        if self.judge:
            _check_judge(self.judge, config, pipe)
        modules = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "unet")}
        rest = json.dumps([pipe.tokenizer.vocab, asdict(pipe.schedule.config)], sort_keys=True)
        self.settings = {  # that samples depend on
            "model": config.model,
            "model_sha256": hashlib.sha256("".join([*map(module_hash, modules.values()), rest]).encode()).hexdigest(),
            "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
            "data": config.data,
            "data_sha256": data_hash(dataset),
            "split": config.split,
            "size": size,
            "guidance_rescale": config.guidance_rescale,
            "steps": config.steps,
            "sampler": sampler,
            "seed": seed,
        }
        self.choices = {  # further ones, made by hand or by default
            "num": n,
            "guidance": list(config.guidance),
            "judge": self.judge.network.name if self.judge else "none",
            "features": self.features.network.name if self.features else "none",
            "perceptual_net_of_vae": teacher,
            "device": str(pipe.device),
            "intervals_over": "concepts" if self.test.real.concepts else "pictures",
            "notes": [str(note.message) for note in notes],
        }
        # training images, as many as held-out ones; and all that near-duplicates of samples are searched for among
        self.searched = of_dataset("training set", self.train, self.bank)
        self.real_train = of_dataset("real train", self.train, self.bank[:n])

    def add(self, *records: Record) -> None:
        self.results += records

    def show(self, gallery: str, pictures: list[tuple[str, Tensor]], caption: str = "", note: str = "") -> None:
        """Adds a row of images, each with its label, to a gallery of the report."""
        self.galleries[gallery].append(Row(caption=caption, pictures=pictures, note=note))

    def sample(
        self,
        name: str,
        captions: list[str],
        g: float,
        of: str = "samples",
        concepts: Sequence[str] = (),
        pipe: Pipeline | None = None,
    ) -> Pictures:
        """One image per caption at guidance `g`, kept in the folder `name`; missing ones are sampled, image i with the
        seed `config.seed` + i.

        A batch is made where one of its images is missing; several processes share the batches.
        """
        if (name, g) in self.made:
            return self.made[name, g]
        group, pipe, sampling = processes(), pipe or self.pipe, {key: self.settings[key] for key in SAMPLING}
        size, folder = self.config.batch_size, self.config.out / name / f"g{g:g}"
        paths = [folder / f"{i:05d}.png" for i in range(len(captions))]
        missing = [i for i in range(0, len(paths), size) if not all(path.is_file() for path in paths[i : i + size])]
        group.wait_for_everyone()  # all processes have seen what is missing before one of them makes it
        if group.is_main_process:
            write_captions(folder, captions)
        group.wait_for_everyone()
        starts = missing[group.process_index :: group.num_processes]
        quiet = not (starts and group.is_main_process)
        for start in tqdm(starts, desc=f"sampling, {of} at {g:g}", unit="batch", disable=quiet):
            options = sampling | {"guidance": g, "seed": self.config.seed + start}
            prompts = captions[start : start + size]
            for i, image in enumerate(pipe(prompts, batch_size=size, **options)):
                path, metadata = paths[start + i], {"model": self.config.model, "prompt": prompts[i], **options}
                if not path.is_file():
                    metadata["seed"] += i
                    with atomic_write(path) as temporary:
                        save_png(image, temporary, {key: str(value) for key, value in metadata.items()})
        group.wait_for_everyone()
        labels = {"guidance": g, **sampling}
        self.made[name, g] = of_files(of, paths, self.settings["size"], labels=labels, concepts=concepts)
        return self.made[name, g]

    def samples(self, asked: Questions, g: float) -> Pictures:
        """One image per caption."""
        concepts = [*asked.real.concepts] * (len(asked.captions) // len(asked.indices))
        return self.sample(f"{asked.folder}pictures", asked.captions, g, asked.of, concepts)

    def case_samples(self, asked: Questions, g: float) -> Pictures:
        """One image per case."""
        return self.sample(f"{asked.folder}cases", [case.caption for case in asked.cases], g, asked.of)

    @cached_property
    def untrained(self) -> Pictures:
        """Images of the same network with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            unet = UNet(self.pipe.unet.config)
        model = Pipeline(Parts(*self.pipe.parts[:3], unet, self.pipe.schedule)).to(self.pipe.device)
        asked = (self.test.captions, UNTRAINED, "untrained", self.test.real.concepts)
        return replace(self.sample("untrained", *asked, model), labels={})

    @cached_property
    def reconstructions(self) -> Pictures:
        """Held-out images decoded from the means of their latents."""
        batches = self.test.real.batches(self.config.batch_size)
        pixels = torch.cat([reconstruct(self.pipe, to_float(x)) for x in batches])
        return replace(self.test.real, of="reconstructions", read=pixels.__getitem__)


def pose_validation(dataset: Any, config: EvaluateConfig) -> Questions:
    """About as many questions as on the test split: captions of a small validation split are asked for several times
    over. Raises UserError where it is too small."""
    num = config.num or USUAL
    part = replace(config, split="val", num=min(num, len(dataset)) or 1)
    indices = held_out_indices(dataset, part)
    posed = pose_cases(num, config.seed + 1) if config.data == "shapes" else []
    times = max(1, num // len(indices)) if len(indices) == len(dataset) else 1
    names = ("validation samples", "real validation", "validation/")
    return pose(dataset, indices, config.seed, *names, times, posed)


@torch.no_grad()
def reconstruct(pipe: Pipeline, x: Tensor) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> uint8, decoded from the mean of its latent."""
    return to_uint8(pipe.vae.decode(pipe.vae.normalize(pipe.vae.encode(x.to(pipe.device)).mean))).cpu()


def pose_cases(num: int, seed: int) -> list[Case]:
    """About `num` compositional cases, equally many of each kind in turn: fewer are the beginning of more."""
    kinds = 2 * len(TASKS)
    each = num // kinds or 1
    posed = cases(each, seed)
    return [posed[kind * each + i] for i in range(each) for kind in range(kinds)]


def _check_judge(judge: Features, config: EvaluateConfig, pipe: Pipeline) -> None:
    """Raises UserError for a judge that learned from the held-out split, or that is the model's own text encoder."""
    model = judge.network
    if model.learned_val and config.split == "val":
        way_out = "take --split test, --judge none or a clip:FOLDER"
        raise UserError(f"judge {model.name!r} learned from the validation split, and cannot judge it; {way_out}")
    tower = getattr(model.network, "text_model", None)
    if tower is not None and module_hash(tower) == module_hash(pipe.text_encoder.text_model):
        way_out = "train another with judge=true"
        raise UserError(
            f"judge {model.name!r} is the text encoder of {config.model!r}: it would judge itself; {way_out}"
        )
