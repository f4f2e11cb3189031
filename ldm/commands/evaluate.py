"""Measures on held-out images and captions; writes metrics.json and report.html, with images, into --out.

    a model         --model shapes --data shapes --split test --out outputs/eval-shapes
    an autoencoder  --autoencoder runs/mine/autoencoder --data folder --data-path photos --out DIR
    two folders     --images DIR --reference DIR --out DIR

Of several guidance scales one is chosen on the validation split, and the test split is reported at that one alone.
Of several samplers and numbers of steps the first is reported, and all make a curve of quality against model passes.
What it made is kept in --out: a run that was stopped continues there, and more captions, guidance scales, samplers or
steps only add what is missing. `accelerate launch scripts/evaluate.py ...` shares the work between processes.
"""

import sys
from contextlib import suppress
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
    given = [word.partition("=")[0] for word in sys.argv[1:]]
    modes = [mode for mode in MODES if f"--{mode}" in given]
    if not modes and {"-h", "--help"} & {*given}:
        for mode, (options, *_) in MODES.items():
            with suppress(SystemExit):
                read_options(options, __doc__ if mode == "model" else f"With --{mode}:", ["--help"])
        return
    if len(modes) != 1:
        raise UserError("one of --model, --autoencoder and --images is needed; see --help")
    options, module, function = MODES[modes[0]]
    try:
        config = read_options(options, __doc__)
    except UserError as error:
        raise UserError(f"with --{modes[0]}: {error}") from None
    from ldm.distributed import leave, processes
    from ldm.evaluate.report import check_installed

    process = processes()
    check_installed()
    lines = getattr(import_module(f"ldm.evaluate.{module}"), function)(config)
    if process.is_main_process:
        print(*lines, f"numbers in {config.out / 'metrics.json'}, report in {config.out / 'report.html'}", sep="\n")
    leave()
