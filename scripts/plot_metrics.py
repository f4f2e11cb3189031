"""`ldm plot`: draws the curves of runs and evaluations."""

from ldm.commands.cli import run_command
from ldm.commands.plot import main

if __name__ == "__main__":
    run_command(main)
