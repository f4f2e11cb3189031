"""Trainings that are killed, stopped, or run out of disk: resumed, each ends as a run left alone, bit for bit."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import tiny

from soak.common import Child, Row, Work, checkpoints, finish, identical, trained, training, watched

CONFIG = replace(tiny.TRAIN, save_every=2, keep=2, log_every=1, ema_decay=0.9)
TIMES, STEPS, BLOCK = 30, 14, 4096


def kill(folder: Path, seed: int) -> list[Row]:
    """SIGKILL at random moments: at most the steps since the last save are taken again."""
    return _interrupted(folder, seed, signal.SIGKILL)


def stop(folder: Path, seed: int) -> list[Row]:
    """SIGTERM at random moments: the step is saved, the exit code is 143."""
    return _interrupted(folder, seed, signal.SIGTERM)


def _interrupted(folder: Path, seed: int, number: signal.Signals) -> list[Row]:
    """Sends a signal to a process or its group, again and again; then the run ends as one that was left alone."""
    row, draw, out, last = Row(f"{number.name} at random moments"), random.Random(seed), folder / "run", -1
    code, again = {signal.SIGKILL: (-9, 3), signal.SIGTERM: (143, 0)}[number]
    config = replace(CONFIG, save_every=2 if again else 9, validate_every=4, steps=10**6)
    for i in range(TIMES):
        log = folder / f"log-{i}"
        child = Child(training(watched(tiny.Toy, 0.01), replace(config, workers=i % 2), out), log)
        if i % 5 or not again:  # else it may be killed while it starts
            child.wait()
        time.sleep(draw.uniform(0.0, 0.6))
        (os.killpg if i % 4 > 1 else os.kill)(child.process.pid, number)
        ended = child.end() == code and "Traceback" not in child.error()
        row.expect(ended, f"{log.name}: exit code {child.process.exitcode}: {child.error()[-200:]}")
        if steps := child.steps():
            row.expect(last + 1 - again <= steps[0] <= last + 1, f"{log.name}: resumed at {steps[0]} after {last}")
            last = steps[-1]
        row.count += 1
    finish(row, tiny.Toy, replace(config, steps=last + 11), out, folder / "end")
    straight = folder / "straight"
    finish(row, tiny.Toy, replace(config, steps=last + 11, save_every=0), straight, folder / "straight-log")
    row.expect(identical(out, straight), "other weights or log than an undisturbed run")
    row.notes.append(f"exit code {code}; after {last:,} steps bit-identical to an undisturbed run")
    return [row]


def resume(folder: Path, seed: int) -> list[Row]:
    """The three real trainings, stopped by SIGTERM or SIGKILL at random steps."""
    row, draw = Row("resume of autoencoder with discriminator, CLIP, diffusion from a cache"), random.Random(seed)
    config = replace(tiny.TRAIN, steps=STEPS, save_every=4, validate_every=5, log_every=1, ema_decay=0.9, batch_size=5)
    for name, task in trained(row, folder).items():
        for accumulate in (1, 2):
            straight = folder / f"{name}-straight-{accumulate}"
            finish(row, task, replace(config, accumulate=accumulate), straight, folder / f"{straight.name}-log")
        for number, step in enumerate(draw.sample(range(STEPS - 1), 5)):
            changed = replace(config, workers=(0, 2)[number % 2], accumulate=(1, 2)[number // 2 % 2])
            how, out = (signal.SIGTERM, signal.SIGKILL)[number % 2], folder / f"{name}-{number}"
            stopped = watched(task, stop=step, number=how)
            finish(row, stopped, changed, out, folder / f"{out.name}-stop", {15: 143, 9: -9}[how])
            finish(row, task, changed, out, folder / f"{out.name}-end")
            straight = folder / f"{name}-straight-{changed.accumulate}"
            row.expect(identical(out, straight), f"{name} at step {step}, {how.name}, {changed}: other weights or log")
            row.count += 1
    row.notes.append("0 and 2 loading processes, 1 and 2 micro-batches; tensors and log lines bit-identical")
    return [row]


def disk(folder: Path, seed: int) -> list[Row]:
    """A limit on the size of files, and full disks: exit code 2 in one line, the checkpoints stay whole."""
    limits, disks = Row("a limit on the size of files (RLIMIT_FSIZE)"), Row("a full disk (a small tmpfs)")
    config = replace(tiny.TRAIN, steps=12, save_every=2, keep=2, log_every=1, validate_every=3, preview_every=4)
    straight, base, stopped = folder / "straight", folder / "base", watched(tiny.Toy, stop=4, number=signal.SIGTERM)
    finish(limits, tiny.Toy, config, straight, folder / "straight-log")
    finish(limits, stopped, config, base, folder / "base-log", 143)

    def without_room(row: Row, where: str, out: Path, work: Work, more_room: Work) -> None:
        child = Child(work, folder / where)
        if child.end() == 0:  # it fitted
            return
        row.count += 1
        row.expect(child.refused(), f"{where}: exit code {child.process.exitcode}: {child.error()[-300:]}")
        more_room()
        finish(row, tiny.Toy, config, out, folder / f"{where}-end")
        row.expect(identical(out, straight), f"{where}: then other weights or log")

    for limit in sorted({path.stat().st_size - 1 for path in straight.rglob("*") if path.is_file()}, reverse=True):
        out = folder / f"limit-{limit}"
        shutil.copytree(base, out)

        def limited(limit: int = limit, out: Path = out) -> None:
            for stream in (sys.stdout, sys.stderr):  # another process writes the logs: the limit holds for them too
                other = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=stream)
                os.dup2(other.stdin.fileno(), stream.fileno())
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            training(tiny.Toy, config, out)()

        if limit > 4:
            without_room(limits, out.name, out, limited, lambda: None)
    mount = folder / "disk"
    mount.mkdir()
    for free in range(1, 40, 4):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount], capture_output=True).returncode:
            disks.status = "not run (a disk cannot be mounted here; root may)"
            break
        shutil.copytree(base, mount / "run")
        filling = mount / "filling"
        filling.write_bytes(bytes(shutil.disk_usage(mount).free - free * BLOCK))
        work = training(tiny.Toy, config, mount / "run")
        without_room(disks, f"full-{free}", mount / "run", work, filling.unlink)
        subprocess.run(["umount", mount], check=True)
    for row in (limits, disks):
        row.notes.append("exit code 2 in one line, then bit-identical")
    return [limits, disks]


def pair(folder: Path, seed: int) -> list[Row]:
    """Two processes that train together: where one is killed the other ends too, and both resume."""
    row, draw, out = Row("two processes, one killed by SIGKILL"), random.Random(seed), folder / "killed"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "soak.pair"]

    def start(run: Path, log: Path) -> subprocess.Popen:
        return subprocess.Popen([*launch, run], stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True)

    for number in range(2):
        before, log = len(checkpoints(out)), folder / f"kill-{number}"
        process = start(out, log)
        while process.poll() is None and (len(checkpoints(out)) <= before or log.read_text().count("pid ") < 2):
            time.sleep(0.05)
        time.sleep(draw.uniform(0.0, 0.6))
        ids = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("pid ")]
        os.kill(ids[number], signal.SIGKILL)
        code = process.wait(120)
        alive = [pid for pid in ids if Path(f"/proc/{pid}").exists()]
        text = log.read_text(errors="replace")
        row.expect(code != 0 and not alive and "SIGKILL" in text, f"kill {number}: {code}, {alive}, {text[-300:]}")
        row.count += 1
    for run in (out, folder / "straight"):
        row.expect(start(run, folder / f"{run.name}-log").wait(120) == 0, f"{run.name} did not end")
    row.expect(identical(out, folder / "straight"), "other weights or log")
    row.notes.append("the other one ended too; resumed, then bit-identical")
    return [row]
