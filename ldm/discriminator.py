"""The patch discriminator that sharpens the autoencoder's reconstructions."""

from itertools import pairwise

from torch import Tensor, nn

from ldm.config import UserError


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, section 3.2.2): one logit per overlapping patch of the image.

    `layers` halvings, each doubling the channels up to eight times `channels`, then two convolutions of stride 1; with
    3 layers a logit sees 70x70 pixels. GroupNorm replaces the paper's BatchNorm, which lets the discriminator separate
    real from generated batches by their statistics, needs syncing over processes, is noisy at small batches, and whose
    running statistics the generator's step would move.

    Raises UserError unless `channels` is a positive multiple of 4 and `layers` at least 1.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        if channels < 4 or channels % 4 or layers < 1:
            allowed = "channels must be a positive multiple of 4 (8 groups on twice as many), layers at least 1"
            raise UserError(f"discriminator of {channels} channels and {layers} layers: {allowed}")
        self.smallest = 3 * 2**layers  # pixels of a side that has a logit
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        self.net = nn.Sequential(nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2))
        for i, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
            # GroupNorm has its own shift, so the convolution needs no bias
            self.net.append(nn.Conv2d(fan_in, fan_out, 4, 2 if i < layers else 1, 1, bias=False))
            self.net.append(nn.GroupNorm(8, fan_out))
            self.net.append(nn.LeakyReLU(0.2))
        self.net.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for parameter in self.net.parameters():  # Isola et al. 2017, section 6.2
            if parameter.ndim == 4:
                nn.init.normal_(parameter, 0.0, 0.02)
        nn.init.zeros_(self.net[0].bias)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> logits (B, 1, H/2^layers - 2, W/2^layers - 2); high means real."""
        return self.net(x)
