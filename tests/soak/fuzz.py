"""2,000 inputs made wrong at random: each opens or is refused in one line, within 30 seconds and 3 GB."""

import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from ldm.commands import sample
from ldm.commands.cli import run_command
from ldm.config import load
from ldm.model_io import load_tensors, read_json
from ldm.pipeline_io import load_parts
from ldm.tokenizer import Tokenizer
from ldm.train.autoencoder import AutoencoderConfig
from ldm.train.clip import CLIPConfig
from ldm.train.diffusion import DiffusionConfig
from soak.common import Row, Work, one_error, trained

ROOT = Path(__file__).parents[2]
MEMORY, SECONDS = 3 * 2**30, 30
CONFIGS = {"autoencoder": AutoencoderConfig, "clip": CLIPConfig, "diffusion": DiffusionConfig}
KEYS = (
    "train.steps",
    "train.optimizer.lr",
    "data.size",
    "model.block_out_channels",
    "text.hidden_size",
    "train",
    "vae",
)
KEYS += ("train.optimizer", "cache", "frozen", "preview.prompts", "schedule.beta_start", "a.b.c")
OPTIONS = ("seed", "height", "width", "guidance", "guidance-rescale", "batch-size", "sampler", "negative-prompt")
OPTIONS += ("strength", "interpolate", "seed-to", "image", "mask")
SIZES = (-1, 0, 1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 10**30, -(2**63))
VALUES = (None, True, False, "", "x", "a b", "../x", "\x00", "\ud800", "é" * 300, 0.5, -0.0, 1e308, 5e-324)
VALUES += (float("nan"), float("inf"), [], {}, [[]], [None], [1, "a"], {"a": {"b": 1}}, [0] * 1000)
WORDS = (
    "a red circle",
    "<|endoftext|>",
    "<|startoftext|>",
    "</w>",
    "\u0130",
    "\ufeff",
    "\u202e",
    "🦊",
    "e\u0301\u0301",
)
WORDS += ("\x00", "\udcff", "\n", "\t", "%s", "../../x", "{0}", "'", '"', "\\", "ﬃ", "\u2028", "x" * 5000, "漢字", "١٢")


