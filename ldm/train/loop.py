"""The one training loop: accelerate, EMA, checkpoints, resume, logging, previews. It knows no model.

A task says what one step is (`ldm/tasks/`). Everything random in a step is drawn after seeding with
(seed, step), for the batch of all processes (`ldm/together.py`), and the order of the data is a pure function of (seed,
step): to resume is to go on, and many processes do what one would do with their batches together.
"""

from contextlib import ExitStack, closing
from pathlib import Path

from tqdm import tqdm

from ldm.config import UserError
from ldm.distributed import processes
from ldm.train import state as run_state
from ldm.train.config import OptimizerConfig, TrainConfig, due
from ldm.train.interrupt import Interrupts, Stopped
from ldm.train.memory import OutOfMemory
from ldm.train.run import Run
from ldm.train.task import Task

__all__ = ["OptimizerConfig", "Run", "Task", "TrainConfig", "processes", "train"]


def train(task: Task, config: TrainConfig, out: str | Path, resolved: dict, force: bool = False) -> None:
    """Trains `task` to `config.steps`, from the newest whole checkpoint in `out` on; ends with `task.export(out)`.

    `resolved` is the whole config as a dict, stored as `out/config.json`; UserError where a run to go on with has
    another one, unless `force`. SIGINT or SIGTERM: the step is finished and saved, then `Stopped` is raised; a second
    one ends the process at once. UserError when losses stay non-finite; nothing of such a step reaches the weights.
    """
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"{str(out)!r} is a file; --out names the run folder, which may be new")
    run = Run(task, config, Path(out))
    with ExitStack() as stack:
        if run.main:
            stack.enter_context(run_state.locked(run.out))
        interrupts = stack.enter_context(Interrupts())
        start = run.resume()
        if start >= config.steps:
            if not run.exported():  # stopped just before, or told to end earlier than it has come
                run.export()
            run.log.say(f"{run.out} is finished at step {start}; raise train.steps (now {config.steps}) to go on")
            return
        run.begin(start, resolved, force)
        _steps(run, config, start, interrupts)
        run.end()


def _steps(run: "Run", config: TrainConfig, start: int, interrupts: Interrupts) -> None:
    with (
        closing(run.batches(start)) as batches,  # whatever happens, the loader's processes end here
        tqdm(initial=start, total=config.steps, disable=not run.main, unit="step") as bar,
    ):
        for done in range(start + 1, config.steps + 1):
            try:
                run.step(batches, done - 1)
            except OutOfMemory as error:
                # the optimizer may have moved some weights; other processes would wait for this one
                if error.whole and done - 1 > start and processes().num_processes == 1:
                    run.save(done - 1)
                raise
            bar.update()
            last = done == config.steps
            if last or due(done, config.log_every):
                bar.set_postfix_str(run.log.means(done))
            if number := run.told_to_stop(interrupts):
                batches.close()  # its processes may have been told as well
                run.save(done, looked=False)
                raise Stopped(number, done)
            run.look(done)
            if last:  # before the last checkpoint, which so says that all is done
                run.export()
            if last or run.improved or due(done, config.save_every):
                run.save(done)
