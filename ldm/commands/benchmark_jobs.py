"""The work of both sides of the benchmark. Diffusers gets its default attention and the faster memory layout."""

import itertools
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm import losses
from ldm.clip import CLIP, TextConfig, TextEncoder, VisionConfig
from ldm.data import DataConfig, open_dataset, stack_images
from ldm.diffusion import Schedule, ScheduleConfig
from ldm.metrics.features import feature_extractor
from ldm.model_io import find_root, read_json
from ldm.pipeline import Pipeline
from ldm.pipeline_io import Parts, save_parts
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

PROMPTS = ("a red circle above a blue square", "a green star", "a 3D emoji of a red apple", "a flat emoji of a dog")
KL, LR = 1e-4, 1e-4  # of training steps
Run = Callable[[], Any]  # one run; returns tensors by name, or PIL images


class Setting(NamedTuple):
    """What a job is built for; all jobs of one benchmark share the folder `home`."""

    ours: bool
    params: dict[str, Any]
    device: torch.device
    home: Path


def build(side: str, job: str, params: dict[str, Any], threads: int, device: str, home: str) -> Run:
    """The job of that name, ready to run."""
    torch.set_num_threads(threads)
    return globals()[job](Setting(side == "ldm", params, torch.device(device), Path(home)))


def serve(pipe: Any, run: Run) -> None:
    """Sends the seconds of a first run; then runs as often as asked and sends the seconds per run; on 0 sends the
    outputs and the peak bytes."""
    pipe.send(timed(run))
    result = None
    for repeats in iter(pipe.recv, 0):
        start = time.perf_counter()
        for _ in range(repeats):
            result = run()
        synchronize()
        pipe.send((time.perf_counter() - start) / repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send((arrays(result), torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else peak))


def arrays(result: Any) -> dict[str, np.ndarray]:
    """Tensors by name, or PIL images, as arrays."""
    if isinstance(result, list):
        return {"pictures": np.stack([np.asarray(image.convert("RGB"), dtype=float) for image in result])}
    return {name: value.detach().double().cpu().numpy() for name, value in (result or {}).items()}


def timed(run: Run) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Waits for the GPU, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def fastest_layout(model: nn.Module, run: Run) -> None:
    """Leaves the model in the memory layout in which `run` is faster, the same effort for both sides."""
    seconds = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        seconds[layout] = min([timed(run) for _ in range(3)][1:])
    model.to(memory_format=min(seconds, key=seconds.__getitem__))


# --- models and inputs, the same for both sides


def folder(s: Setting) -> Path:
    """A shipped model, or `sd-W`: Stable Diffusion 1.5's shape with widths W, 2W, 3W, 3W and random weights."""
    if not s.params["model"].startswith("sd-"):
        return find_root(s.params["model"])
    path, width = s.home / s.params["model"], int(s.params["model"].removeprefix("sd-"))
    if not path.exists():
        tokenizer = Tokenizer.train(PROMPTS, 560, 77)
        ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        sizes = {"hidden_size": 64, "intermediate_size": 256, "projection_dim": 64}
        text = TextConfig(vocab_size=len(tokenizer), num_hidden_layers=2, num_attention_heads=4, **sizes, **ends)
        widths = (width, 2 * width, 3 * width, 3 * width)
        unet = UNetConfig(block_out_channels=widths, cross_attention_dim=64, sample_size=16)
        vae = VAE(VAEConfig(block_out_channels=(32, 64, 96, 96), sample_size=128))
        schedule = ScheduleConfig(sampler="ddim", prediction_type="v_prediction", timestep_spacing="trailing")
        models = (randomize(vae), randomize(TextEncoder(text)), tokenizer, randomize(UNet(unet)))
        save_parts(path, Parts(*models, Schedule(schedule)))
    return path


def randomize(model: nn.Module) -> nn.Module:
    """Draws every parameter anew such that activations keep their size: an error anywhere shows at the end."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=generator)
            p.copy_(draw * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1 * draw + name.endswith("weight"))
    return model


def normal(s: Setting, *shape: int, seed: int = 0) -> Tensor:
    """Standard normals that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(s.device)


def pictures(s: Setting, size: int) -> Tensor:
    """Smooth pictures (B, 3, size, size) in [-1, 1]."""
    small = normal(s, s.params["batch"], 3, size // 8, size // 8)
    return F.interpolate(small, size=(size, size), mode="bilinear").tanh()


def unet_inputs(s: Setting, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """z_t (B, C, s, s), t (B,) and context (B, L, D)."""
    config, side = read_json(folder(s) / "unet" / "config.json"), s.params["side"]
    length = read_json(folder(s) / "text_encoder" / "config.json")["max_position_embeddings"]
    context = normal(s, batch, length, config["cross_attention_dim"], seed=1)
    t = torch.arange(batch, device=s.device) * 999 // max(batch - 1, 1)
    return normal(s, batch, config["in_channels"], side, side), t, context


def open_model(s: Setting, part: str) -> nn.Module:
    """The U-Net or the VAE of the side."""
    if s.ours:
        return (UNet if part == "unet" else VAE).from_pretrained(folder(s) / part).to(s.device)
    from diffusers import AutoencoderKL, UNet2DConditionModel

    cls = UNet2DConditionModel if part == "unet" else AutoencoderKL
    return cls.from_pretrained(folder(s) / part).to(s.device)


# --- inference


def ready(s: Setting, model: nn.Module, part: nn.Module, run: Run) -> Run:
    """`run` in inference mode, with the model in its faster layout, its `part` compiled if asked for."""
    run = torch.inference_mode()(run)
    model.eval().requires_grad_(False)
    fastest_layout(model, run)
    if s.params.get("compile"):
        part.compile()
    return run


def unet(s: Setting) -> Run:
    """A pass of the U-Net with guidance: twice the batch."""
    model, (z_t, t, context) = open_model(s, "unet"), unet_inputs(s, 2 * s.params["batch"])
    if s.ours:
        return ready(s, model, model, lambda: {"prediction": model(z_t, t, context)})
    return ready(s, model, model, lambda: {"prediction": model(z_t, t, context).sample})


def vae_encode(s: Setting) -> Run:
    """Pictures to moments."""
    model, x = open_model(s, "vae"), pictures(s, s.params["size"])

    def run() -> dict[str, Tensor]:
        posterior = model.encode(x) if s.ours else model.encode(x).latent_dist
        return {"mean": posterior.mean, "std": posterior.std}

    return ready(s, model, model.encoder, run)


def vae_decode(s: Setting) -> Run:
    """Raw latents to pictures."""
    model = open_model(s, "vae")
    side = s.params["size"] // 2 ** (len(model.config.block_out_channels) - 1)
    z = normal(s, s.params["batch"], model.config.latent_channels, side, side)
    return ready(s, model, model.decoder, lambda: {"x": model.decode_raw(z) if s.ours else model.decode(z).sample})


def sampling(s: Setting) -> Run:
    """Prompts to pictures by DDIM with guidance 5."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(s.params["batch"])]
    if s.ours:
        pipe = Pipeline.from_pretrained(folder(s), s.device)
        if s.params.get("compile"):
            pipe.compile()
        side = s.params["side"] * pipe.vae.factor
        fixed = {"guidance": 5.0, "sampler": "ddim", "seed": 0, "height": side, "width": side}
        return lambda: pipe(prompts, steps=25, **fixed)
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    unsafe = {"safety_checker": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline.from_pretrained(folder(s), **unsafe).to(s.device)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    side = s.params["side"] * pipe.vae_scale_factor

    def run(steps: int = 25) -> list[Image.Image]:
        noise = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        options = {"num_inference_steps": steps, "guidance_scale": 5.0, "height": side, "width": side}
        return pipe(prompts, generator=noise, **options).images

    for model in (pipe.unet, pipe.vae):
        fastest_layout(model, lambda: run(2))
    if s.params.get("compile"):
        pipe.unet.compile()
        pipe.vae.decoder.compile()
    return run


# --- training steps: forward and loss of each side, the same optimizer for both


def training(model: nn.Module, loss: Callable[[], Tensor]) -> Run:
    """A step: forward, backward, clipping, AdamW, average. Returns the first loss and gradient."""
    model.train()

    def backward() -> None:
        loss().backward()
        model.zero_grad()

    fastest_layout(model, backward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn())
    first: dict[str, Tensor] = {}

    def step() -> dict[str, Tensor]:
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not first:
            gradients = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
            first.update(loss=value.detach(), gradient=torch.cat([gradients[name] for name in sorted(gradients)]))
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        return first

    return step


def train_unet(s: Setting) -> Run:
    """The squared error of the prediction."""
    model, (z_t, t, context) = open_model(s, "unet"), unet_inputs(s, s.params["batch"])
    target = normal(s, *z_t.shape, seed=2)
    if s.ours:
        return training(model, lambda: losses.diffusion(model(z_t, t, context), target))
    return training(model, lambda: F.mse_loss(model(z_t, t, context).sample, target))


def train_vae(s: Setting) -> Run:
    """Absolute error through a sample of the latent, and KL."""
    model, x = open_model(s, "vae"), pictures(s, s.params["size"])

    def loss() -> Tensor:
        posterior = model.encode(x) if s.ours else model.encode(x).latent_dist
        z = posterior.mean + posterior.std * normal(s, *posterior.mean.shape, seed=2)
        decoded = model.decode_raw(z) if s.ours else model.decode(z).sample
        kl = losses.kl(posterior.mean, posterior.logvar) if s.ours else posterior.kl().sum() / posterior.mean.numel()
        return F.l1_loss(decoded, x) + KL * kl

    return training(model, loss)


def train_clip(s: Setting) -> Run:
    """The contrastive loss of two towers of the emoji model's sizes."""
    path = s.home / "clip"
    if not path.exists():
        sizes = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6, "projection_dim": 192}
        ends = {"bos_token_id": 2046, "eos_token_id": 2047, "pad_token_id": 2047}
        text = TextConfig(vocab_size=2048, num_hidden_layers=4, max_position_embeddings=32, **sizes, **ends)
        CLIP(text, VisionConfig(image_size=64, patch_size=8, num_hidden_layers=4, **sizes)).save_pretrained(path)
    x = pictures(s, 64)
    tokens = torch.randint(0, 2040, (len(x), 32), generator=torch.Generator().manual_seed(0)).to(s.device)
    tokens[:, 0], tokens[:, 20:] = 2046, 2047
    if s.ours:
        model = CLIP.from_pretrained(path).to(s.device)
        return training(model, lambda: losses.contrastive(*model(x, tokens)[:3]))
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(path, attn_implementation="sdpa").to(s.device)
    return training(model, lambda: model(input_ids=tokens, pixel_values=x, return_loss=True).loss)


# --- whole programs, our data sets, the features of evaluations


OURS = "pipe('a red apple', steps=25, sampler='ddim')[0]"
THEIRS = "pipe('a red apple', num_inference_steps=25, guidance_scale=5.0, generator=torch.manual_seed(0)).images[0]"


def program(s: Setting) -> Run:
    """A new Python process that imports a pipeline, and makes one picture if `draws`."""
    module, name = ("ldm", "Pipeline") if s.ours else ("diffusers", "StableDiffusionPipeline")
    code, out = f"import torch; from {module} import {name}", s.home / f"{module}.png"
    if s.params.get("draws"):
        unsafe = "" if s.ours else ", safety_checker=None, requires_safety_checker=False"
        code += f"; pipe = {name}.from_pretrained({str(find_root('emoji'))!r}{unsafe})"
        code += f"; {OURS if s.ours else THEIRS}.save({str(out)!r})"

    def run() -> list[Image.Image] | None:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.splitlines()[-1])
        return [Image.open(out)] if out.exists() else None

    return run


def data(s: Setting) -> Run:
    """Eight batches from a loader that is already running."""
    size = {"shapes": 32, "emoji": 64}[s.params["name"]]
    dataset = open_dataset(DataConfig(name=s.params["name"], size=size), "train")
    workers = {"num_workers": s.params["workers"], "persistent_workers": s.params["workers"] > 0}
    loader = torch.utils.data.DataLoader(dataset, 32, collate_fn=stack_images, **workers)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: [next(batches) for _ in range(8)] and None


def features(s: Setting) -> Run:
    """The features of a batch of pictures, resizing included."""
    extractor, x = feature_extractor("effnet-lite0").to(s.device), pictures(s, 64)
    return lambda: {"features": extractor(x)}
