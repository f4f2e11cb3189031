"""Runs scripts/*.py as a user does, each in a process of its own without paying for `import torch` every time, and
looks at what they leave."""

import functools
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops

ROOT = Path(__file__).parents[1]

# The server: imports the libraries, then forks one child per command, so that a script starts in a tenth of a second.
# It never imports ldm: every child does that anew.
SERVER = """
import json, os, runpy, sys, time, traceback
import accelerate, einops, numpy, PIL.Image, regex, safetensors.torch, scipy, sklearn, torch, tqdm
import torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor, torch.utils.tensorboard

def child(request):
    os.chdir(request["cwd"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(request["logs"], name), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), number)
    sys.argv = request["argv"]
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        child(request)
    if request["signal"]:
        deadline = time.monotonic() + 60
        while not os.path.exists(request["when"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(pid, request["signal"])
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Outcome(NamedTuple):
    """What a finished command left: its exit code and its two streams."""

    code: int
    out: str
    err: str


@functools.cache
def server() -> subprocess.Popen:
    """One for all tests, on one core and without an accelerator; it ends with this process, whose pipe it reads."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", SERVER], env=environment, **pipes)


class Scripts:
    """Runs `scripts/NAME.py ARGUMENTS` in the folder `cwd`."""

    def __init__(self, cwd: Path, logs: Path):
        self.cwd, self.logs = cwd, logs

    def __call__(self, name: str, *arguments: object, signal: int = 0, when: str = "") -> Outcome:
        """Runs a script to its end; `signal` is sent to it as soon as the file `when` exists."""
        argv = [str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
        request = {"argv": argv, "cwd": str(self.cwd), "logs": str(self.logs)}
        request |= {"signal": int(signal), "when": str(self.cwd / when)}
        server().stdin.write(json.dumps(request) + "\n")
        server().stdin.flush()
        code = int(server().stdout.readline())
        out, err = ((self.logs / stream).read_text(errors="replace") for stream in ("stdout", "stderr"))
        return Outcome(code, out, err)


def succeed(outcome: Outcome) -> str:
    """The standard output of a command that must have ended well."""
    assert outcome.code == 0 and "Traceback" not in outcome.err, outcome.err[-3000:]
    return outcome.out


def refuse(outcome: Outcome, *words: str) -> None:
    """A user's mistake: exit code 2 and one line on standard error that holds all `words`."""
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.code == 2 and len(lines) == 1 and "Traceback" not in outcome.err, outcome.err[-3000:]
    missing = [word for word in words if word not in lines[0]]
    assert not missing, (missing, lines[0])


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoints(folder: Path) -> list[str]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path.name for path in (folder / "checkpoints").glob("[!.]*"))


def flat(table: dict, prefix: str = "") -> dict[str, object]:
    """A nested table with dotted keys."""
    found: dict[str, object] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def difference(a: Image.Image, b: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(a, b).getextrema())


def own_images(folder: Path) -> None:
    """A captioned folder in three splits, one broken picture in it, and the same as tar shards."""
    for split, count in (("train", 110), ("val", 4), ("test", 16)):
        (folder / split).mkdir(parents=True)
        lines = []
        for i in range(count):
            Image.new("RGB", (40, 36), (2 * i, 90, 220 - 2 * i)).save(folder / split / f"{i}.jpg")
            lines.append(json.dumps({"file_name": f"{i}.jpg", "text": [f"colour number {i}", f"a plain {split} {i}"]}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "train" / "0.jpg").write_bytes(b"not a picture")
    with tarfile.open(folder.parent / "shards.tar", "w") as tar:
        for i in range(40):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (i * 6, 90, 200 - i * 5)).save(buffer, "PNG")
            for name, data in ((f"{i:03d}.png", buffer.getvalue()), (f"{i:03d}.txt", f"shade {i}".encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
