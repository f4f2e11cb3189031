"""Model folders: `config.json` and safetensors in the layout of diffusers and transformers, strict both ways."""

import hashlib
import itertools
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.config import UserError, build, require

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_FILE = "model.safetensors"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # diffusers, transformers, transformers until 2022
EMA_KEYS = {"decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step", "use_ema_warmup"}
ASSETS = Path(__file__).parent / "assets" / "models"

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to. It replaces `path` at the end, and is removed where writing fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, atomically; bytes of file names that are not UTF-8 as JSON's escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def cache_folder() -> Path:
    """$LDM_CACHE, or `ldm` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm"
    return Path(os.environ.get("LDM_CACHE") or default)


def shrink(files: Iterable[Path], limit: float) -> None:
    """Keeps of files the newest, up to `limit` bytes, and removes the others."""
    with suppress(FileNotFoundError):  # another process does so too
        size = 0
        for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            size += path.stat().st_size
            if size > limit:
                path.unlink()


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError where the file is missing or broken."""
    try:
        return parse_object(path.read_bytes(), repr(str(path)))
    except FileNotFoundError:
        raise UserError(f"{str(path)!r} does not exist; is {str(path.parent)!r} a model folder?") from None


def parse_object(text: str | bytes, name: str) -> dict[str, Any]:
    """One JSON object. Raises UserError, naming `name`, for broken JSON or JSON of another type."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON: {error or 'nested too deeply'}") from None
    if not isinstance(value, dict):
        raise UserError(f"{name} must be a JSON object, e.g. {{...}}, not a JSON {type(value).__name__}")
    return value


def find_part(folder: str | Path, part: str) -> Path:
    """The folder of one part (`vae`, `unet`, `text_encoder`, ...): `folder` itself, or that part of a pipeline, a run
    or a shipped model. Raises UserError where there is none."""
    for candidate in (Path(folder), find_root(folder) / part):
        path = candidate / "config.json"  # a training run has one, too, without these keys
        if path.is_file() and {"_class_name", "model_type", "architectures"} & read_json(path).keys():
            return candidate
    raise UserError(f"no {part} in {str(folder)!r}: neither {part}/config.json nor a model's config.json is there")


def find_root(folder: str | Path) -> Path:
    """A model folder or file from its path, a shipped model's name, or a run, whose newest checkpoint it is until the
    run is finished. Another folder of a shipped model's name, without a model in it, does not hide that model."""
    root, shipped = Path(folder), sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))
    if str(folder) in shipped and not any(root.rglob("config.json")):
        root = ASSETS / str(folder)
    if not root.exists():
        owner, _, name = str(folder).partition("/")
        if not re.fullmatch(r"[\w.-]+", name) or not owner or Path(owner).exists():
            raise UserError(f"unknown model {str(folder)!r}: no folder, file or shipped one ({', '.join(shipped)})")
        return download(str(folder))
    newest = max((root / "checkpoints").glob("step-????????"), default=None)  # one being written is hidden
    return newest if newest and not is_finished(root, newest) else root


def download(name: str) -> Path:
    """The cached folder of a model "owner/name" of the Hugging Face hub: its parts in full precision, without single
    files that lie beside them. Raises UserError where neither has it."""
    import huggingface_hub

    kinds = ["model_index.json", *(f"*/*.{suffix}" for suffix in ("json", "txt", "safetensors"))]
    unused = ["*.fp16.*", "*non_ema*", "safety_checker/*"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=kinds, ignore_patterns=unused))
    except Exception as error:  # of the network, the hub or the name
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model {name!r} is no folder here, and the hub does not give it: {reason}") from None


def is_finished(run: Path, checkpoint: Path) -> bool:
    """Whether a run has taken all its steps and its folder has the model files of its newest checkpoint, as after the
    export at its end."""
    config = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    if int(checkpoint.name.removeprefix("step-")) < config.get("train", {}).get("steps", 0):
        return False
    files = [path for path in checkpoint.rglob("*.json") if path.name not in ("manifest.json", "state.json")]
    return all((run / file.relative_to(checkpoint)).is_file() for file in files)


