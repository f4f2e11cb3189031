"""Distillation: the teacher's paths and the student's steps against diffusers, what is saved, users' mistakes."""

from dataclasses import replace

import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from test_pipeline_io import open_in_diffusers
from tiny_models import arrays
from torch import Tensor, nn

from ldm.config import UserError
from ldm.model_io import ASSETS
from ldm.pipeline import Pipeline
from ldm.train.distill import DistillConfig, DistillTask
from ldm.train.loop import train

PROMPTS = ["a red circle", "a large blue star above a green square"]
CONFIG = DistillConfig(teacher="shapes", guidance=4.0, data=tiny.DATA, train=tiny.TRAIN, held_out=4)


class Predicted(nn.Module):
    """A student that predicts what it was given, whatever it is asked."""

    def __init__(self, prediction: Tensor) -> None:
        super().__init__()
        self.prediction = nn.Parameter(prediction)

    def forward(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.prediction


@pytest.mark.parametrize(("steps", "teacher_steps"), [(4, 8), (2, 10), (1, 4)])
def test_a_step_of_the_student_lands_where_diffusers_guided_teacher_does(steps, teacher_steps):
    """The path is that of diffusers' pipeline. The prediction that the loss asks for is taken from its gradient at 0,
    and stepped with diffusers' scheduler: it ends on the path."""
    task = DistillTask(replace(CONFIG, steps=steps, teacher_steps=teacher_steps))
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    path = task.path(noise, task.context(PROMPTS))

    theirs, seen = open_in_diffusers(ASSETS / "shapes"), []
    options = {"num_inference_steps": teacher_steps, "guidance_scale": 4.0, "latents": noise, "output_type": "latent"}
    theirs(PROMPTS, callback_on_step_end=lambda pipe, i, t, kept: seen.append(kept["latents"]) or kept, **options)
    ends = seen[teacher_steps // steps - 1 :: teacher_steps // steps]
    torch.testing.assert_close(torch.stack(path), torch.stack([noise, *ends]), rtol=0, atol=2e-3)

    student = Predicted(torch.zeros(2 * steps, 3, 8, 8))
    task.loss({"unet": student}, PROMPTS, noise).backward()
    target = (-student.prediction.grad * student.prediction.numel() / 2).chunk(steps)
    scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):
        landed = scheduler.step(target[i], t, path[i]).prev_sample
        torch.testing.assert_close(landed, path[i + 1], rtol=0, atol=2e-4)


def test_a_student_samples_as_it_was_distilled_here_and_in_diffusers(tmp_path):
    """In its steps without guidance where none are named, also after it is saved again."""
    task = DistillTask(replace(CONFIG, steps=2, teacher_steps=4))
    train(task, replace(tiny.TRAIN, steps=1), tmp_path / "run", {})
    pipe = Pipeline.from_pretrained(tmp_path / "run")
    pipe.save_pretrained(tmp_path / "saved")
    images = arrays(pipe(PROMPTS, seed=3))
    assert (arrays(pipe(PROMPTS, seed=3, steps=2, guidance=1.0)) == images).all()
    assert (arrays(Pipeline.from_pretrained(tmp_path / "saved")(PROMPTS, seed=3)) == images).all()
    options = {"num_inference_steps": 2, "guidance_scale": 1.0}
    options["generator"] = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    assert abs(arrays(open_in_diffusers(tmp_path / "run")(PROMPTS, **options).images) - images).max() <= 1
    with pytest.warns(UserWarning, match="guidance 3 is added"):
        pipe(PROMPTS, guidance=3.0)
    with pytest.raises(UserError, match="is distilled to 2 steps"):
        DistillTask(replace(CONFIG, teacher=str(tmp_path / "run")))
