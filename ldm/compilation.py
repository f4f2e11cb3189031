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
from ldm.model_io import atomic_write, cache_folder, module_hash, shrink

sys.modules.setdefault("openvino_telemetry", None)  # by which OpenVINO's converter would send usage data
Precision = Literal["float32", "bfloat16"]
LARGEST = 2**31  # bytes of all kept results; the oldest beyond that are removed
OLDEST = (2024, 4)  # release of OpenVINO
Shapes = tuple[tuple[int, ...], ...]  # of a call's inputs
COMPILING, SAVED = 8.0, 0.4  # seconds that compiling takes, and the share of the time that it saves, both about


def compiled(
    model: nn.Module, function: Callable[..., Tensor], backend: str = "", precision: Precision = "float32"
) -> Callable[..., Tensor]:
    """`function`, which runs `model` as it is now on tensors, compiled at the first call with each of their shapes.

    `backend` is "openvino" or one of torch.compile's; by default the former for a CPU where it is installed, else
    "inductor". Raises UserError for one that is missing or cannot run the model, and for bfloat16 with others.
    """
    on_cpu = is_on_cpu(model)
    backend = backend or ("openvino" if on_cpu and find_spec("openvino") else "inductor")
    if backend == "openvino":
        return OpenVINO(model, function, precision)
    if precision != "float32":
        raise UserError(f"compiling in {precision} needs OpenVINO and a CPU: pip install 'ldm[openvino]'")
    options = {"freezing": True} if backend == "inductor" and on_cpu else None
    return torch.compile(function, fullgraph=True, backend=backend, options=options)


class WhereItSaves:
    """A function that runs a model, compiled by OpenVINO for shapes whose result is kept on disk, and for others once
    their time shows that the rest of `calls` calls will repay that; without OpenVINO or on another device than a CPU,
    the function itself."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor], calls: int) -> None:
        self.model, self.function, self.left = model, function, calls
        self.network: OpenVINO | None = None
        self.chosen: set[Shapes] = set()  # that are worth compiling
        self.shapes: Shapes = ()  # of the last call that ran as it is
        self.compiled = False  # whether the last call ran compiled

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output of inputs. A lone call is not worth opening what is kept."""
        shapes = shapes_of(inputs)
        fits = inputs[0].device.type == "cpu" and inputs[0].dtype == torch.float32
        if not self.network and self.left > 1 and fits and openvino_release() >= OLDEST:
            self.network = OpenVINO(self.model, self.function, "float32")
        self.left -= 1
        self.compiled = bool(self.network) and (shapes in self.chosen or self.network.has(shapes))
        if self.compiled:
            return self.network(*inputs)
        start = perf_counter()
        output = self.function(*inputs)
        again, self.shapes = shapes == self.shapes, shapes
        # the first call prepares, and takes longer
        if self.network and again and SAVED * self.left * (perf_counter() - start) > COMPILING:
            self.chosen.add(shapes)
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
        if (release := openvino_release()) < OLDEST:
            least, installed = (".".join(map(str, numbers)) or "none" for numbers in (OLDEST, release))
            raise UserError(f"needs OpenVINO {least} or later, installed is {installed}: pip install 'ldm[openvino]'")
        if not is_on_cpu(model):
            raise UserError("OpenVINO takes models in float32 on a CPU, and these are not; use backend 'inductor'")
        self.model, self.function, self.requests, self.compiling = model, function, {}, False
        self.options = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        code = {inspect.getsource(sys.modules[type(module).__module__]) for module in model.modules()}
        code |= {path.read_text() for path in Path(__file__).parent.rglob("*.py")}
        options = getattr(model, "config", ""), getattr(model, "metadata", "")
        parts = [module_hash(model), model, *options, function.__qualname__, *sorted(code)]
        parts += [version("torch"), version("openvino"), torch.backends.cpu.get_cpu_capability(), self.options]
        self.identity = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output (B, ...) of inputs (B, ...) and scalars."""
        inputs = tuple(x.float() if x.ndim == 0 else x for x in inputs)
        shapes = shapes_of(inputs)
        padded = min((key for key in self.requests if fits(shapes, key)), default=shapes)
        if padded not in self.requests:
            self.requests[padded] = self.build(inputs).create_infer_request()
        missing = padded[0][0] - len(inputs[0])
        rows = [torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing and x.ndim else x for x in inputs]
        arrays = [x.detach().contiguous().numpy() for x in rows]
        output = self.requests[padded].infer(arrays, share_inputs=True, share_outputs=False)[0]
        return torch.from_numpy(output)[: len(inputs[0])]

    def has(self, shapes: Shapes) -> bool:
        """Whether what is compiled for these shapes is loaded or kept on disk."""
        return any(fits(shapes, key) for key in self.requests) or self.file(shapes).is_file()

    def file(self, shapes: Shapes) -> Path:
        """Where the result for these shapes is kept."""
        return cache_folder() / f"{hashlib.sha256(f'{self.identity} {shapes}'.encode()).hexdigest()}.bin"

    @kept_signal_stack()
    def build(self, inputs: tuple[Tensor, ...]) -> Any:
        """The compiled model for the shapes of `inputs`, kept before or made now."""
        import openvino

        core, shapes = openvino.Core(), shapes_of(inputs)
        file = self.file(shapes)
        with suppress(OSError, RuntimeError):  # not there, or not readable by this OpenVINO
            data = file.read_bytes()
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                os.utime(file)
                return core.import_model(data[32:], "CPU", self.options)
        name = type(self.model).__name__
        print(f"compiling the {name} for batches of {shapes[0][0]}, kept in {file.parent}", file=sys.stderr)
        self.compiling = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tracing, and that torch will drop it
                traced, sizes = Traced(self.model, self.function), [list(shape) for shape in shapes]
                model = openvino.convert_model(traced, example_input=inputs, input=sizes)
            result = core.compile_model(model, "CPU", self.options)
        finally:
            self.compiling = False
        keep(file, result.export_model().getvalue())
        return result


def is_on_cpu(model: nn.Module) -> bool:
    """Whether the parameters, if any, are on a CPU, in float32."""
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in model.parameters())


def openvino_release() -> tuple[int, ...]:
    """The year and the number of the OpenVINO that is installed; () without one."""
    return tuple(map(int, version("openvino").split(".")[:2])) if find_spec("openvino") else ()


def shapes_of(inputs: tuple[Tensor, ...]) -> Shapes:
    """The shapes of a call's inputs."""
    return tuple(tuple(x.shape) for x in inputs)


def fits(shapes: Shapes, larger: Shapes) -> bool:
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


def keep(file: Path, data: bytes) -> None:
    """Writes `data` behind its SHA-256, and removes the oldest files beyond LARGEST; in silence where that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_write(file) as temporary:
            temporary.write_bytes(hashlib.sha256(data).digest() + data)
        shrink(file.parent.glob("*.bin"), LARGEST)
    except OSError:
        pass
