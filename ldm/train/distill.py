"""Distilling a model and its guidance into a U-Net that samples in a few steps without guidance.

Progressive distillation (Salimans & Ho 2022) with guidance (Meng et al. 2023, section 3.1), in one round and on the
student's own paths from noise (Ross et al. 2011, "DAgger"): each of its steps must land where several guided steps of
the teacher do from the same point. It starts from the teacher's weights and needs captions alone.
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm import losses
from ldm.config import UserError, require
from ldm.data import DataConfig, choose_captions, spread
from ldm.diffusion import Denoiser, guided
from ldm.distributed import Draws, fsdp_requested, map_over_processes, upload
from ldm.images import captioned_grid
from ldm.pipeline import Pipeline
from ldm.pipeline_io import Parts, save_parts
from ldm.samplers import ImageNoise, ddim, make_grid
from ldm.train.config import TrainConfig, require_least
from ldm.train.diffusion import sample_shared
from ldm.train.loop import Losses, Modules, Task
from ldm.unet import UNet

PICTURES = 16  # of a preview


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """All options of `ldm train distill`."""

    teacher: str = ""  # run folder, shipped model or Stable Diffusion folder; all but its U-Net is kept
    guidance: float = 3.0  # scale of the teacher's guidance
    steps: int = 4  # of the student
    teacher_steps: int = 20  # of the teacher, a multiple of steps
    data: DataConfig = field(default_factory=DataConfig)  # only its captions are read
    train: TrainConfig = field(default_factory=TrainConfig)  # a batch is of captions, each taken through all steps
    held_out: int = 64  # validation captions

    def __post_init__(self) -> None:
        require(self.guidance >= 0, "guidance", self.guidance, "0 or more, where 1 is none")
        require_least(self, "", 1, "steps", "held_out")
        multiple = self.teacher_steps > self.steps and self.teacher_steps % self.steps == 0
        require(multiple, "teacher_steps", self.teacher_steps, f"a multiple of steps, {self.steps}, and more")


class Captions:
    """The captions of a data set, as a data set."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while a copy of it is made
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, list[str]]:
        return {"captions": self.dataset.captions(index)}


class DistillTask(Task):
    """All steps of the student from noise to pictures of a batch of captions."""

    def __init__(self, config: DistillConfig) -> None:
        super().__init__(config)
        require(config.teacher != "", "teacher", "", "the run folder (or model) to distill")
        self.teacher = Pipeline.from_pretrained(config.teacher, self.device, torch.float32)
        if steps := self.teacher.unet.distilled_steps:
            raise UserError(f"teacher {config.teacher!r} is distilled to {steps} steps; distill the model it came from")
        self.dataset, self.held_out = Captions(self.dataset), Captions(self.held_out)
        self.shape, schedule = self.teacher.latent_shape(), self.teacher.schedule
        grids = (make_grid(schedule, "ddim", n, "trailing") for n in (config.teacher_steps, config.steps))
        self.grid, self.steps = next(grids), next(grids).steps
        self.null = self.context([""])
        student = UNet.from_pretrained(config.teacher)
        student.distilled_steps = config.steps
        self.modules = {"unet": student}

    @torch.no_grad()
    def context(self, captions: list[str]) -> Tensor:
        """Captions -> context (B, L, D)."""
        tokens = upload(self.teacher.tokenizer(captions, warn=False), self.device)
        with self.autocast():
            return self.teacher.text_encoder(tokens).float()

    @torch.no_grad()
    def guide(self, z: Tensor, context: Tensor, step: int) -> Tensor:
        """z_t (B, C, h, w) where the teacher's guided steps from the start of a student's step end."""
        many = self.config.teacher_steps // self.config.steps
        end = {"to_alpha": self.steps[step].to_alpha, "to_sigma": self.steps[step].to_sigma}
        *begin, last = self.grid.steps[step * many : (step + 1) * many]
        part = replace(self.grid, steps=(*begin, last._replace(**end)))
        denoiser = Denoiser(self.teacher.unet, self.grid.schedule)
        with self.autocast():
            return ddim(guided(denoiser, context, self.null.expand_as(context), self.config.guidance), z, part, None)

    def losses(self, modules: Modules, batch: dict, step: int, draws: Draws) -> Losses:
        """The squared error of the student's steps on new paths."""
        captions = choose_captions(batch["captions"], draws.rand(len(batch["captions"])))
        yield "unet", self.loss(modules, captions, draws.randn(len(captions), *self.shape)), {}

    def loss(self, modules: Modules, captions: list[str], z: Tensor) -> Tensor:
        """The squared error of v, whatever the model predicts, at each step from noise z (B, C, h, w)."""
        context, denoiser = self.context(captions), Denoiser(modules["unet"], self.grid.schedule)
        total = z.new_zeros(())
        for i, s in enumerate(self.steps):
            # A step with a constant z0 goes to kept z_t + change z0.
            kept = s.to_sigma / s.sigma
            change = s.to_alpha - kept * s.alpha
            z0 = (self.guide(z, context, i) - kept * z) / change
            own = denoiser(z, s, context)
            total = total + losses.diffusion(own / s.sigma, z0 / s.sigma)
            z = kept * z + change * own.detach()
        return total / len(self.steps)

    def validate(self, modules: Modules) -> dict[str, float]:
        """The loss on held-out captions with fixed noise."""
        indices = spread(self.held_out, self.config.held_out)
        noise = ImageNoise(indices, self.shape, self.device)()
        captions = [self.held_out.captions(i)[0] for i in indices]

        def measure(start: int) -> float:
            rows = slice(start, start + self.batch_size)
            return float(self.loss(modules, captions[rows], noise[rows])) * len(noise[rows])

        starts = range(0, len(captions), self.batch_size)
        return {"loss": sum(map_over_processes(measure, starts, even=fsdp_requested())) / len(captions)}

    def preview(self, modules: Modules) -> Image.Image:
        """A captioned grid of the student's pictures of held-out captions, from fixed seeds."""
        prompts = [self.held_out.captions(i)[0] for i in spread(self.held_out, PICTURES)]
        images = sample_shared(Pipeline(self.parts(modules)), prompts)
        return captioned_grid(images, prompts, columns=min(8, len(prompts)))

    def parts(self, modules: Modules) -> Parts:
        """The teacher's parts with the student's U-Net, and its sampler by default."""
        schedule = copy.copy(self.teacher.schedule)
        schedule.config = replace(schedule.config, sampler="ddim", timestep_spacing="trailing")
        return self.teacher.parts._replace(unet=modules["unet"], schedule=schedule)

    def export(self, modules: Modules, folder: Path, measured: None) -> None:
        """Writes the whole pipeline into `folder`."""
        save_parts(folder, self.parts(modules))
