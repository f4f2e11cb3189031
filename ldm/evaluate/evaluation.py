"""A model, the captions and images that it is measured with, the networks that look at them, and the results."""

import hashlib
import json
import random
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
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
from ldm.evaluate.config import FEWEST, SMALLEST, EvaluateConfig
from ldm.evaluate.features import Features, judge_name, open_networks
from ldm.evaluate.pictures import (
    USUAL,
    Pictures,
    data_config,
    held_out_indices,
    of_dataset,
    of_files,
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
    captions: list[str]  # those of all real images once, or several times over with other captions and noise
    same: Tensor | None = None  # (N, N) bool: which captions are right for each other's images too
    dataset: Any = None
    indices: list[int] = field(default_factory=list)  # of the real images
    real: Pictures | None = None
    cases: list[Case] = field(default_factory=list)  # for the exact checker, of shapes alone

    @property
    def times(self) -> int:
        """How often each real image's captions are asked for."""
        return len(self.captions) // max(len(self.indices), 1)

    @property
    def kinds(self) -> list[str]:
        """Of each real image; "all" where the data set names no kinds."""
        return [getattr(self.dataset, "kind", lambda index: "all")(i) for i in self.indices]

    @property
    def about_cases(self) -> "Questions":
        """The captions of the cases."""
        folder = self.folder.replace("pictures", "cases")
        return Questions(of=self.of, folder=folder, captions=[case.caption for case in self.cases])


def pose(
    dataset: Any, indices: list[int], seed: int, of: str, real: str, folder: str, times: int = 1, **fields: Any
) -> Questions:
    """Questions on some images of a data set, one of the captions of each, `times` over."""
    alternatives = times * [dataset.captions(i) for i in indices]
    keys = [f"{seed}/{i}" + (f"/{k}" if k else "") for k in range(times) for i in indices]
    captions = [random.Random(key).choice(texts) for key, texts in zip(keys, alternatives, strict=True)]
    fields |= {"dataset": dataset, "indices": indices, "real": of_dataset(real, dataset, indices)}
    return Questions(of=of, folder=folder, captions=captions, same=sharing(alternatives), **fields)


def pose_validation(dataset: Any, config: EvaluateConfig) -> Questions:
    """About as many questions as on the test split: captions of a small validation split are asked for several times
    over. Raises UserError where it is too small."""
    num = config.num or USUAL
    indices = held_out_indices(dataset, replace(config, split="val", num=max(min(num, len(dataset)), FEWEST)))
    posed = pose_cases(num, config.seed + 1) if config.data == "shapes" else []
    names = ("validation samples", "real validation", "validation/pictures")
    return pose(dataset, indices, config.seed, *names, max(1, num // len(dataset)), cases=posed)


class Evaluation:
    """Opens and checks everything, and writes nothing. Raises UserError for settings that cannot be measured."""

    def __init__(self, config: EvaluateConfig):
        self.config, seed = config, config.seed
        self.results: list[Record] = []
        self.galleries: dict[str, list[Row]] = defaultdict(list)
        self.made: dict[tuple[str, float], Pictures] = {}
        with warnings.catch_warnings(record=True) as notes:  # such as of a sampler that takes another's place
            self.pipe = pipe = Pipeline.from_pretrained(config.model, find_device(config.device))
        for note in notes:
            warnings.warn_explicit(note.message, note.category, note.filename, note.lineno)
        sampler, size = config.sampler or pipe.schedule.config.sampler, pipe.unet.config.sample_size * pipe.vae.factor
        make_grid(pipe.schedule, sampler, config.steps)  # refuses an unknown sampler or a wrong number of steps
        if size < SMALLEST:
            raise UserError(f"the model makes {size} px pictures; they can be measured from {SMALLEST} px on")
        data = data_config(config.model, config.data, config.data_path, size)
        dataset = open_dataset(data, config.split)
        indices = held_out_indices(dataset, config)
        n = len(indices)
        posed = pose_cases(n, seed) if config.data == "shapes" else []
        self.test = pose(dataset, indices, seed, "samples", "real held-out", "pictures", cases=posed)
        self.validation, self.validation_note = None, ""
        if config.choose_on == "val" != config.split and len(config.guidance) > 1:
            try:
                self.validation = pose_validation(open_dataset(data, "val"), config)
            except UserError as error:
                self.validation_note = f"chosen on the reported captions themselves, as {error}"
                warnings.warn(f"the guidance is {self.validation_note}", stacklevel=2)
        self.train, self.bank, self.train_note = None, [], ""
        try:
            self.train = open_dataset(data, "train")
            bank = readable(self.train, sample_indices(len(self.train), max(config.train_num, n), seed))
            if len(bank) < n:
                raise UserError(f"only {len(bank)} training pictures can be read, and {n} are needed")
            self.bank = bank  # the training images that samples are compared with
        except UserError as error:
            self.train_note = str(error)
            warnings.warn(f"samples are not compared with training pictures: {error}", stacklevel=2)
        self.searched = of_dataset("training set", self.train, self.bank)
        self.real_train = of_dataset("real train", self.train, self.bank[:n])
        judge, teacher = judge_name(config.judge, config.data), pipe.vae.perceptual_net or "unknown"
        options = (teacher, config.out, pipe.device, config.batch_size, config.compile)
        self.features, self.judge = open_networks(config.features, judge, *options)
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
            "compile": config.compile,
            "intervals_over": "concepts" if self.test.real.concepts else "pictures",
            "notes": [str(note.message) for note in notes],
        }

    def add(self, *records: Record) -> None:
        self.results += records

    def show(self, gallery: str, pictures: list[tuple[str, Tensor]], caption: str = "", note: str = "") -> None:
        """Adds a row of images, each with its label, to a gallery of the report."""
        self.galleries[gallery].append(Row(caption=caption, pictures=pictures, note=note))

    def sample(self, asked: Questions, g: float, pipe: Pipeline | None = None) -> Pictures:
        """One image per caption at guidance `g`, kept in a folder; missing ones are sampled, image i with the seed
        `config.seed` + i.

        A batch is made where one of its images is missing; several processes share the batches.
        """
        if (asked.folder, g) in self.made:
            return self.made[asked.folder, g]
        group, pipe, sampling = processes(), pipe or self.pipe, {key: self.settings[key] for key in SAMPLING}
        size, folder = self.config.batch_size, self.config.out / asked.folder / f"g{g:g}"
        paths = [folder / f"{i:05d}.png" for i in range(len(asked.captions))]
        missing = [i for i in range(0, len(paths), size) if not all(path.is_file() for path in paths[i : i + size])]
        group.wait_for_everyone()  # all processes have seen what is missing before one of them makes it
        if group.is_main_process:
            write_captions(folder, asked.captions)
        group.wait_for_everyone()
        starts = missing[group.process_index :: group.num_processes]
        quiet = not (starts and group.is_main_process)
        if self.config.compile == "always" and not pipe.compiled:
            pipe.compile()
        elif self.config.compile == "auto" and not pipe.compiled:
            pipe.compile(passes=len(starts) * self.config.steps)
        for start in tqdm(starts, desc=f"sampling, {asked.of} at {g:g}", unit="batch", disable=quiet):
            options = sampling | {"guidance": g, "seed": self.config.seed + start}
            prompts = asked.captions[start : start + size]
            for i, image in enumerate(pipe(prompts, batch_size=size, **options)):
                text = {"model": self.config.model, "prompt": prompts[i], **options, "seed": options["seed"] + i}
                if not paths[start + i].is_file():
                    with atomic_write(paths[start + i]) as temporary:
                        save_png(image, temporary, {key: str(value) for key, value in text.items()})
        group.wait_for_everyone()
        # several samples of one image are alike, as the images of a concept are
        concepts = asked.times * [*(asked.real.concepts or range(asked.real.count))] if asked.real else ()
        fields = {"labels": {"guidance": g, **sampling}, "concepts": concepts}
        self.made[asked.folder, g] = of_files(asked.of, paths, self.settings["size"], **fields)
        return self.made[asked.folder, g]

    @cached_property
    def untrained(self) -> Pictures:
        """Images of the same network with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            unet = UNet(self.pipe.unet.config)
        model = Pipeline(Parts(*self.pipe.parts[:3], unet, self.pipe.schedule)).to(self.pipe.device)
        asked = replace(self.test, of="untrained", folder="untrained")
        return replace(self.sample(asked, UNTRAINED, model), labels={})

    @cached_property
    def reconstructions(self) -> Pictures:
        """Held-out images decoded from the means of their latents."""
        batches = self.test.real.batches(self.config.batch_size)
        pixels = torch.cat([reconstruct(self.pipe, to_float(x)) for x in batches])
        return replace(self.test.real, of="reconstructions", read=pixels.__getitem__)


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
    name, network = judge.network.name, judge.network.network
    if judge.network.learned_val and config.split == "val":
        way_out = "take --split test, --judge none or a clip:FOLDER"
        raise UserError(f"judge {name!r} learned from the validation split, and cannot judge it; {way_out}")
    if module_hash(getattr(network, "text_model", network)) == module_hash(pipe.text_encoder.text_model):
        way_out = "train another with judge=true"
        raise UserError(f"judge {name!r} is the text encoder of {config.model!r}: it would judge itself; {way_out}")
