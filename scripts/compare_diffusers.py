"""`ldm compare`: compares a model folder with diffusers, part by part."""

from ldm.commands.cli import run_command
from ldm.commands.compare import main

if __name__ == "__main__":
    run_command(main)
