"""Inputs made wrong at random: each opens or is refused in one line, within 30 seconds and 3 GB."""

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

from ldm.commands import sample
from ldm.commands.cli import run_command
from ldm.config import load
from ldm.model_io import load_tensors
from ldm.pipeline_io import load_parts
from ldm.tokenizer import Tokenizer
from ldm.train.autoencoder import AutoencoderConfig
from ldm.train.clip import CLIPConfig
from ldm.train.diffusion import DiffusionConfig
from soak.common import Row, one_error, trained

ROOT = Path(__file__).parents[2]
MEMORY, SECONDS, COUNT = 3 * 2**30, 30, 300  # limits of one input; inputs per kind
VALUES = (None, True, "", "x", "../x", "\x00", "\ud800", "é" * 300, -1, 0, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308)
VALUES += (5e-324, float("nan"), float("inf"), [], {}, [[]], [None], [1, "a"], {"a": {"b": 1}}, [0] * 1000)
TEXTS = ("<|endoftext|>", "</w>", "\u0130", "\ufeff", "\u202e", "🦊", "e\u0301", "\n", "%s", "'", '"', "\\", "漢字")
TOKENS = [json.dumps(value).encode() for value in VALUES] + [text.encode() for text in (*TEXTS, "x" * 5000)]
Draw = random.Random
MUTATIONS: tuple[Callable[[Draw, bytes, int], bytes], ...] = (  # of data, at the place i
    lambda draw, data, i: replace_token(draw, data),
    lambda draw, data, i: replace_token(draw, replace_token(draw, data)),
    lambda draw, data, i: data[:i],
    lambda draw, data, i: data[:i] + data[i + draw.randrange(1, 50) :],
    lambda draw, data, i: data[:i] + draw.randbytes(draw.randrange(1, 30)) + data[i:],
    lambda draw, data, i: data[:i] + draw.randbytes(1) + data[i + 1 :],
    lambda draw, data, i: data[:i] + draw.choice((b"[", b'{"a":', b"(", b"9")) * draw.choice((10, 5000, 200_000)),
    lambda draw, data, i: b"\n".join(draw.sample(lines := data.split(b"\n"), len(lines))),
    lambda draw, data, i: draw.choice((b"", b"\xff\xfe" + data, b"\xef\xbb\xbf" + data, bytes(4096))),
)
LINES = {  # of a command line, one option per line
    "overrides": "train.steps=9\ntrain.optimizer.lr=0.1\nvae=shapes\nfrozen=['a.*']\nmodel.block_out_channels=[8,8]",
    "options": "--prompt=a red circle\n--seed=1\n--height=32\n--guidance=3\n--guidance-rescale=0.1\n--sampler=ddim",
    "prompts": "a red circle\nzwei Grün\n",
}


def replace_token(draw: Draw, data: bytes) -> bytes:
    """A number, word or quoted text replaced by a value that is not meant there."""
    tokens = list(re.finditer(rb'"[^"]*"|[\w.+-]+', data))
    if not tokens:
        return draw.choice(TOKENS)
    token = draw.choice(tokens)
    return data[: token.start()] + draw.choice(TOKENS) + data[token.end() :]


def run(folder: Path, seed: int) -> list[Row]:
    """A row per kind of input."""
    rows = []
    trained(Row("preparation"), folder)
    signal.signal(signal.SIGALRM, _too_long)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for name, (sources, work) in _kinds(folder).items():
        rows.append(Row(f"fuzzed {name}"))
        _open_many(rows[-1], random.Random(f"{seed} {name}"), sources, work)
    return rows


def _kinds(folder: Path) -> dict[str, tuple[list[Path], Callable[[Path], object]]]:
    """Kind of input -> the files to spoil, and the work that opens one of them when it is spoiled."""
    model = Path(shutil.copytree(folder / "diffusion", folder / "copy", ignore=shutil.ignore_patterns("checkpoints")))
    weights = (model / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    size = int.from_bytes(weights[:8], "little")
    (folder / "header").write_bytes(weights[8 : 8 + size])
    for name, text in LINES.items():
        (folder / name).write_text(text)
    parts = sorted({*model.glob("*/*config.json"), model / "model_index.json"})
    configs = Path(shutil.copytree(ROOT / "configs", folder / "configs"))

    def tensors(header: Path) -> None:
        data = header.read_bytes()
        (folder / "fuzzed.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + weights[8 + size :])
        load_tensors(folder / "fuzzed.safetensors")

    def tokenizer(file: Path) -> None:
        tokenizer = Tokenizer.from_pretrained(file.parent)
        tokenizer.decode(tokenizer(["a red circle", *TEXTS], warn=False)[0])

    def config(file: Path) -> None:
        kinds = {"autoencoder": AutoencoderConfig, "diffusion": DiffusionConfig}
        load(next((kind for name, kind in kinds.items() if name in file.name), CLIPConfig), file)

    def drawn(*options: str) -> None:
        sys.argv = ["sample", "--model", str(model), "--steps=1", "--out", str(folder / "out"), *options]
        sample.main()

    def lines(file: Path) -> list[str]:
        return file.read_bytes().decode(errors="surrogateescape").split("\n")

    return {
        "safetensors": ([folder / "header"], tensors),
        "TOML configs": (sorted(configs.rglob("*.toml")), config),
        "overrides": ([folder / "overrides"], lambda file: load(DiffusionConfig, None, lines(file))),
        "tokenizer files": (sorted((model / "tokenizer").iterdir()), tokenizer),
        "configs of models": (parts, lambda _: load_parts(model)),
        "options of sampling": ([folder / "options"], lambda file: drawn(*lines(file))),
        "prompt files": ([folder / "prompts"], lambda file: drawn(f"--prompts={file}")),
    }


def _too_long(number: int, frame: object) -> None:
    raise AssertionError(f"more than {SECONDS} s")


def _open_many(row: Row, draw: Draw, sources: list[Path], work: Callable[[Path], object]) -> None:
    """Spoils and opens COUNT files; an error at the same line is reported once."""
    seen, slowest, refused = set(), 0.0, 0
    for _ in range(COUNT):
        source = draw.choice(sources)
        whole = source.read_bytes()
        spoiled = draw.choice(MUTATIONS)(draw, whole, draw.randrange(len(whole)))
        source.write_bytes(spoiled)
        start = time.monotonic()
        refusal, problem = _open(partial(work, source))
        slowest = max(slowest, time.monotonic() - start)
        source.write_bytes(whole)
        row.count += 1
        refused += refusal
        if problem and problem.split(": ")[0] not in seen:
            seen.add(problem.split(": ")[0])
            row.expect(False, f"{problem} ({source.name} {spoiled[:300]!r})")
    row.notes.append(f"{refused} refused in one line, {row.count - refused} opened; slowest {slowest:.1f} s")


def _open(work: Callable[[], object]) -> tuple[bool, str]:
    """Whether `work` was refused, and the problem with how it ended."""
    out = io.StringIO()
    signal.alarm(SECONDS)
    try:
        with redirect_stderr(out), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            run_command(work)
        return False, ""
    except SystemExit as stop:
        return True, "" if stop.code == 2 and one_error(out.getvalue()) else f"exit code {stop.code}"
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/ldm/" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return False, f"{type(error).__name__} at {where}: {str(error)[:100]}"
    finally:
        signal.alarm(0)
