"""An evaluation of any kind: its networks, settings, records and galleries; of a model also what it is asked."""

import hashlib
import json
import random
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ldm.config import UserError
from ldm.data import DataConfig, open_dataset
from ldm.data.faults import readable
from ldm.data.latents import data_hash
from ldm.distributed import find_device, from_main, map_over_processes, processes, rank_and_world
from ldm.evaluate.config import FEWEST, GUIDANCE, SMALLEST, EvaluateConfig
from ldm.evaluate.features import Features
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
from ldm.evaluate.records import Record, headlines
from ldm.evaluate.report import write_results
from ldm.images import save_png, to_float, to_uint8
from ldm.metrics.alignment import sharing
from ldm.metrics.compositional import TASKS, Case, cases
from ldm.metrics.features import feature_extractor, judged_by
from ldm.metrics.judges import JUDGES, image_text_model
from ldm.model_io import atomic_write, module_hash, read_json, write_json
from ldm.pipeline import Pipeline
from ldm.pipeline_io import Parts
from ldm.samplers import make_grid
from ldm.unet import UNet

UNTRAINED = 1.0  # guidance of the untrained model
COPIED = ("model", "autoencoder", "data", "split", "guidance_rescale", "steps", "seed", "compile")  # into settings
TAUGHT = {"trained_the_vae": True}  # field of distances by the very network that the VAE was trained to please
SAMPLING = ("guidance_rescale", "steps", "sampler", "seed")  # settings that every record of samples carries


class Evaluation:
    """Opens the network `features` and, for kinds with the option, the image-text model `judge`, by default that of the
    data; None for "none". Records of the network that trained the measured VAE (`teacher`) are marked."""

    def __init__(self, config: Any, teacher: str = "", **settings: Any):
        device, data, self.config = find_device(config.device), getattr(config, "data", "none"), config
        judge = getattr(config, "judge", "") or (data if (JUDGES / data).is_dir() else "none")
        features, judge_asked = judged_by(config.features, judge), judge != "none" and hasattr(config, "judge")
        self.features = None if features == "none" else Features(feature_extractor(features), config, device)
        self.judge = Features(image_text_model(judge), config, device) if judge_asked else None
        if self.features and self.features.name in teacher.split(", "):
            self.features.metadata |= TAUGHT
        self.results: list[Record] = []
        self.galleries: dict[str, list[dict]] = defaultdict(list)
        self.settings = {key: getattr(config, key) for key in COPIED if hasattr(config, key)} | settings
        self.settings |= {"device": str(device)}
        networks = {"features": self.features} | ({"judge": self.judge} if hasattr(config, "judge") else {})
        self.settings |= {key: network.name if network else "none" for key, network in networks.items()}

    def add(self, *records: Record) -> None:
        self.results += records

    def show(self, gallery: str, pictures: list[tuple[str, Tensor]], caption: str = "", note: str = "") -> None:
        """Adds a row of images, each with its label, to a gallery of the report."""
        self.galleries[gallery].append({"pictures": pictures, "caption": caption, "note": note})

    def claim(self, *keys: str) -> None:
        """Writes these settings into a new `out`. Raises UserError, naming the differences, where it was made with
        others."""
        out, path = self.config.out, self.config.out / "settings.json"
        settings = {key: self.settings[key] for key in keys}
        if out.exists() and not out.is_dir():
            raise UserError(f"{str(out)!r} is a file; --out must be a folder")
        with processes().main_process_first():
            if not path.is_file():
                out.mkdir(parents=True, exist_ok=True)
                write_json(path, settings)
        old = {"dtype": "float32"} | read_json(path)  # as earlier versions had
        if other := [key for key, value in settings.items() if old.get(key) != value]:
            changes = "; ".join(f"{key} {str(old.get(key))[:16]}, not {str(settings[key])[:16]}" for key in other)
            raise UserError(f"{str(out)!r} has pictures made with {changes}; use another --out, or delete that folder")

    def finish(self, kind: str, sources: Sequence[str], metrics: Sequence[str] = ()) -> list[str]:
        """Writes metrics.json and report.html; returns the numbers of these sources for a terminal."""
        write_results(kind, self.config.out, self.settings, self.results, self.galleries)
        return headlines(self.results, sources, metrics)


