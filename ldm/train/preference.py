"""Learning from preferences: Diffusion-DPO (Wallace et al. 2023, eq. 14) on pairs of pictures of one prompt, which
people have judged, or a scorer that makes them first."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.config import UserError, require
from ldm.data import DataConfig, open_dataset, spread
from ldm.data.pairs import FILES, Pairs
from ldm.data.shapes import Scene
from ldm.diffusion import Denoiser, sample_timesteps
from ldm.distributed import Draws, beat, from_main, upload
from ldm.images import save_png, to_float
from ldm.lora import LoRAConfig
from ldm.metrics.alignment import cosine
from ldm.metrics.compositional import TASKS, Case, cases, check
from ldm.metrics.judges import image_text_model
from ldm.model_io import atomic_write, find_root
from ldm.pipeline import Pipeline
from ldm.pipeline_io import read_schedule
from ldm.train.config import TrainConfig, require_above_zero, require_least
from ldm.train.diffusion import DiffusionConfig, DiffusionTask, PreviewConfig, sample_shared
from ldm.train.loop import Losses, Modules
from ldm.unet import UNet

FEWEST = 50  # training pairs; fewer teach nothing that is not noise
SEED = 1_000_000  # of the first question to the checker; those of evaluations are below
BATCH = 64  # pictures sampled at once for pairs
HELD_OUT = 10  # each so many-th prompt's pair is for validation


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """All options of `ldm train preference`."""

    model: str = ""  # run folder, shipped model or Stable Diffusion folder: the start, and the reference
    pairs: str = ""  # JSONL file of pairs, as the page exports it; made first where it is missing and a scorer is named
    scorer: str = ""  # "shapes" (the exact checker), a judge as of `ldm evaluate`, or several, separated by commas
    prompts: int = 2000  # that a scorer's pairs are made of; the captions are those of `data`
    candidates: int = 4  # pictures per prompt, of which the best and the worst are a pair
    steps: int = 20  # of sampling them
    guidance: float = 1.0  # of sampling them, and the validation's pictures
    shuffle: bool = False  # choose by chance which of a scorer's two pictures is the better one, as a control
    beta: float = 1000.0  # how close to stay to the reference: beta T omega of eq. 14, times the mean squared error
    data: DataConfig = field(default_factory=DataConfig)  # its size is that of the pictures
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    held_out: int = 192  # validation pairs, and pictures that the scorer judges

    def __post_init__(self) -> None:
        require_above_zero(self, "", "beta")
        require_least(self, "", 1, "prompts", "steps", "held_out")
        require_least(self, "", 2, "candidates")
        require(not self.data.flip, "data.flip", True, "false: both pictures of a pair stay as they are")


class PreferenceTask(DiffusionTask):
    """One step on pairs. The reference is the model as it was, and frozen."""

    open_data = Pairs

    def __init__(self, config: PreferenceConfig) -> None:
        for name in ("model", "pairs"):
            require(getattr(config, name) != "", name, "", "the model to train, and the JSONL file of its pairs")
        reference = UNet.from_pretrained(config.model)
        if steps := reference.distilled_steps:
            raise UserError(f"model {config.model!r} is distilled to {steps} steps; train the model it came from")
        self.scorer = Scorer(config.scorer, config.data) if config.scorer else None
        if self.scorer:
            from_main(make_pairs, config, self.scorer, self.scorer.pose(config.prompts))
        root = find_root(config.model)
        super().__init__(
            DiffusionConfig(
                **dict.fromkeys(("vae", "text_encoder", "unet"), config.model),
                data=replace(config.data, path=config.pairs),
                schedule=read_schedule(root if root.is_file() else root / "scheduler"),
                **{name: getattr(config, name) for name in ("train", "lora", "preview", "held_out")},
            )
        )
        if len(self.dataset) < FEWEST or not len(self.held_out):
            count = f"{config.pairs!r} has {len(self.dataset)} pairs to train on and {len(self.held_out)} to validate"
            raise UserError(f"{count}; it takes {FEWEST} or more, best a thousand, and one: judge or make more")
        self.config = replace(config, train=self.config.train)
        self.reference, self.reference_score = reference.requires_grad_(False).to(self.device), None

    def images(self, batch: dict, draws: Draws) -> Tensor:
        """The images (2 B, 3, H, W) of B pairs in [-1, 1], each chosen one before the rejected one."""
        return rearrange(to_float(batch["image"]), "b pair c h w -> (b pair) c h w")

    def losses(self, modules: Modules, batch: dict, step: int, draws: Draws) -> Losses:
        """The loss of pairs at random timesteps."""
        z0, captions = self.latents(batch, draws), [texts[0] for texts in batch["captions"]]
        t = draws.rows(lambda n, g: sample_timesteps(n, len(self.schedule), "uniform", g), len(captions))
        eps = draws.randn(len(captions), *z0.shape[1:])
        yield "unet", *self.compared(modules, z0, captions, upload(t, z0.device), eps)

    def compared(
        self, modules: Modules, z0: Tensor, captions: list[str], t: Tensor, eps: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of B pairs of latents (2 B, C, h, w) at timesteps t (B,) with noise eps (B, C, h, w), both the same
        for the two of a pair; how often the implicit reward of the chosen one is higher, and the mean squared change
        of the predictions from the reference's."""
        t, eps = (x.repeat_interleave(2, 0) for x in (t, eps))
        denoiser, reference = (Denoiser(unet, self.schedule) for unet in (modules["unet"], self.reference))
        z_t, target = self.schedule.add_noise(z0, eps, t), denoiser.target(z0, eps, t)
        with self.autocast():
            with torch.no_grad():
                context = self.context(modules, captions).repeat_interleave(2, 0)
                before = reference.predict(z_t, t, context)
            after = denoiser.predict(z_t, t, context)
        gain = ((before - target).square() - (after - target).square()).flatten(1).mean(1)
        chosen, rejected = gain.unflatten(0, (-1, 2)).unbind(1)
        reward = self.config.beta * (chosen - rejected)
        values = {"accuracy": (reward > 0).float().mean(), "drift": (after.detach() - before).square().mean()}
        return -F.logsigmoid(reward).mean(), values

    def validate(self, modules: Modules) -> dict[str, float]:
        """Loss, accuracy and drift on held-out pairs, each at a fixed timestep and with fixed noise; and the scorer's
        mean score of pictures of further prompts, beside that of the reference's."""
        indices = spread(self.held_out, self.config.held_out)
        timesteps, noise = self.fixed_draws(len(indices))

        def measure(rows: slice, x: Tensor) -> Tensor:
            z0 = self.vae.normalize(self.vae.encode(rearrange(x, "b pair c h w -> (b pair) c h w")).mean)
            captions, eps = [self.held_out.captions(i)[0] for i in indices[rows]], noise[rows].to(self.device)
            loss, values = self.compared(modules, z0, captions, timesteps[rows], eps)
            return len(x) * torch.stack([loss, *values.values()]).cpu()

        means = sum(self.share(measure, self.held_out, indices)) / len(indices)
        values = dict(zip(("loss", "accuracy", "drift"), means.tolist(), strict=True))
        return values | (self.scores(modules) if self.scorer else {})

    def scores(self, modules: Modules) -> dict[str, float]:
        """The mean scores of pictures by the model and by the reference."""
        posed, options = self.scorer.pose(self.config.held_out, held_out=True), {"steps": self.config.steps}

        def score(unet: UNet) -> float:
            pipe, prompts = Pipeline(self.parts({"unet": unet})), [case.caption for case in posed]
            images = sample_shared(pipe, prompts, guidance=self.config.guidance, **options)
            return float(self.scorer(images, posed).mean())

        if self.reference_score is None:
            self.reference_score = score(self.reference)
        return {"score": score(modules["unet"]), "reference_score": self.reference_score}


