"""`ldm train preference`: trains the U-Net on pairs of pictures of which one is preferred."""

from ldm.commands.cli import run_command
from ldm.commands.train import preference

if __name__ == "__main__":
    run_command(preference)
