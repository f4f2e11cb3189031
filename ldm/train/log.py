"""The record of a training run: metrics.jsonl and tensorboard, left_out.jsonl, lines above the progress bar."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ldm.distributed import all_gather_objects


class Log:
    """Means of the logged values over steps and processes; they stay on the device until a line is written."""

    def __init__(self, accelerator: Accelerator, out: Path, datasets: list[Any]) -> None:
        self.accelerator, self.out, self.main = accelerator, out, accelerator.is_main_process
        self.totals: dict[str, Tensor] = {}  # since the last line
        self.counts: dict[str, int] = {}
        self.skipped = 0  # steps since the last line
        self.faults = [d.faults for d in datasets if getattr(d, "faults", None) is not None]
        self.listed: set[str] = set()  # samples in left_out.jsonl

    def state(self) -> dict[str, Any]:
        """The values since the last line, for a checkpoint."""
        if self.totals:
            totals = self.accelerator.reduce(torch.stack(list(self.totals.values())), "mean")
            self.totals = dict(zip(self.totals, totals, strict=True))
        sums = {name: [float(total), self.counts[name]] for name, total in self.totals.items()}
        return {"sums": sums, "skipped_since_log": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        self.skipped = state["skipped_since_log"]
        for name, (total, count) in state["sums"].items():
            self.totals[name] = torch.tensor(total, device=self.accelerator.device)
            self.counts[name] = count

    def say(self, text: str) -> None:
        """Prints a line above the progress bar, once for all processes."""
        if self.main:
            tqdm.write(text)

    def add(self, tables: list[dict[str, Tensor]]) -> None:
        """Adds the values of a step to the means."""
        for name, value in ((name, value) for table in tables for name, value in table.items()):
            self.totals[name] = self.totals[name] + value if name in self.totals else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def write_means(self, step: int) -> str:
        """Writes the means since the last line; returns the losses for the progress bar."""
        means: dict[str, float] = {}
        if self.totals:
            stacked = torch.stack([total / self.counts[name] for name, total in self.totals.items()])
            means = dict(zip(self.totals, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))
        self.write(step, means | {"skipped": self.skipped})
        self.list_left_out()
        self.totals, self.counts, self.skipped = {}, {}, 0
        return " ".join(f"{name} {value:.4g}" for name, value in means.items() if name.endswith("_loss"))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl and the trackers."""
        if self.main:
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        self.accelerator.log(values, step=step)

    def note_faults(self, faults: dict[str, str]) -> None:
        """Counts samples {name: reason} that a loading process could not read. Raises UserError for too many."""
        for name, reason in faults.items():
            self.faults[0].add(name, reason)

    def list_left_out(self) -> None:
        """Adds the samples that any process has left out since the last call to left_out.jsonl."""
        mine = {k: v for faults in self.faults for k, v in faults.reasons.items() if k not in self.listed}
        new = {name: reason for table in all_gather_objects(mine) for name, reason in table.items()}
        self.note_faults(new)  # so that they become too many in all processes at once
        self.listed |= new.keys()
        if self.main and new:
            file = self.out / "left_out.jsonl"
            lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
            entries = [json.loads(line) for line in lines if line.endswith("\n")]  # a crash may leave half a line
            table = {entry["sample"]: entry["why"] for entry in entries} | new
            text = "".join(json.dumps({"sample": name, "why": reason}) + "\n" for name, reason in table.items())
            temporary = file.with_name(file.name + ".tmp")
            temporary.write_text(text)
            os.replace(temporary, file)
            self.say(f"{len(table)} samples are left out, listed in {file}")
