"""A model, the images that it is measured with, the networks that look at them, and the results."""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
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
from ldm.evaluate.pictures import Pictures, data_config, held_out_indices, of_files, sample_indices, write_captions
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


class Evaluation:
    """Opens and checks everything, and writes nothing. Raises UserError for settings that cannot be measured."""

    def __init__(self, config: EvaluateConfig):
        self.config = config
        self.results: list[Record] = []
        self.galleries: dict[str, list[Row]] = defaultdict(list)
        self.pipe = pipe = Pipeline.from_pretrained(config.model, find_device(config.device))
        sampler, size = config.sampler or pipe.schedule.config.sampler, pipe.unet.config.sample_size * pipe.vae.factor
        make_grid(pipe.schedule, sampler, config.steps)  # refuses an unknown sampler or a wrong number of steps
        if size < SMALLEST:
            raise UserError(f"the model makes {size} px pictures; they can be measured from {SMALLEST} px on")
        data = data_config(config.model, config.data, config.data_path, size)
        self.dataset, self.train, self.bank, self.train_note = open_dataset(data, config.split), None, [], ""
        self.indices = held_out_indices(self.dataset, config)
        n = len(self.indices)
        try:
            self.train = open_dataset(data, "train")
            tried = sample_indices(len(self.train), max(config.train_num, n), config.seed)
            self.bank = readable(self.train, tried)  # the training images that samples are compared with
            if len(self.bank) < n:
                raise UserError(f"only {len(self.bank)} training pictures can be read, and {n} are needed")
        except UserError as error:
            self.bank, self.train_note = [], str(error)
        judge, options = judge_name(config.judge, config.data), (config.out, pipe.device, config.batch_size)
        self.features, self.judge = open_networks(config.features, judge, *options)
        if self.judge:
            _check_judge(self.judge, config, pipe)
        modules = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "unet")}
        rest = json.dumps([pipe.tokenizer.vocab, asdict(pipe.schedule.config)], sort_keys=True)
        self.settings = {
            "model": config.model,
            "model_sha256": hashlib.sha256("".join([*map(module_hash, modules.values()), rest]).encode()).hexdigest(),
            "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
            "data": config.data,
            "data_sha256": data_hash(self.dataset),
            "split": config.split,
            "size": size,
            "guidance_rescale": config.guidance_rescale,
            "steps": config.steps,
            "sampler": sampler,
            "seed": config.seed,
        }
        alternatives = [self.dataset.captions(i) for i in self.indices]
        # one caption per held-out image, for which the model samples one, and which images share a caption (N, N)
        self.captions = [
            random.Random(f"{config.seed}/{i}").choice(texts)
            for i, texts in zip(self.indices, alternatives, strict=True)
        ]
        self.same = sharing(alternatives)
        self.cases = pose_cases(n, config.seed) if config.data == "shapes" else []  # for the exact checker
        self.real = _of_dataset("real held-out", self.dataset, self.indices)
        self.real_train = _of_dataset("real train", self.train, self.bank[:n])
        self.searched = _of_dataset("training set", self.train, self.bank)  # for near-duplicates of samples

    def add(self, *records: Record) -> None:
        self.results += records

    def show(self, gallery: str, pictures: list[tuple[str, Tensor]], caption: str = "", note: str = "") -> None:
        """Adds a row of images, each with its label, to a gallery of the report."""
        self.galleries[gallery].append(Row(caption=caption, pictures=pictures, note=note))

    def sample(
        self,
        name: str,
        captions: list[str],
        guidance: Sequence[float],
        of: str = "samples",
        pipe: Pipeline | None = None,
    ) -> dict[float, Pictures]:
        """One image per caption, by guidance, kept in the folder `name`; missing ones are sampled, image i with the
        seed `config.seed` + i.

        A batch is made where one of its images is missing; several processes share the batches.
        """
        group, pipe, sampling = processes(), pipe or self.pipe, {key: self.settings[key] for key in SAMPLING}
        size, folders = self.config.batch_size, {g: self.config.out / name / f"g{g:g}" for g in guidance}
        paths = {g: [folders[g] / f"{i:05d}.png" for i in range(len(captions))] for g in guidance}
        starts = [(g, start) for g in guidance for start in range(0, len(captions), size)]
        missing = [(g, i) for g, i in starts if not all(path.is_file() for path in paths[g][i : i + size])]
        group.wait_for_everyone()  # all processes have seen what is missing before one of them makes it
        if group.is_main_process:
            for folder in folders.values():
                write_captions(folder, captions)
        group.wait_for_everyone()
        batches = missing[group.process_index :: group.num_processes]
        quiet = not (batches and group.is_main_process)
        for g, start in tqdm(batches, desc=f"sampling, {of}", unit="batch", disable=quiet):
            options = sampling | {"guidance": g, "seed": self.config.seed + start}
            prompts = captions[start : start + size]
            for i, image in enumerate(pipe(prompts, batch_size=size, **options)):
                path, metadata = paths[g][start + i], {"model": self.config.model, "prompt": prompts[i], **options}
                if not path.is_file():
                    metadata["seed"] += i
                    with atomic_write(path) as temporary:
                        save_png(image, temporary, {key: str(value) for key, value in metadata.items()})
        group.wait_for_everyone()
        return {g: of_files(of, paths[g], self.settings["size"], guidance=g, **sampling) for g in guidance}

    @cached_property
    def samples(self) -> dict[float, Pictures]:
        """By guidance, one image per held-out caption."""
        return self.sample("pictures", self.captions, self.config.guidance)

    @cached_property
    def case_samples(self) -> dict[float, Pictures]:
        """By guidance, one image per case."""
        return self.sample("cases", [case.caption for case in self.cases], self.config.guidance)

    @cached_property
    def untrained(self) -> Pictures:
        """Images of the same network with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            unet = UNet(self.pipe.unet.config)
        model = Pipeline(Parts(*self.pipe.parts[:3], unet, self.pipe.schedule)).to(self.pipe.device)
        (pictures,) = self.sample("untrained", self.captions, [UNTRAINED], "untrained", model).values()
        return replace(pictures, sampling={})

    @cached_property
    def reconstructions(self) -> Pictures:
        """Held-out images decoded from the means of their latents."""
        batches = self.real.batches(self.config.batch_size)
        pixels = torch.cat([reconstruct(self.pipe, to_float(x)) for x in batches])
        return Pictures(of="reconstructions", count=len(pixels), read=pixels.__getitem__)


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


def _of_dataset(of: str, dataset: Any, indices: list[int]) -> Pictures:
    return Pictures(of=of, count=len(indices), read=lambda i: dataset[indices[i]]["image"])


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