class Draw(random.Random):
    """Valid input made wrong at random: bytes, JSON trees, texts."""

    def spoil(self, data: bytes) -> bytes:
        """Bytes flipped, cut, repeated, inserted, or replaced."""
        place, kind = self.randrange(len(data) + 1), self.randrange(6)
        nested = self.choice((b"[", b'{"a":', b"(", b"<", b"9")) * self.choice((10, 5000, 200_000))
        other = (b"", b"\xff\xfe" + data, b"\xef\xbb\xbf" + data, self.randbytes(200), b"\x00" * 4096)
        changed = bytearray(data or b"\x00")
        for _ in range(self.choice((1, 2, 8, 40))):
            changed[self.randrange(len(changed))] = self.randrange(256)
        insertion, deleted = self.randbytes(self.randrange(1, 30)), self.randrange(1, 50)
        inserted, removed = data[:place] + insertion + data[place:], data[:place] + data[place + deleted :]
        return (data[:place], inserted, removed, data[:place] + nested, self.choice(other), bytes(changed))[kind]

    def hostile(self) -> Any:
        """A value that no config means."""
        return self.choice(SIZES) if self.random() < 0.5 else self.choice(VALUES)

    def json(self, value: Any) -> bytes:
        """JSON with a few values replaced, removed or added, sometimes with spoiled bytes too."""
        value = json.loads(json.dumps(value))
        for _ in range(self.choice((1, 1, 1, 2, 5))):
            if not (places := list(_places(value))):
                break
            holder, key = self.choice(places)
            kind = self.randrange(8)
            if kind == 0:
                del holder[key]
            elif kind == 1 and isinstance(holder, dict):
                holder[self.choice(("x", "", "_x", "\x00", key + "s"))] = self.hostile()
            else:
                holder[key] = self.hostile()
        data = json.dumps(value).encode()
        return self.spoil(data) if self.random() < 0.25 else data

    def text(self) -> str:
        """Words and characters that are hard on tokenizers, file names and terminals."""
        parts = [self.choice(WORDS) for _ in range(self.randrange(12))]
        parts += [chr(self.randrange(self.choice((128, 0x3000, 0x110000)))) for _ in range(5)]
        self.shuffle(parts)
        return self.choice(("", " ")).join(parts)

    def override(self) -> str:
        """`key=value` with a known key, or with anything."""
        key = self.choice(KEYS) if self.random() < 0.8 else self.text()
        texts = (json.dumps(self.hostile()), str(self.hostile()), self.text(), "[" * 3000, "9" * 5000, "{a=" * 500)
        return key + self.choice(("=", "=", "=", "", "==")) + self.choice((*texts, "1979-13-40"))

    def options(self) -> list[str]:
        """Further options of `ldm sample`."""
        numbers = [str(value) for value in (*SIZES, 0.0, 0.5, -1.0, "nan", "inf", 1e308)] * 2
        names = self.sample(OPTIONS, self.choice((0, 0, 1, 2)))
        return [f"--{name}={self.choice((*numbers, self.text()))}" for name in names]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a tree: the dict or list that holds it, and its key there."""
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [(value, key) for key, _ in pairs] + [place for _, inner in pairs for place in _places(inner)]


class Inputs:
    """Each method draws a spoiled input and returns its description and the work that opens it."""

    def __init__(self, folder: Path, draw: Draw):
        self.folder, self.draw, self.model, self.copy = folder, draw, folder / "diffusion", folder / "copy"
        shutil.copytree(self.model, self.copy, ignore=shutil.ignore_patterns("checkpoints"))

    def tensors(self) -> tuple[str, Work]:
        data = (self.model / "vae/diffusion_pytorch_model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = self.draw.json(json.loads(data[8 : 8 + size]))
        length = self.draw.choice((len(header),) * 4 + (len(header) + 1, 0, 2**31, 2**63 - 1, 2**64 - 1))
        spoiled = length.to_bytes(8, "little") + header + data[8 + size :]
        path = self.folder / "fuzzed.safetensors"
        path.write_bytes(spoiled if self.draw.random() < 0.7 else self.draw.spoil(data[: size + 300]))
        return "tensors", lambda: load_tensors(path)

    def toml(self) -> tuple[str, Work]:
        path = self.draw.choice(sorted((ROOT / "configs").glob("*/*.toml")))
        kind = next((c for name, c in CONFIGS.items() if name in path.name), CLIPConfig)
        lines, value = path.read_bytes().split(b"\n"), json.dumps(self.draw.hostile()).encode()
        if self.draw.random() < 0.5:
            self.draw.shuffle(lines)
        if self.draw.random() < 0.5:
            lines = [line.split(b"=")[0] + b"= " + value if self.draw.random() < 0.1 else line for line in lines]
        data, fuzzed = b"\n".join(lines), self.folder / "fuzzed.toml"
        fuzzed.write_bytes(self.draw.spoil(data) if self.draw.random() < 0.6 else data)
        return path.name, lambda: load(kind, fuzzed, [])

    def overrides(self) -> tuple[str, Work]:
        items = [self.draw.override() for _ in range(self.draw.choice((1, 1, 2, 4)))]
        kind = self.draw.choice(list(CONFIGS.values()))
        return " ".join(items), lambda: load(kind, None, items)

    def tokenizer(self) -> tuple[str, Work]:
        folder, texts = self.folder / "tokenizer", ["a red circle", self.draw.text()]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.model / "tokenizer", folder)
        if self.draw.random() < 0.3:  # tokenizer.json as well as the vocabulary and the merges
            vocab, merges = read_json(folder / "vocab.json"), (folder / "merges.txt").read_text().splitlines()[1:]
            model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": merges}
            added = [{"id": vocab["<|endoftext|>"], "content": "<|endoftext|>", "special": True, "normalized": False}]
            table = {"model": model, "added_tokens": added, "normalizer": None}
            (folder / "tokenizer.json").write_bytes(json.dumps(table).encode())
        path = self.draw.choice(sorted(folder.iterdir()))
        spoiled = self.draw.json(read_json(path)) if path.suffix == ".json" else self.draw.spoil(path.read_bytes())
        path.write_bytes(spoiled)
        return path.name, lambda: (t := Tokenizer.from_pretrained(folder)).decode(t(texts, warn=False)[0])

    def config(self) -> tuple[str, Work]:
        names = [f"{part}/config.json" for part in ("vae", "text_encoder", "unet")] * 2
        name = self.draw.choice([*names, "scheduler/scheduler_config.json", "model_index.json"])
        data = self.draw.json(read_json(self.model / name))

        def work() -> None:
            try:
                (self.copy / name).write_bytes(data)
                load_parts(self.copy)
            finally:
                shutil.copyfile(self.model / name, self.copy / name)

        return f"{name} {data[:2000].decode(errors='replace')}", work

    def sampling(self, *options: str) -> tuple[str, Work]:
        line = ["sample.py", "--model", str(self.copy), "--steps", "1", "--out", str(self.folder / "out"), *options]

        def work() -> None:
            sys.argv = line
            sample.main()

        return " ".join(options), work

    def prompts(self) -> tuple[str, Work]:
        texts = [self.draw.text() for _ in range(self.draw.choice((1, 1, 1, 3)))]
        return self.sampling(*(f"--prompt={text}" for text in texts), *self.draw.options())

    def prompt_file(self) -> tuple[str, Work]:
        path, lines = self.folder / "prompts.txt", [self.draw.text() for _ in range(self.draw.choice((1, 2, 6)))]
        data = "\n".join(lines).encode(self.draw.choice(("utf-8", "utf-8", "utf-16")), errors="surrogatepass")
        path.write_bytes(self.draw.spoil(data) if self.draw.random() < 0.4 else data)
        return self.sampling(f"--prompts={path}")

    def command(self, number: int) -> list[str]:
        """A command line; a null byte, which no shell passes, is left out."""
        if number % 2:
            line = ["sample", "--model=copy", "--steps=1", "--out=out", f"--prompt={self.draw.text()[:2000]}"]
            line += self.draw.options()
        else:
            name, path = list(CONFIGS)[number // 2 % 3], self.folder / f"command-{number}.toml"
            data = (ROOT / "configs/shapes" / f"{name}.toml").read_bytes()
            path.write_bytes(self.draw.spoil(data) if number % 4 else data)
            line = ["train", name, "--config", path.name, "--out", "new", self.draw.override()]
            line += ["data.name=folder", "data.path=no"]  # so that a valid one ends too
        return [text.replace("\x00", "").encode(errors="replace").decode() for text in line]


def run(folder: Path, seed: int) -> list[Row]:
    """A row per kind of input, and one for commands in processes of their own."""
    rows = [Row("fuzzed safetensors")]
    trained(rows[0], folder)
    inputs = Inputs(folder, Draw(seed))
    kinds = {"TOML configs": (inputs.toml, 300), "overrides": (inputs.overrides, 300)}
    kinds |= {"tokenizer files": (inputs.tokenizer, 300), "config.json of models": (inputs.config, 300)}
    kinds |= {"prompts and options of sampling": (inputs.prompts, 250), "prompt files": (inputs.prompt_file, 150)}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.signal(signal.SIGALRM, _too_long)
    _open_many(rows[0], inputs.tensors, 400)
    for name, (make, count) in kinds.items():
        rows.append(Row(f"fuzzed {name}"))
        _open_many(rows[-1], make, count)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    rows.append(Row("fuzzed command lines"))
    for number in range(20):
        line = inputs.command(number)
        done = subprocess.run(
            [sys.executable, "-m", "ldm", *line],
            capture_output=True,
            cwd=folder,
            timeout=300,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        error = done.stderr.decode(errors="replace")
        fine = done.returncode in (0, 2) and "Traceback" not in error and one_error(error) == (done.returncode == 2)
        rows[-1].expect(fine, f"{line}: exit code {done.returncode}: {error[-300:]}")
        rows[-1].count += 1
    return rows


def _too_long(number: int, frame: object) -> None:
    raise AssertionError(f"more than {SECONDS} s")


def _open_many(row: Row, make: Callable[[], tuple[str, Work]], count: int) -> None:
    """Counts how the inputs end; an error at the same line is reported once."""
    seen, slowest, refused = set(), 0.0, 0
    for _ in range(count):
        name, work = make()
        start = time.monotonic()
        refusal, problem = _open(work)
        slowest = max(slowest, time.monotonic() - start)
        row.count += 1
        refused += refusal
        if problem and problem.split(": ")[0] not in seen:
            seen.add(problem.split(": ")[0])
            row.expect(False, f"{problem} ({name[:300]!r})")
    row.notes.append(f"{refused} refused in one line, {row.count - refused} opened; slowest {slowest:.1f} s")


def _open(work: Work) -> tuple[bool, str]:
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