def module_hash(module: nn.Module) -> str:
    """SHA-256 (hexadecimal) over the names, types, shapes and bytes of a module's sorted state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_config(folder: Path, table: dict, cls: type[Config], class_name: str, supported: dict[str, tuple]) -> Config:
    """The config of diffusers' `class_name`, in `folder`, as the dataclass `cls`.

    A key that is no field must have a value (of a list, each entry) listed in `supported`, or be None or False. Raises
    UserError for what is not supported.
    """
    path, names = folder / "config.json", {field.name for field in fields(cls)}
    if table.get("_class_name", class_name) != class_name:
        raise UserError(f"{str(folder)!r} holds a {table['_class_name']}; supported here: {class_name}")
    for key in sorted(table.keys() - names - EMA_KEYS):
        value, allowed = table[key], supported.get(key, (None, False))
        if not key.startswith("_") and any(x not in allowed for x in (value if isinstance(value, list) else [value])):
            raise UserError(f"{path}: {key} = {value!r} is not supported (supported: {str(allowed)[1:-1]})")
    values = {key: value for key, value in table.items() if key in names}
    match values.get("sample_size"):
        case None:
            values.pop("sample_size", None)
        case [height, width] if height == width:
            values["sample_size"] = width
        case 32 if class_name.startswith("UNet") and re.match(r"0\.[0-8]\.", str(table.get("_diffusers_version"))):
            values["sample_size"] = 64  # as diffusers corrects its first configs
    return build(cls, values, f"{path}: ")


def save_model(folder: str | Path, model: nn.Module, config: dict, file: str) -> None:
    """Writes the weights of one model and then its `config.json`, without which the folder is no model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / file, model.state_dict())
    write_json(folder / "config.json", config)


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Writes safetensors (contiguous, from any device), atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        # As bytes: `save_file` hides the system's errors, such as a full disk, and lets only the owner read the file.
        temporary.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"} | metadata))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file or of one of torch's, where they may be in its "state_dict"; nothing pickled is
    run. Raises UserError where the file is missing, damaged, or holds anything else."""
    try:
        if path.suffix != ".safetensors":
            table = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            return {name: x.detach() for name, x in table.get("state_dict", table).items()}
        return safetensors.torch.load_file(path)
    except Exception as error:  # broken bytes make the unpickler raise nearly anything
        reason = " ".join(str(error).split())[:200] or "it is cut short"
        raise UserError(f"{str(path)!r} is missing or damaged, or holds more than tensors: {reason}") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights in a model folder: safetensors precede `.bin`, full precision `fp16`, one file its shards. Raises
    UserError where there are none."""
    for kind, variant, stem in itertools.product(("safetensors", "bin"), ("", ".fp16"), STEMS):
        name = f"{stem}{variant}.{kind}"
        if (folder / name).is_file():
            return load_tensors(folder / name)
        for index in (folder / f"{stem}.{kind}.index{variant}.json", folder / f"{name}.index.json"):
            if index.is_file():
                files = read_json(index).get("weight_map")
                if not isinstance(files, dict):
                    raise UserError(f"{str(index)!r} has no weight_map from tensors to files")
                shards = sorted({Path(str(file)).name for file in files.values()})  # beside the index, nowhere else
                return {key: x for shard in shards for key, x in load_tensors(folder / shard).items()}
    names = f"{DIFFUSERS_FILE} or {TRANSFORMERS_FILE}"
    raise UserError(f"no weights in {str(folder)!r}: no {names}, their shards, their fp16 variants, or .bin")


class _SkipInit(TorchFunctionMode):
    """Leaves new weights undrawn. On the meta device, drawing would import torch's compiler, which takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs or {})


def load_model(
    make: Callable[[], Model],
    folder: Path,
    tensors: dict[str, Tensor],
    *configs: Any,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """The model that `make` builds from `configs`, with the weights `tensors`, in evaluation mode.

    It is built on the meta device, so that sizes in a config cost no memory before the weights fit; each weight goes
    straight to `device` and `dtype`. Raises UserError for a config that describes no model, and unless names and shapes
    of the weights are exactly the model's and all values finite.
    """
    for key, value in (item for config in configs for item in asdict(config).items() if "layers" in item[0]):
        most = max(value) if isinstance(value, tuple) else value  # each layer has a weight
        require(most <= len(tensors), key, value, f"at most {len(tensors)} in {str(folder / 'config.json')!r}")
    # Copied, since tensors of safetensors are views of the file, not aligned in memory.
    weights = {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors.items()}
    if infinite := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        fault = "are not finite (NaN or infinite)" if dtype != torch.float16 else "are not finite in float16"
        raise UserError(f"the weights in {str(folder)!r} {fault}: {', '.join(infinite)[:300]}")
    try:
        with torch.device("meta"), _SkipInit():
            model = make()
        model.load_state_dict(weights, strict=True, assign=True)
    except UserError:
        raise
    except Exception as error:  # impossible sizes raise nearly anything
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the weights in {str(folder)!r} do not fit its config: {reason}") from None
    return model.eval()
