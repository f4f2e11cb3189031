"""Measures a model, an autoencoder or two folders of images; see --help."""

from ldm.commands.cli import run_command
from ldm.commands.evaluate import main

if __name__ == "__main__":
    run_command(main)
