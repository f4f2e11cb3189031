"""`ldm train clip`: trains the text encoder on captioned images."""

from ldm.commands.cli import run_command
from ldm.commands.train import clip

if __name__ == "__main__":
    run_command(clip)
