"""Runs all groups, or those that are named, and prints what came out.

PYTHONPATH=tests python -m soak [--seed N] [GROUP ...]
"""

import argparse
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from soak import damage, dirty, disk, fuzz, kills, nonfinite, pair, payloads, resume
from soak.common import Child, Row

LONGEST = 1200  # seconds of a group
Group = Callable[[Path, int], list[Row]]
GROUPS: dict[str, Group] = {
    "kill": kills.kill,
    "resume": resume.run,
    "damage": damage.run,
    "disk": disk.run,
    "stop": kills.stop,
    "nonfinite": nonfinite.run,
    "payloads": payloads.run,
    "fuzz": fuzz.run,
    "pair": pair.run,
    "dirty": dirty.run,
}


def run(name: str, folder: Path, seed: int) -> list[Row]:
    """The rows of one group, in a process of its own: what breaks there breaks no other."""
    folder.mkdir()
    result = folder / "rows.pickle"
    child = Child(lambda: _inside(GROUPS[name], folder / "work", seed, result), folder / "log")
    child.end(LONGEST)
    sys.stderr.write("".join(line + "\n" for line in child.error().splitlines() if line.startswith("WRONG")))
    if result.is_file():
        return pickle.loads(result.read_bytes())
    row = Row(name)
    row.expect(False, f"the group broke off (exit code {child.process.exitcode}): {child.error()[-600:]}")
    return [row]


def _inside(group: Group, folder: Path, seed: int, result: Path) -> None:
    folder.mkdir()
    warnings.filterwarnings("error", "the checkpoint")  # a damaged one must be expected
    try:
        result.write_bytes(pickle.dumps(group(folder, seed)))
    except BaseException:
        traceback.print_exc()
        raise


def main() -> int:
    """Exit code 1 where a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.groups) - GROUPS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    rows: list[Row] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ldm-soak-") as root:
        for name in args.groups or GROUPS:
            start = time.monotonic()
            found = run(name, Path(root) / name, args.seed)
            print(f"{name}: {', '.join(row.outcome for row in found)}, {time.monotonic() - start:.0f} s", flush=True)
            rows += found
    print(f"\nSeed {args.seed}, {(time.monotonic() - begin) / 60:.1f} minutes.\n")
    print("| what | cases | outcome | in detail |\n|---|---|---|---|")
    print("\n".join(row.line() for row in rows))
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
