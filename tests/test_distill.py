"""Distillation: where the student must land against diffusers, what is saved, users' mistakes."""

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
    """A student that predicts what it was given, the next at each call."""

    def __init__(self, *predictions: Tensor) -> None:
        super().__init__()
        self.predictions, self.called = nn.ParameterList(predictions), 0

    def forward(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.called += 1
        return self.predictions[self.called - 1]


@pytest.mark.parametrize(("steps", "teacher_steps"), [(4, 8), (2, 10), (1, 4)])
def test_a_step_lands_where_the_teachers_do_in_diffusers(steps, teacher_steps):
    """From the student's own path. What the loss asks for is read from its gradient."""
    task = DistillTask(replace(CONFIG, steps=steps, teacher_steps=teacher_steps))
    noise, *predictions = torch.randn(1 + steps, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    student = Predicted(*predictions)
    task.loss({"unet": student}, PROMPTS, noise).backward()

    pipe, z = open_in_diffusers(ASSETS / "shapes"), noise
    contexts = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    slow, fast = (DDIMScheduler.from_config(pipe.scheduler.config) for _ in range(2))
    slow.set_timesteps(teacher_steps)
    fast.set_timesteps(steps)
    for t, own, timesteps in zip(fast.timesteps, student.predictions, slow.timesteps.chunk(steps), strict=True):
        landing = z
        for each in timesteps:
            with torch.no_grad():
                text, none = (pipe.unet(landing, each, context).sample for context in contexts)
            landing = slow.step(none + 4.0 * (text - none), each, landing).prev_sample
        wanted = own.detach() - own.grad * own.numel() * steps / 2
        torch.testing.assert_close(fast.step(wanted, t, z).prev_sample, landing, rtol=0, atol=1e-3)
        z = fast.step(own.detach(), t, z).prev_sample


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
