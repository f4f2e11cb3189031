"""`ldm benchmark`: measures speed and memory beside diffusers."""

from ldm.commands.benchmark import main
from ldm.commands.cli import run_command

if __name__ == "__main__":
    run_command(main)
