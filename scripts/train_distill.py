"""`ldm train distill`: distills a model into one that samples in a few steps."""

from ldm.commands.cli import run_command
from ldm.commands.train import distill

if __name__ == "__main__":
    run_command(distill)
