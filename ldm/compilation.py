"""Models compiled for the device they are on: by OpenVINO on CPUs where it is installed, else by torch's inductor.

OpenVINO's results are kept in a folder, keyed by weights, code, shapes, precision, threads and versions.
"""

import ctypes
import hashlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.config import UserError
from ldm.model_io import atomic_write, module_hash

Precision = Literal["float32", "bfloat16"]
LARGEST = 2**31  # bytes of all kept results; the oldest beyond that are removed
OLDEST = (2024, 4)  # release of OpenVINO
COMPILING, SAVED = 8.0, 0.4  # seconds that compiling takes, and the share of the time that it saves, both about


def compiled(
    model: nn.Module, function: Callable[..., Tensor], backend: str = "", precision: Precision = "float32"
) -> Callable[..., Tensor]:
    """`function`, which runs `model` as it is now on tensors, compiled at the first call with each of their shapes.

    `backend` is "openvino" or one of torch.compile's; by default the former for a CPU where it is installed, else
    "inductor". Raises UserError for one that is missing or cannot run the model, and for bfloat16 with others.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    backend = backend or ("openvino" if on_cpu and find_spec("openvino") else "inductor")
    if backend == "openvino":
        return OpenVINO(model, function, precision)
    if precision != "float32":
        raise UserError(f"compiling in {precision} needs OpenVINO and a CPU: pip install 'ldm[openvino]'")
    options = {"freezing": True} if backend == "inductor" and on_cpu else None
    return torch.compile(function, fullgraph=True, backend=backend, options=options)


class WhereItSaves:
    """A function that runs a model, and is compiled by OpenVINO once its time shows that the rest of `calls` calls will
    repay that; without OpenVINO or on another device than a CPU, the function itself."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor], calls: int) -> None:
        self.model, self.function, self.left, self.compiled = model, function, calls, None
        self.shapes: tuple[tuple[int, ...], ...] = ()  # of the last call, or those that are compiled

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output of inputs; other shapes than those that are compiled run as they are."""
        shapes, start = tuple(tuple(x.shape) for x in inputs), perf_counter()
        if self.compiled and fits(shapes, self.shapes):
            return self.compiled(*inputs)
        output = self.function(*inputs)
        self.left -= 1
        if not self.compiled and inputs[0].device.type == "cpu" and find_spec("openvino"):
            again, self.shapes = shapes == self.shapes, shapes  # a first call prepares, and takes longer
            if again and SAVED * self.left * (perf_counter() - start) > COMPILING:
                self.compiled = compiled(self.model, self.function)
        return output


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Restores this thread's stack for signal handlers. OpenVINO's compiler leaves one behind that it has freed: at the
    next signal with a handler, such as that of a loading process which ends, the program would crash."""
    sigaltstack = getattr(ctypes.CDLL(None), "sigaltstack", None) if os.name == "posix" else None
    before = ctypes.create_string_buffer(64)  # a stack_t, of which only this call knows the layout
    if sigaltstack:
        sigaltstack(None, before)
    try:
        yield
    finally:
        if sigaltstack:
            sigaltstack(before, None)


class OpenVINO:
    """A function of tensors whose first dimension is the batch, or which are scalars, with static shapes.

    A batch is padded to a larger one that has been compiled where that is at most twice as large. Raises UserError
    where OpenVINO is missing or older than OLDEST, and for a model on another device than a CPU.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Tensor], precision: Precision) -> None:
        installed = version("openvino") if find_spec("openvino") else "none"
        if installed == "none" or tuple(map(int, installed.split(".")[:2])) < OLDEST:
            least = ".".join(map(str, OLDEST))
            raise UserError(f"needs OpenVINO {least} or later, installed is {installed}: pip install 'ldm[openvino]'")
        if next(model.parameters()).device.type != "cpu":
            raise UserError("OpenVINO runs the models on CPUs alone, and these are elsewhere; use backend 'inductor'")
        self.model, self.function, self.requests = model, function, {}
        self.options = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        code = {inspect.getsource(sys.modules[type(module).__module__]) for module in model.modules()}
        code |= {path.read_text() for path in Path(__file__).parent.rglob("*.py")}
        options = getattr(model, "config", ""), getattr(model, "metadata", "")
        parts = [module_hash(model), model, *options, function.__qualname__, *sorted(code)]
        parts += [version("torch"), installed, torch.backends.cpu.get_cpu_capability(), self.options]
        self.identity = "\0".join(map(str, parts))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output (B, ...) of inputs (B, ...) and scalars."""
        inputs = tuple(x.float() if x.ndim == 0 else x for x in inputs)
        shapes = tuple(tuple(x.shape) for x in inputs)
        padded = min((key for key in self.requests if fits(shapes, key)), default=shapes)
        if padded not in self.requests:
            self.requests[padded] = self.build(inputs).create_infer_request()
        missing = padded[0][0] - len(inputs[0])
        rows = [torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing and x.ndim else x for x in inputs]
        arrays = [x.detach().contiguous().numpy() for x in rows]
        output = self.requests[padded].infer(arrays, share_inputs=True, share_outputs=False)[0]
        return torch.from_numpy(output)[: len(inputs[0])]

    @kept_signal_stack()
    def build(self, inputs: tuple[Tensor, ...]) -> Any:
        """The compiled model for the shapes of `inputs`, kept before or made now."""
        sys.modules.setdefault("openvino_telemetry", None)  # its converter would send usage data
        import openvino

        core, shapes = openvino.Core(), [list(x.shape) for x in inputs]
        key = hashlib.sha256(f"{self.identity}\0{shapes}".encode()).hexdigest()
        file = cache_folder() / f"{key}.bin"
        with suppress(OSError, RuntimeError):  # not there, or not readable by this OpenVINO
            data = file.read_bytes()
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                os.utime(file)
                return core.import_model(data[32:], "CPU", self.options)
        name = type(self.model).__name__
        print(f"compiling the {name} for batches of {shapes[0][0]}, kept in {file.parent}", file=sys.stderr)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing, and that torch will drop it
            model = openvino.convert_model(Traced(self.model, self.function), example_input=inputs, input=shapes)
        result = core.compile_model(model, "CPU", self.options)
        keep(file, result.export_model().getvalue())
        return result


def fits(shapes: tuple[tuple[int, ...], ...], larger: tuple[tuple[int, ...], ...]) -> bool:
    """Whether shapes are others with a batch that is smaller, but not below half."""
    return [s[1:] for s in shapes] == [s[1:] for s in larger] and shapes[0][0] <= larger[0][0] <= 2 * shapes[0][0]


class Traced(nn.Module):
    """A function that runs a model, as the module that OpenVINO converts."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Tensor) -> Tensor:
        """The function's output."""
        return self.function(*inputs)


def cache_folder() -> Path:
    """$LDM_CACHE, or `ldm` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm"
    return Path(os.environ.get("LDM_CACHE") or default)


def keep(file: Path, data: bytes) -> None:
    """Writes `data` behind its SHA-256, and removes the oldest files beyond LARGEST; in silence where that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_write(file) as temporary:
            temporary.write_bytes(hashlib.sha256(data).digest() + data)
        size = 0
        for old in sorted(file.parent.glob("*.bin"), key=lambda path: path.stat().st_mtime, reverse=True):
            size += old.stat().st_size
            if size > LARGEST:
                old.unlink()
    except OSError:
        pass
