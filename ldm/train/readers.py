"""Two readers of the text context, trained beside CLIP and then dropped: they keep in it what a U-Net asks for.

The contrastive loss reads the end token alone and is content with little more than a bag of words (Yuksekgonul et al.
2023). A U-Net reads every token, and wants to know of "square" its colour and on which side of the other thing it lies.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.clip import TextConfig, VisionConfig
from ldm.config import require
from ldm.distributed import mean_over_processes
from ldm.layers import TransformerBlock

BLIND = 0.5  # share of pictures that are hidden whole
SHOWN = 0.6  # in each other picture, a patch is shown with a probability drawn from [0, SHOWN)


@dataclass(frozen=True, kw_only=True)
class GroundingConfig:
    """Weights and sizes of both readers; with a weight of 0 a reader is left out."""

    words: float = 0.0  # weight of telling the tokens before a token, a cross-entropy in nats
    picture: float = 0.0  # weight of painting the picture, a mean squared error on [-1, 1]
    window: int = 6  # tokens told from each one, itself included; all their logits over the vocabulary are held at once
    layers: int = 2  # transformer blocks that paint, with the image tower's width and heads

    def __post_init__(self) -> None:
        require(self.words >= 0, "grounding.words", self.words, "0 or more")
        require(self.picture >= 0, "grounding.picture", self.picture, "0 or more")
        require(self.window >= 1, "grounding.window", self.window, "1 or more")
        require(self.layers >= 1, "grounding.layers", self.layers, "1 or more")


class WordReader(nn.Module):
    """Tells from each token's context, linearly, that token and those just before it, with one map for each distance
    (the structured skip-gram of Ling et al. 2015, backwards). So an adjective stays in the noun that follows it."""

    def __init__(self, text: TextConfig, window: int):
        super().__init__()
        self.window, self.end = window, text.eos_token_id
        self.distances = nn.Linear(text.hidden_size, window * text.hidden_size, bias=False)
        self.vocabulary = nn.Parameter(text.hidden_size**-0.5 * torch.randn(text.vocab_size, text.hidden_size))

    def forward(self, context: Tensor, tokens: Tensor) -> Tensor:
        """context (B, L, D), tokens (B, L) -> mean cross-entropy of all told by tokens up to the first end."""
        told = rearrange(self.distances(context), "b l (k d) -> k b l d", k=self.window)
        ends = tokens == self.end
        inside = ends.cumsum(1) - ends.long() == 0  # (B, L): no end before it
        found, targets = [], []
        for k in range(min(self.window, tokens.shape[1])):
            found.append(told[k][:, k:][inside[:, k:]])  # (tokens, D)
            targets.append(tokens[:, : tokens.shape[1] - k][inside[:, k:]])
        logits = torch.cat(found) @ self.vocabulary.T  # (told, vocabulary)
        total = F.cross_entropy(logits.float(), torch.cat(targets), reduction="sum")
        return total / mean_over_processes(total.new_tensor(len(logits)))


class PictureReader(nn.Module):
    """Paints the hidden patches of a picture from the context and the patches shown: masked image modelling (Xie et al.
    2022, "SimMIM") told the caption. Where all is hidden, only the context can say what is where."""

    def __init__(self, text: TextConfig, vision: VisionConfig, layers: int):
        super().__init__()
        self.patch, width = vision.patch_size, vision.hidden_size
        values = vision.num_channels * vision.patch_size**2
        self.positions = nn.Parameter(0.5 * torch.randn((vision.image_size // vision.patch_size) ** 2, width))
        self.hidden = nn.Parameter(0.1 * torch.randn(width))
        self.read = nn.Linear(values, width)
        heads = vision.num_attention_heads
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, text.hidden_size) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.paint = nn.Linear(width, values)

    def forward(self, context: Tensor, x: Tensor) -> Tensor:
        """context (B, L, D), x (B, 3, H, W) in [-1, 1] -> mean squared error of the hidden patches."""
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        share = SHOWN * torch.rand(len(x), 1) * (torch.rand(len(x), 1) >= BLIND)
        hidden = (torch.rand(patches.shape[:2]) >= share).to(x.device)  # (B, patches)
        h = self.positions + torch.where(hidden[..., None], self.hidden, self.read(patches))
        for block in self.blocks:
            h = block(h, context)
        error = (self.paint(self.norm(h)).float() - patches).square().mean(-1)  # (B, patches)
        return (error * hidden).sum() / mean_over_processes(hidden.sum().float()).clamp(min=1)


class Grounding(nn.Module):
    """Both readers, each where its weight is not 0."""

    def __init__(self, config: GroundingConfig, text: TextConfig, vision: VisionConfig):
        super().__init__()
        self.config = config
        self.words = WordReader(text, config.window) if config.words else None
        self.picture = PictureReader(text, vision, config.layers) if config.picture else None

    def forward(self, context: Tensor, tokens: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """context (B, L, D), tokens (B, L), images x (B, 3, H, W) -> the weighted sum of the losses, and each alone:
        "words" (nats), "picture" (squared error)."""
        total, losses = context.new_zeros(()), {}
        if self.words is not None:
            losses["words"] = self.words(context, tokens)
            total = total + self.config.words * losses["words"]
        if self.picture is not None:
            losses["picture"] = self.picture(context, x)
            total = total + self.config.picture * losses["picture"]
        return total, losses
