"""Two auxiliary heads on the text context, trained beside CLIP and then dropped: they keep in it what a U-Net needs.

The contrastive loss reads the end token alone and is content with little more than a bag of words (Yuksekgonul et al.
2023). A U-Net reads every token: at "square" it needs its colour, and the side of the other object that it lies on.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.clip import TextConfig, VisionConfig
from ldm.distributed import Draws, upload
from ldm.layers import TransformerBlock
from ldm.train.config import require_least

BLIND = 0.5  # share of pictures that are hidden completely
SHOWN = 0.6  # in each other picture, a patch is shown with a probability drawn from [0, SHOWN)


@dataclass(frozen=True, kw_only=True)
class GroundingConfig:
    """Weights and sizes of both heads; one with weight 0 is left out."""

    words: float = 0.0  # weight of predicting the tokens before a token, a cross-entropy in nats
    picture: float = 0.0  # weight of painting the picture, a mean squared error on [-1, 1]
    window: int = 6  # tokens predicted from each one, itself included; memory grows with window times vocabulary
    layers: int = 2  # transformer blocks that paint, with the image tower's width and heads

    def __post_init__(self) -> None:
        require_least(self, "grounding.", 0, "words", "picture")
        require_least(self, "grounding.", 1, "window", "layers")


class WordHead(nn.Module):
    """Predicts from each token's context, linearly, that token and those just before it, with one map per distance (the
    structured skip-gram of Ling et al. 2015, backwards). So an adjective stays in the noun that follows it."""

    def __init__(self, text: TextConfig, window: int) -> None:
        super().__init__()
        self.window, self.end = window, text.eos_token_id
        self.distances = nn.Linear(text.hidden_size, window * text.hidden_size, bias=False)
        self.vocabulary = nn.Parameter(text.hidden_size**-0.5 * torch.randn(text.vocab_size, text.hidden_size))

    def targets(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) -> (B * L * window,): the token at each distance before each one, -1 for none and after the
        first end."""
        before = F.pad(tokens, (self.window - 1, 0), value=-1).unfold(1, self.window, 1).flip(-1)
        ends = (tokens == self.end).long()
        return before.masked_fill((ends.cumsum(1) != ends)[..., None], -1).flatten()

    def places(self, tokens: Tensor) -> Tensor:
        """Where `targets` has tokens to predict."""
        return (self.targets(tokens) >= 0).nonzero()[:, 0]

    def forward(self, context: Tensor, tokens: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """context (B, L, D), tokens (B, L), where known their `places` -> sum of the cross-entropies of the tokens
        predicted from those up to the first end, and their number."""
        maps = rearrange(self.distances(context), "b l (k d) -> (b l k) d", k=self.window)
        places = self.places(tokens) if places is None else places
        logits = (maps[places] @ self.vocabulary.T).float()  # (predictions, vocabulary)
        count = logits.new_full((), len(places))
        return F.cross_entropy(logits, self.targets(tokens)[places], reduction="sum"), count


class PictureHead(nn.Module):
    """Paints the hidden patches of a picture from the context and the patches shown: masked image modelling (Xie et al.
    2022, "SimMIM") with the caption. Where all is hidden, only the context can tell what is where."""

    def __init__(self, text: TextConfig, vision: VisionConfig, layers: int) -> None:
        super().__init__()
        self.patch, width, heads = vision.patch_size, vision.hidden_size, vision.num_attention_heads
        values = vision.num_channels * self.patch**2
        self.positions = nn.Parameter(0.5 * torch.randn((vision.image_size // self.patch) ** 2, width))
        self.hidden = nn.Parameter(0.1 * torch.randn(width))
        self.read = nn.Linear(values, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, text.hidden_size) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.paint = nn.Linear(width, values)

    def forward(self, context: Tensor, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """context (B, L, D), x (B, 3, H, W) in [-1, 1] -> sum of the mean squared errors of the hidden patches, and
        their number."""
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        share = SHOWN * draws.rand(len(x), 1) * (draws.rand(len(x), 1) >= BLIND)
        hidden = upload(draws.rand(*patches.shape[:2]) >= share, x.device)  # (B, patches)
        h = self.positions + torch.where(hidden[..., None], self.hidden, self.read(patches))
        for block in self.blocks:
            h = block(h, context)
        error = (self.paint(self.norm(h)).float() - patches).square().mean(-1)  # (B, patches)
        return (error * hidden).sum(), hidden.sum().float()


class Grounding(nn.Module):
    """Both heads, each where its weight is not 0."""

    def __init__(self, config: GroundingConfig, text: TextConfig, vision: VisionConfig) -> None:
        super().__init__()
        self.words = WordHead(text, config.window) if config.words else None
        self.picture = PictureHead(text, vision, config.layers) if config.picture else None

    def places(self, tokens: Tensor) -> Tensor | None:
        """Positions to predict; of tokens on the CPU, so that a GPU is not waited for."""
        return self.words and self.words.places(tokens)

    def forward(
        self, context: Tensor, tokens: Tensor, x: Tensor, draws: Draws, places: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """context (B, L, D), tokens (B, L), images x (B, 3, H, W) -> "words" (nats) and "picture" (squared error), each
        as the sum of its terms and their number. `places` are found where they are not given."""
        sums = {}
        if self.words:
            sums["words"] = self.words(context, tokens, places)
        if self.picture:
            sums["picture"] = self.picture(context, x, draws)
        return sums
