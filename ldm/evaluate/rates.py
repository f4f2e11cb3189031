"""An autoencoder beside other codecs, and the pictures of its report."""

import math

import torch
from einops import reduce, repeat
from torch import Tensor

from ldm.evaluate.coded import CODED, Coded, kl_nats
from ldm.evaluate.records import Record
from ldm.evaluate.report_html import Gallery, Row
from ldm.images import to_float, to_pil, to_uint8
from ldm.metrics import psnr
from ldm.metrics.codecs import CODECS, curve, nearest_to
from ldm.vae import VAE

WORST = 12  # pictures in the report


@torch.no_grad()
def rates(vae: VAE, coded: Coded, batch_size: int) -> tuple[Record, Tensor]:
    """Bytes and PSNR a picture of this autoencoder, with its latents in 8 bits and at the rate of the KL (which
    bits-back coding would reach), and of JPEG and WebP; and what the latents in 8 bits decode to, uint8."""
    some = coded.pixels[:CODED]
    device = next(vae.parameters()).device
    z = coded.mean[:CODED]
    step = 8 / 255  # 256 levels over four deviations to both sides
    levels = ((z.clamp(-4, 4) + 4) / step).round() * step - 4
    decoded = torch.cat([vae.decode(part.to(device)).cpu() for part in levels.split(batch_size)])
    kl_bytes = reduce(kl_nats(coded)[:CODED], "n c h w -> n", "sum").mean() / math.log(2) / 8
    at_kl = psnr(to_float(some), to_float(coded.sampled)).mean()
    pixels = to_uint8(decoded)
    at_8_bits = psnr(to_float(some), to_float(pixels)).mean()
    ours = [(float(math.prod(z.shape[1:])), float(at_8_bits)), (float(kl_bytes), float(at_kl))]
    value = {"latents, 8 bits": [ours[0]], "latents, KL": [ours[1]]} | {codec: curve(some, codec) for codec in CODECS}
    return {"metric": "rate_distortion", "of": "reconstructions", "value": value, "n": len(some)}, pixels


def galleries(coded: Coded) -> list[Gallery]:
    """Reconstructions, and those that are furthest off."""
    levels = psnr(to_float(coded.pixels), to_float(coded.decoded))
    titles = (
        ("Reconstructions", "Held-out pictures, and what is decoded from the mean of the latent.", range(2 * WORST)),
        ("Furthest off", "The pictures with the lowest PSNR.", levels.argsort()[:WORST].tolist()),
    )
    found = []
    for title, about, chosen in titles:
        rows = []
        for i in list(chosen)[: len(coded.pixels)]:
            pair = to_pil(to_float(torch.stack([coded.pixels[i], coded.decoded[i]])))
            pictures = list(zip(("real", "decoded"), pair, strict=True))
            rows.append(Row(caption="", pictures=pictures, note=f"{levels[i]:.1f} dB"))
        found.append(Gallery(title=title, about=about, rows=rows))
    return found


def beside_codecs(coded: Coded, as_codes: Tensor) -> Gallery:
    """Pictures from the latents in 8 bits, beside JPEG and WebP of as many bytes, or of the fewest they can do with."""
    size, rows = math.prod(coded.mean.shape[1:]), []
    for x, y in list(zip(coded.pixels, as_codes, strict=False))[:WORST]:
        others = [nearest_to(x, codec, size) for codec in CODECS]
        names = ["real", f"latents, {size} B", *(f"{c}, {used} B" for c, (used, _) in zip(CODECS, others, strict=True))]
        shown = to_float(torch.stack([x, y, *(picture for _, picture in others)]))
        levels = psnr(repeat(shown[0], "c h w -> n c h w", n=len(shown) - 1), shown[1:])
        note = f"{', '.join(f'{level:.1f}' for level in levels.tolist())} dB"
        rows.append(Row(caption="", pictures=list(zip(names, to_pil(shown), strict=True)), note=note))
    about = (
        f"From the latents in 8 bits a value, {size} bytes, and by codecs in as many bytes, or in the fewest they need."
    )
    return Gallery(title="Beside JPEG and WebP", about=about, rows=rows)