@dataclass(frozen=True, kw_only=True, eq=False)
class Questions:
    """Captions for each of which the model samples one image, and the real images that they belong to."""

    of: str  # the name of the samples in records
    folder: str  # of the samples, in --out
    captions: list[str]  # those of all real images once, or several times over with other captions and noise
    same: Tensor | None = None  # (N, N) bool: which captions are right for each other's images too
    dataset: Any = None
    indices: Sequence[int] = ()  # of the real images
    real: Pictures | None = None
    cases: Sequence[Case] = ()  # for the exact checker, of shapes alone
    sampling: dict[str, Any] = field(default_factory=dict)  # sampler and steps, of a point of their curve alone

    @property
    def times(self) -> int:
        """How often each real image's captions are asked for."""
        return len(self.captions) // max(len(self.indices), 1)

    @property
    def concepts(self) -> Sequence[Any]:
        """Of each image: several samples of one real image are alike, as the images of a concept are."""
        return self.times * [*(self.real.concepts or range(self.real.count))] if self.real else ()

    @cached_property
    def about_cases(self) -> "Questions":
        """The captions of the cases."""
        folder = self.folder.replace("pictures", "cases")
        captions = [case.caption for case in self.cases]
        return Questions(of=self.of, folder=folder, captions=captions, sampling=self.sampling)


def pose(
    name: str, dataset: Any, indices: list[int], seed: int, times: int = 1, cases: Sequence[Case] = ()
) -> Questions:
    """Questions on some images of a data set, one of the captions of each, `times` over; `name` is that of the set, ""
    for the reported one."""
    alternatives = times * [dataset.captions(i) for i in indices]
    keys = [f"{seed}/{i}" + (f"/{k}" if k else "") for k in range(times) for i in indices]
    return Questions(
        of=f"{name} samples".strip(),
        folder=f"{name}/pictures".strip("/"),
        captions=[random.Random(key).choice(texts) for key, texts in zip(keys, alternatives, strict=True)],
        same=sharing(alternatives),
        dataset=dataset,
        indices=indices,
        real=of_dataset(f"real {name or 'held-out'}", dataset, indices),
        cases=cases,
    )


def pose_cases(num: int, seed: int) -> list[Case]:
    """About `num` compositional cases, equally many of each kind in turn: fewer are the beginning of more."""
    kinds = 2 * len(TASKS)
    each = num // kinds or 1
    posed = cases(each, seed)
    return [posed[kind * each + i] for i in range(each) for kind in range(kinds)]


