"""`ldm plan`: projects the time and cost of a training run."""

from ldm.commands.cli import run_command
from ldm.commands.plan import main

if __name__ == "__main__":
    run_command(main)
