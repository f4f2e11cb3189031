"""From a fresh process to the first picture in a file: python -m ldm.bench.first_picture ldm|script|diffusers OUT.

Imports only what each way needs."""

import runpy
import sys
from pathlib import Path

MODEL, PROMPT, STEPS, GUIDANCE = "emoji", "a 3D emoji of a red apple", 25, 5.0
ROOT = Path(__file__).parents[2]


def ours(out: Path) -> None:
    """Through the Python interface."""
    from ldm import Pipeline

    pipe = Pipeline.from_pretrained(MODEL)
    pipe(PROMPT, steps=STEPS, guidance=GUIDANCE, sampler="ddim", seed=0)[0].save(out / "picture.png")


def script(out: Path) -> None:
    """Through scripts/sample.py, which also draws a grid."""
    sys.argv = [str(ROOT / "scripts" / "sample.py"), "--model", MODEL, "--prompt", PROMPT, "--out", str(out)]
    sys.argv += ["--steps", str(STEPS), "--guidance", str(GUIDANCE), "--sampler", "ddim", "--seed", "0"]
    sys.argv += ["--device", "cpu"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def theirs(out: Path) -> None:
    """Through diffusers."""
    import torch
    from diffusers import StableDiffusionPipeline

    folder = ROOT / "ldm" / "assets" / "models" / MODEL
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    for model in (pipe.unet, pipe.vae):
        model.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    made = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **settings).images[0]
    made.save(out / "picture.png")


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    {"ldm": ours, "script": script, "diffusers": theirs}[sys.argv[1]](folder)
