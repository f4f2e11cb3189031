"""`ldm train autoencoder`: trains the VAE on images."""

from ldm.commands.cli import run_command
from ldm.commands.train import autoencoder

if __name__ == "__main__":
    run_command(autoencoder)
