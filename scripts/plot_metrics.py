"""`ldm plot`: draws the curves of runs and evaluations."""

from ldm.commands.plot import main

from ldm.commands.cli import run_command

if __name__ == "__main__":
    run_command(main)