class Scorer:
    """The sum of the scores of pictures by all `names`: 1 or 0 by the exact checker of shapes, cosines by judges."""

    def __init__(self, names: str, data: DataConfig) -> None:
        self.data, (*names,) = data, names.replace(" ", "").split(",")
        self.checker = "shapes" in names
        self.judges = [image_text_model(name) for name in names if name != "shapes"]

    def pose(self, count: int, held_out: bool = False) -> list[Case]:
        """About `count` prompts with what they require: the checker's cases, or captions of the data. Those to train on
        are compositions, or captions, of the training split alone."""
        if self.checker:
            posed = cases(-(-count // (len(TASKS) * (1 + held_out))), SEED + held_out)
            return [case for case in posed if held_out or not case.held_out]
        dataset = open_dataset(self.data, "val" if held_out else "train")
        captions = [dataset.captions(i)[0] for i in spread(dataset, count)]
        return [Case(task="", caption=caption, required=Scene(things=()), held_out=held_out) for caption in captions]

    def __call__(self, images: Sequence[Image.Image], posed: Sequence[Case]) -> Tensor:
        """The scores (N,) of pictures, each for its prompt."""
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        scores = torch.zeros(len(posed), dtype=torch.float64)
        if self.checker:
            right = [check(x, case.required) for x, case in zip(pixels.numpy(), posed, strict=True)]
            scores += torch.tensor(right)
        for judge in self.judges:
            x = to_float(rearrange(pixels, "n h w c -> n c h w"))
            scores += cosine(judge.images(x), judge.texts([case.caption for case in posed]))
        return scores


def make_pairs(config: PreferenceConfig, scorer: Scorer, posed: Sequence[Case]) -> None:
    """Writes the best and the worst of each prompt's pictures as PNGs beside `config.pairs`, and then that file, where
    it does not exist."""
    if (path := Path(config.pairs)).exists():
        return
    pipe, lines = Pipeline.from_pretrained(config.model), []
    folder, rng = path.parent / f"{path.stem}-pictures", random.Random(config.train.seed)
    folder.mkdir(parents=True, exist_ok=True)
    size, seed = -(-BATCH // config.candidates), config.train.seed
    pipe.compile(passes=config.steps * -(-len(posed) // size))
    for first in tqdm(range(0, len(posed), size), "sampling pairs", unit="batch"):
        asked = [case for case in posed[first : first + size] for _ in range(config.candidates)]
        prompts, begin = [case.caption for case in asked], seed + first * config.candidates
        images = pipe(prompts, steps=config.steps, guidance=config.guidance, seed=begin, batch_size=len(prompts))
        beat()
        for row, scores in enumerate(scorer(images, asked).split(config.candidates)):
            if scores.max() == scores.min():
                continue
            files = {}
            for name, place in zip(FILES, (int(scores.argmax()), int(scores.argmin())), strict=True):
                i = row * config.candidates + place
                files[name] = f"{folder.name}/{begin + i:06d}.png"
                save_png(images[i], path.parent / files[name], {"prompt": prompts[i], "seed": str(begin + i)})
            if config.shuffle and rng.random() < 0.5:
                files = dict(zip(files, reversed(files.values()), strict=True))
            split = "val" if (first + row) % HELD_OUT == 0 else "train"
            lines.append(json.dumps({"prompt": prompts[i], **files, "split": split}) + "\n")
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
