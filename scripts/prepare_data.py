"""`ldm data`: builds a data set."""

from ldm.commands.cli import run_command
from ldm.commands.data import main

if __name__ == "__main__":
    run_command(main)
