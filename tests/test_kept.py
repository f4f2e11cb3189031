"""Models and pictures that commit 89fa4cd wrote open for ever, and its models make the pictures they made then.

`tests/kept/README.md` says how the files came about. `python tests/test_kept.py` draws the reference pictures again.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from inventory_tools import Outcome, Scripts, refuse, succeed
from PIL import Image

from ldm import Pipeline

KEPT = Path(__file__).parent / "kept"
PROMPTS = {
    "shapes": ["a red circle above a blue square", "three green stars", "a small yellow triangle"],
    "emoji": ["a 3D emoji of a red apple", "a woman scientist with dark skin tone"],
    "model": ["a red circle", "a blue star"],
}
GUIDANCES = ({"guidance": 1.0}, {"guidance": 3.0, "guidance_rescale": 0.7})


def picture(side: int) -> Image.Image:
    """A disc on a slope of colours."""
    y, x = np.mgrid[:side, :side] / side
    disc = (x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.06
    return Image.fromarray((255 * np.stack([x, y, disc], -1)).astype(np.uint8))


def draw(name: str, pipe: Pipeline) -> dict[str, list[Image.Image]]:
    """Every kind of call, 10 steps each."""
    prompts, channels = PROMPTS[name], pipe.unet.config.in_channels
    side, size = pipe.unet.config.sample_size, pipe.unet.config.sample_size * pipe.vae.factor
    calls = {
        f"{sampler or 'own'} {call['guidance']:g}": {"prompt": prompts, "sampler": sampler, **call}
        for sampler in (None, "euler_a")
        for call in GUIDANCES
    }
    edit = {"prompt": prompts[0], "image": picture(size), "negative_prompt": "blurred"}
    mask = Image.fromarray(np.uint8(255 * (np.arange(size) > size // 2)[None].repeat(size, 0)))
    calls["image"] = edit | {"strength": 0.6}
    calls["mask"] = edit | {"mask": mask, "resample": 2}
    first, last = pipe.encode_prompt(prompts[:1]), pipe.encode_prompt(prompts[-1:])
    noise = np.random.default_rng(0).standard_normal((2, channels, side, side), dtype=np.float32)
    middle = {"prompt_embeds": torch.lerp(first, last, 0.5).repeat(2, 1, 1), "latents": torch.from_numpy(noise)}
    calls["between"] = middle | {"sampler": "dpmpp_2m"}
    return {kind: pipe(**call, steps=10, seed=3) for kind, call in calls.items()}


def tiled(rows: dict[str, list[Image.Image]]) -> np.ndarray:
    """(H, W, 3): one kind of call below the other."""
    width = max(map(len, rows.values()))
    padded = [[*map(np.asarray, row), *[np.zeros_like(row[0])] * (width - len(row))] for row in rows.values()]
    return np.concatenate([np.concatenate(row, 1) for row in padded])


@pytest.mark.parametrize("name", PROMPTS)
def test_pictures_are_those_of_then(name):
    pipe = Pipeline.from_pretrained(KEPT / "model" if name == "model" else name)
    rows = draw(name, pipe)
    height = len(tiled(rows)) // len(rows)
    with Image.open(KEPT / f"{name}.png") as image:
        then = np.asarray(image).astype(int)
    far = np.abs(tiled(rows) - then).reshape(len(rows), height, -1).max((1, 2))
    assert dict(zip(rows, far.tolist(), strict=True)) == {kind: pytest.approx(0, abs=1) for kind in rows}


@pytest.mark.parametrize("path", sorted(KEPT.glob("samples/*.png")), ids=lambda path: path.stem)
def test_a_sample_says_how_to_make_it_again(path):
    with Image.open(path) as image:
        said, then = image.text, np.asarray(image).astype(int)
    numbers = {"steps": int(said["steps"]), "seed": int(said["seed"]), "guidance": float(said["guidance"])}
    words = {key: said[key] for key in ("prompt", "negative_prompt", "sampler")}
    pipe = Pipeline.from_pretrained(said["model"])
    (again,) = pipe(**words, **numbers, guidance_rescale=float(said["guidance_rescale"]))
    assert np.abs(np.asarray(again) - then).max() <= 1


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Scripts:
    """Runs scripts beside a copy of the kept files."""
    folder = tmp_path_factory.mktemp("kept")
    shutil.copytree(KEPT, folder, dirs_exist_ok=True)
    return Scripts(folder, tmp_path_factory.mktemp("logs"))


def train_diffusion(run: Scripts, *overrides: str) -> Outcome:
    return run("train_diffusion", "--config", "diffusion.toml", "--out", "new", *overrides)


def test_interpolation_by_the_script(run):
    ends = ["--prompt", PROMPTS["shapes"][0], "--prompt", PROMPTS["shapes"][1], "--seed", 1, "--seed-to", 2]
    ends += ["--interpolate", 4, "--steps", 10, "--guidance", 3]
    succeed(run("sample", "--model", "shapes", *ends, "--out", "way"))
    now = np.concatenate([np.asarray(Image.open(path)) for path in sorted((run.cwd / "way").glob("0*.png"))], 1)
    with Image.open(KEPT / "interpolation.png") as image:
        assert np.abs(now.astype(int) - np.asarray(image)).max() <= 1


def test_kept_parts_start_a_training_and_a_kept_judge_judges(run):
    succeed(train_diffusion(run, "cache=", "unet=model"))
    options = ["--model", "model", "--data", "shapes", "--num", 16, "--steps", 1, "--train-num", 16, "--guidance", 1]
    outcome = run("evaluate", *options, "--features", "judge:judge", "--judge", "none", "--out", "measured")
    assert "judge:judge" in (run.cwd / "measured/metrics.json").read_text() and succeed(outcome)


def test_an_unfinished_run_of_then_is_refused(run):
    refuse(run("train_autoencoder", "--config", "autoencoder.toml", "--out", "unfinished"), "unfinished")


def test_a_latent_cache_of_then_is_refused(run):
    refuse(train_diffusion(run, "cache=latents.safetensors", "--out", "refused"), "latents.safetensors")


if __name__ == "__main__":
    for name in PROMPTS:
        pipe = Pipeline.from_pretrained(KEPT / "model" if name == "model" else name)
        Image.fromarray(tiled(draw(name, pipe))).save(KEPT / f"{name}.png", optimize=True)
