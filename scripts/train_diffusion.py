"""`ldm train diffusion`: trains the U-Net on latents and captions."""

from ldm.commands.cli import run_command
from ldm.commands.train import diffusion

if __name__ == "__main__":
    run_command(diffusion)