class ModelEvaluation(Evaluation):
    """Opens and checks everything, and writes nothing. Raises UserError for settings that cannot be measured."""

    guidance: float  # that is reported, once it is chosen

    def __init__(self, config: EvaluateConfig):
        with warnings.catch_warnings(record=True) as notes:  # such as of a sampler that takes another's place
            self.pipe = pipe = Pipeline.from_pretrained(config.model, config.device, config.dtype)
        for note in notes:
            warnings.warn_explicit(note.message, note.category, note.filename, note.lineno)
        own = {"sampler": pipe.schedule.config.sampler, "steps": (pipe.defaults["steps"],)}
        own["guidance"] = (1.0,) if pipe.unet.distilled_steps else GUIDANCE
        config = replace(config, **{name: value for name, value in own.items() if not getattr(config, name)})
        pairs = dict.fromkeys(product(config.sampler.replace(" ", "").split(","), config.steps))
        reported, *further = ({"sampler": sampler, "steps": steps} for sampler, steps in pairs)
        for point in (reported, *further):
            make_grid(pipe.schedule, **point)  # refuses an unknown sampler or a wrong number of steps
        size = pipe.unet.config.sample_size * pipe.vae.factor
        if size < SMALLEST:
            raise UserError(f"the model makes {size} px pictures; they can be measured from {SMALLEST} px on")
        self.sample = cache(self.sample)  # the same images are the same object, for which features are known
        data = data_config(config.model, config.data, config.data_path, size)
        self._open_test(data, config)
        self._open_train(data, config)
        self.curve = [replace(self.test, of="{steps}-step {sampler} samples".format(**p), sampling=p) for p in further]
        modules = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "unet")}
        rest = json.dumps([pipe.tokenizer.vocab, asdict(pipe.schedule.config)], sort_keys=True)
        settings = {
            "model_sha256": hashlib.sha256("".join([*map(module_hash, modules.values()), rest]).encode()).hexdigest(),
            "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
            "data_sha256": data_hash(self.test.dataset),
            "size": size,
            **reported,
            "num": len(self.test.indices),
            "guidance": list(config.guidance),
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "perceptual_net_of_vae": pipe.vae.perceptual_net or "unknown",
            "intervals_over": "concepts" if self.test.real.concepts else "pictures",
            "notes": [str(note.message) for note in notes],
        }
        super().__init__(config, settings["perceptual_net_of_vae"], **settings)
        if self.judge:
            _check_judge(self.judge, config, pipe)

    def _open_test(self, data: DataConfig, config: EvaluateConfig) -> None:
        """The questions on the reported split, and where guidance is chosen on another about as many on that one:
        captions of a small validation split are asked for several times over."""
        dataset, seed, on_shapes = open_dataset(data, config.split), config.seed, config.data == "shapes"
        indices = held_out_indices(dataset, config)
        self.test = pose("", dataset, indices, seed, cases=pose_cases(len(indices), seed) if on_shapes else ())
        self.validation, self.validation_note = None, ""
        if config.choose_on == "val" != config.split and len(config.guidance) > 1:
            try:
                dataset, num = open_dataset(data, "val"), config.num or USUAL
                fewer = replace(config, split="val", num=max(min(num, len(dataset)), FEWEST))
                indices, posed = held_out_indices(dataset, fewer), pose_cases(num, seed + 1) if on_shapes else ()
                self.validation = pose("validation", dataset, indices, seed, max(1, num // len(dataset)), posed)
            except UserError as error:
                self.validation_note = f"chosen on the reported captions themselves, as {error}"
                warnings.warn(f"the guidance is {self.validation_note}", stacklevel=2)

    def _open_train(self, data: DataConfig, config: EvaluateConfig) -> None:
        """The `bank` of training images that samples are compared with; empty, with a note, where they are too few."""
        self.train, self.bank, self.train_note, n = None, [], "", len(self.test.indices)
        try:
            self.train = open_dataset(data, "train")
            bank = readable(self.train, sample_indices(len(self.train), max(config.train_num, n), config.seed))
            if len(bank) < n:
                raise UserError(f"only {len(bank)} training pictures can be read, and {n} are needed")
            self.bank = bank
        except UserError as error:
            self.train_note = str(error)
            warnings.warn(f"samples are not compared with training pictures: {error}", stacklevel=2)
        self.real_train = of_dataset("real train", self.train, self.bank[:n])

    def sample(self, asked: Questions, g: float, pipe: Pipeline | None = None) -> Pictures:
        """One image per caption at guidance `g`, kept in a folder; missing ones are sampled, image i with the seed
        `config.seed` + i.

        A batch is made where one of its images is missing; several processes share the batches.
        """
        pipe, sampling = pipe or self.pipe, {k: self.settings[k] for k in SAMPLING} | asked.sampling
        name = "-".join(map(str, (f"g{g:g}", *asked.sampling.values())))
        size, folder = self.config.batch_size, self.config.out / asked.folder / name
        paths = [folder / f"{i:05d}.png" for i in range(len(asked.captions))]
        missing = [i for i in range(0, len(paths), size) if not all(path.is_file() for path in paths[i : i + size])]
        missing = from_main(list, missing)  # all have looked before one of them makes it
        from_main(write_captions, folder, asked.captions)
        if self.config.compile != "never" and not pipe.compiled:
            passes = -(-len(missing) // rank_and_world()[1]) * sampling["steps"]
            pipe.compile(passes=passes if self.config.compile == "auto" else None)

        def make(start: int) -> None:
            options = sampling | {"guidance": g, "seed": self.config.seed + start}
            prompts = asked.captions[start : start + size]
            for i, image in enumerate(pipe(prompts, batch_size=size, **options)):
                text = {"model": self.config.model, "prompt": prompts[i], **options, "seed": options["seed"] + i}
                if not paths[start + i].is_file():
                    with atomic_write(paths[start + i]) as temporary:
                        save_png(image, temporary, {key: str(value) for key, value in text.items()})

        map_over_processes(make, missing, f"sampling, {asked.of} at {g:g}")
        labels = {"guidance": g, **sampling}
        return of_files(asked.of, paths, self.settings["size"], labels=labels, concepts=asked.concepts)

    @property
    def sources(self) -> tuple[Pictures, Pictures]:
        """The real held-out images, and the reported samples of their captions."""
        return self.test.real, self.sample(self.test, self.guidance)

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
        real, size = self.test.real, self.config.batch_size
        starts = range(0, real.count, size)
        pixels = map_over_processes(lambda i: reconstruct(self.pipe, to_float(real.batch(i, size))), starts)
        pixels = torch.cat(pixels)
        return replace(self.test.real, of="reconstructions", read=pixels.__getitem__)


@torch.no_grad()
def reconstruct(pipe: Pipeline, x: Tensor) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> uint8, decoded from the mean of its latent."""
    return to_uint8(pipe.vae.decode(pipe.vae.normalize(pipe.vae.encode(x.to(pipe.device)).mean))).cpu()


def _check_judge(judge: Features, config: EvaluateConfig, pipe: Pipeline) -> None:
    """Raises UserError for a judge that learned from the held-out split, or that is the model's own text encoder."""
    name, network = judge.name, judge.network.network
    if judge.network.learned_val and config.split == "val":
        way_out = "take --split test, --judge none or a clip:FOLDER"
        raise UserError(f"judge {name!r} learned from the validation split, and cannot judge it; {way_out}")
    if module_hash(getattr(network, "text_model", network)) == module_hash(pipe.text_encoder.text_model):
        way_out = "train another with judge=true"
        raise UserError(f"judge {name!r} is the text encoder of {config.model!r}: it would judge itself; {way_out}")
