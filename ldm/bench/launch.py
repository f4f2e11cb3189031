"""Times a command as a fresh process: python launch.py COMMAND... prints {"seconds", "peak" bytes, "code", "error"}.

A small process of its own, as Linux lets a new process begin with the peak of the one that starts it."""

import json
import os
import subprocess
import sys
from time import perf_counter

UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss


def launch(command: list[str]) -> dict:
    """Runs it to its end; `error` is the last line that it complained with."""
    start = perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = perf_counter() - start
    process.stderr.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    error = (complaint.strip().splitlines() or ["no message"])[-1]
    return {"seconds": seconds, "peak": usage.ru_maxrss * UNIT, "code": process.returncode, "error": error}


if __name__ == "__main__":
    print(json.dumps(launch(sys.argv[1:])))
