"""The work of both sides of the benchmark. Diffusers gets its default attention and the faster memory layout."""

import io
import itertools
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm import losses
from ldm.clip import CLIP
from ldm.data import DataConfig, open_dataset, stack_images
from ldm.metrics.judges import JUDGES
from ldm.model_io import ASSETS, find_root, read_json
from ldm.pipeline import Pipeline
from ldm.unet import UNet
from ldm.vae import VAE

PROMPTS = ("a red circle above a blue square", "a green star", "a 3D emoji of a red apple", "a flat emoji of a dog")
Run = Callable[[], Any]  # one run; returns tensors by name, or PIL images


class Side(NamedTuple):
    """Whose code runs, and where."""

    ours: bool
    device: torch.device


def build(ours: bool, job: str, params: dict[str, Any], threads: int, device: str) -> Run:
    """The job of that name, ready to run."""
    torch.set_num_threads(threads)
    return globals()[job](Side(ours, torch.device(device)), **params)


def timed(run: Run, repeats: int = 1) -> float:
    """Seconds per run."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def outcome(run: Run) -> tuple[dict[str, np.ndarray], int]:
    """The outputs of one more run as arrays, and the peak bytes so far."""
    result = run()
    if isinstance(result, list):
        arrays = {"pictures": np.stack([np.asarray(image.convert("RGB"), dtype=float) for image in result])}
    else:
        arrays = {name: value.detach().double().cpu().numpy() for name, value in (result or {}).items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return arrays, torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else peak


def fastest_layout(model: nn.Module, run: Run) -> None:
    """Leaves the model in the memory layout in which `run` is faster, the same effort for both sides."""
    seconds = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        seconds[layout] = min([timed(run) for _ in range(3)][1:])
    model.to(memory_format=min(seconds, key=seconds.__getitem__))


# --- models and inputs, the same for both sides


def normal(s: Side, *shape: int, seed: int = 0) -> Tensor:
    """Standard normals that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(s.device)


