"""Measures on held-out images and captions; writes metrics.json and report.html, with images, into --out.

    a model         --model shapes --data shapes --split test --out outputs/eval-shapes
    an autoencoder  --autoencoder runs/mine/autoencoder --data folder --data-path photos --out DIR
    two folders     --images DIR --reference DIR --out DIR

Of several guidance scales one is chosen on the validation split, and the test split is reported at that one alone.
What it made is kept in --out: a run that was stopped continues there, and more captions or further guidance scales only
add what is missing. `accelerate launch scripts/evaluate.py ...` shares the work between processes.
"""

import sys
from dataclasses import fields
from importlib import import_module

from ldm.commands.cli import read_options
from ldm.config import UserError
from ldm.evaluate.config import AutoencoderEvaluation, EvaluateConfig, FolderEvaluation

# The option that chooses the kind of evaluation: its options, and the module and function that does it.
MODES = {
    "model": (EvaluateConfig, "model", "evaluate"),
    "autoencoder": (AutoencoderEvaluation, "autoencoder", "evaluate_autoencoder"),
    "images": (FolderEvaluation, "folders", "evaluate_folders"),
}


def main() -> None:
    """Reads the options of the kind of evaluation that is asked for, and runs it."""
    given = [word[2:].partition("=")[0].replace("-", "_") for word in sys.argv[1:] if word.startswith("--")]
    modes = [mode for mode in MODES if mode in given]
    if not modes and {"help"} & {*given} or "-h" in sys.argv:
        return show_help()
    if len(modes) != 1:
        raise UserError("one of --model, --autoencoder and --images is needed; see --help")
    (mode,) = modes
    options, module, function = MODES[mode]
    others = {field.name for cls, *_ in MODES.values() for field in fields(cls)} - {f.name for f in fields(options)}
    for name in given:
        if name in others:
            raise UserError(f"--{name.replace('_', '-')} has no meaning with --{mode}; leave it out")
    config = read_options(options, __doc__)
    from ldm.distributed import processes
    from ldm.evaluate.report import check_installed

    check_installed()
    lines = getattr(import_module(f"ldm.evaluate.{module}"), function)(config)
    if processes().is_main_process:
        print(*lines, f"numbers in {config.out / 'metrics.json'}, report in {config.out / 'report.html'}", sep="\n")
    processes().destroy_process_group()


def show_help() -> None:
    """The options of every kind of evaluation."""
    for i, (mode, (options, *_)) in enumerate(MODES.items()):
        try:
            read_options(options, __doc__ if i == 0 else f"With --{mode}:", ["--help"])
        except SystemExit:
            print()