def pictures(s: Side, batch: int, size: int) -> Tensor:
    """Smooth pictures (B, 3, size, size) in [-1, 1]."""
    small = normal(s, batch, 3, size // 8, size // 8)
    return F.interpolate(small, size=(size, size), mode="bilinear").tanh()


def open_model(s: Side, model: str, part: str) -> nn.Module:
    """The U-Net or the VAE of a shipped model."""
    if s.ours:
        network = {"unet": UNet, "vae": VAE}[part]
    else:
        network = getattr(import_module("diffusers"), {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}[part])
    return network.from_pretrained(find_root(model) / part).to(s.device)


def open_diffusers(model: str) -> Any:
    """The pipeline of diffusers on a model that ours opens too."""
    from diffusers import StableDiffusionPipeline

    options = {"safety_checker": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline.from_pretrained(find_root(model), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_unet(s: Side, model: str, size: int, batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The U-Net, and a function that returns its prediction on fixed inputs."""
    unet, root = open_model(s, model, "unet"), find_root(model)
    side = size // 2 ** (len(read_json(root / "vae" / "config.json")["block_out_channels"]) - 1)
    length = read_json(root / "text_encoder" / "config.json")["max_position_embeddings"]
    z_t = normal(s, batch, unet.config.in_channels, side, side)
    context = normal(s, batch, length, unet.config.cross_attention_dim, seed=1)
    t = torch.arange(batch, device=s.device) * 999 // max(batch - 1, 1)
    return unet, lambda: unet(z_t, t, context) if s.ours else unet(z_t, t, context).sample


# --- inference


def ready(model: nn.Module, parts: list[nn.Module], run: Run) -> Run:
    """`run` in inference mode, with the model in its faster layout and `parts` of it compiled."""
    run = torch.inference_mode()(run)
    model.eval().requires_grad_(False)
    fastest_layout(model, run)
    for part in parts:
        part.compile()
    return run


def unet(s: Side, model: str, size: int, batch: int, compile: bool = False) -> Run:
    """A pass of the U-Net with guidance: twice the batch."""
    network, predict = open_unet(s, model, size, 2 * batch)
    return ready(network, [network] * compile, lambda: {"prediction": predict()})


def vae(s: Side, model: str, size: int, batch: int, compile: bool = False) -> Run:
    """Pictures to moments, and their mean to pictures."""
    network, x = open_model(s, model, "vae"), pictures(s, batch, size)

    def run() -> dict[str, Tensor]:
        posterior = network.encode(x) if s.ours else network.encode(x).latent_dist
        decoded = network.decode_raw(posterior.mean) if s.ours else network.decode(posterior.mean).sample
        return {"mean": posterior.mean, "std": posterior.std, "x": decoded}

    return ready(network, [network.encoder, network.decoder] * compile, run)


def sampling(s: Side, model: str, size: int, batch: int, compile: bool = False) -> Run:
    """Prompts to pictures by 25 steps of DDIM with guidance 5."""
    prompts, shape = [PROMPTS[i % len(PROMPTS)] for i in range(batch)], {"height": size, "width": size}
    if s.ours:
        pipe = Pipeline.from_pretrained(model, s.device)
        if compile:
            pipe.compile()
        return lambda: pipe(prompts, steps=25, guidance=5.0, sampler="ddim", seed=0, **shape)
    from diffusers import DDIMScheduler

    pipe = open_diffusers(model).to(s.device)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def run(steps: int = 25) -> list[Image.Image]:
        noise = [torch.Generator().manual_seed(i) for i in range(batch)]
        return pipe(prompts, generator=noise, num_inference_steps=steps, guidance_scale=5.0, **shape).images

    for part in (pipe.unet, pipe.vae):
        fastest_layout(part, lambda: run(2))
    if compile:
        pipe.unet.compile()
        pipe.vae.decoder.compile()
    return run


# --- training steps: forward and loss of each side, the same optimizer for both


def training(model: nn.Module, loss: Callable[[], Tensor]) -> Run:
    """A step: forward, backward, clipping, AdamW, average. Returns the first loss and gradient norm."""
    model.train()

    def backward() -> None:
        loss().backward()
        model.zero_grad()

    fastest_layout(model, backward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn())
    first: dict[str, Tensor] = {}

    def step() -> dict[str, Tensor]:
        value = loss()
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not first:
            first.update(loss=value.detach(), norm=norm)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        return first

    return step


def train_unet(s: Side, model: str, size: int, batch: int) -> Run:
    """The squared error of the prediction."""
    network, predict = open_unet(s, model, size, batch)

    def loss() -> Tensor:
        prediction = predict()
        return (losses.diffusion if s.ours else F.mse_loss)(prediction, torch.zeros_like(prediction))

    return training(network, loss)


def train_clip(s: Side) -> Run:
    """The contrastive loss of the emoji judge's two towers."""
    if s.ours:
        model = CLIP.from_pretrained(JUDGES / "emoji").to(s.device)
    else:
        from transformers import CLIPModel

        model = CLIPModel.from_pretrained(JUDGES / "emoji", attn_implementation="sdpa").to(s.device)
    text, x = read_json(JUDGES / "emoji" / "config.json")["text_config"], pictures(s, 32, 64)
    length, bos, eos = text["max_position_embeddings"], text["bos_token_id"], text["eos_token_id"]
    tokens = (torch.arange(32 * length).view(32, length) * 31 % bos).to(s.device)
    tokens[:, 0], tokens[:, 20:] = bos, eos
    if s.ours:
        return training(model, lambda: losses.contrastive(*model(x, tokens)[:3]))
    return training(model, lambda: model(input_ids=tokens, pixel_values=x, return_loss=True).loss)


# --- whole programs, our data sets


OURS = """from ldm import Pipeline
pipe = Pipeline.from_pretrained('emoji')
pipe('a red apple', steps=25, sampler='ddim')[0].save(sys.stdout.buffer, 'PNG')"""
THEIRS = f"""from diffusers import StableDiffusionPipeline
options = dict(safety_checker=None, requires_safety_checker=False)
pipe = StableDiffusionPipeline.from_pretrained({str(ASSETS / "emoji")!r}, **options)
generator = torch.manual_seed(0)
image = pipe('a red apple', num_inference_steps=25, guidance_scale=5.0, generator=generator).images[0]
image.save(sys.stdout.buffer, 'PNG')"""


def program(s: Side) -> Run:
    """A new Python process that imports a pipeline and makes one picture."""
    code = f"import sys, torch\n{OURS if s.ours else THEIRS}"

    def run() -> list[Image.Image]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True)
        if done.returncode:
            raise RuntimeError(done.stderr.decode().splitlines()[-1])
        return [Image.open(io.BytesIO(done.stdout))]

    return run


def data(s: Side, name: str, workers: int) -> Run:
    """Eight batches from a loader that is already running."""
    dataset = open_dataset(DataConfig(name=name, size={"shapes": 32, "emoji": 64}[name]), "train")
    options = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": stack_images}
    loader = torch.utils.data.DataLoader(dataset, 32, **options)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: [next(batches) for _ in range(8)] and None
