"""A page to make pictures, look into a model, and judge how often people are fooled.

ldm app                        the shipped models, and finished runs under runs/
ldm app --model runs/mine/diffusion --model emoji

Needs gradio: pip install -e '.[app]'. It listens on this machine alone unless --host is given.
"""

import os
import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ldm.commands.cli import read_options
from ldm.config import Dtype, UserError


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """Options of `ldm app`."""

    model: tuple[str, ...] = ()  # name or folder; may be repeated
    lora: tuple[str, ...] = ()  # file of low-rank adapters, offered by its stem; may be repeated
    port: int = 7860  # 1 to 65535
    host: str = "127.0.0.1"  # 0.0.0.0 opens the page to everyone who can reach this machine
    out: Path = Path("outputs/app")  # folder for pictures and judgements
    device: str = ""  # cpu or cuda; default: cuda where available
    dtype: Dtype = "auto"  # of the weights; see `ldm sample`
    seed: int = 0  # order in which pictures are judged


def main() -> None:
    """Opens the models, then serves the page until ctrl-C."""
    options = read_options(AppOptions, __doc__)
    check(options)
    folder = options.out.resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "served")  # read when gradio is imported
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]  # gradio would ask its own page through the proxy, and the page asks nobody else
    from ldm.app.models import Models, find_models
    from ldm.app.page import LOCAL, serve

    models = Models(find_models(options.model), options.device, options.lora, options.dtype)
    for name in models.names if options.model else models.names[:1]:
        models[name]  # fails now and not in the page
    if options.host not in LOCAL:
        print(f"warning: everyone who can reach {options.host} can use the page; it has no password", file=sys.stderr)
    print(f"open http://{options.host}:{options.port}  (models: {', '.join(models.names)}; ctrl-C ends it)", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    serve(models, folder, options.host, options.port, options.seed)


def check(options: AppOptions) -> None:
    """Raises UserError for what can be refused before anything is loaded."""
    if find_spec("gradio") is None:
        raise UserError("the page needs gradio: pip install -e '.[app]', or make app")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {str(options.out)!r} is not a folder; use another name")
    if len({Path(file).stem for file in options.lora if Path(file).exists()}) < len(options.lora):
        raise UserError(f"--lora {', '.join(options.lora)}: these must be files that exist, with different names")
    if not 1 <= options.port <= 65535:
        raise UserError(f"--port is {options.port}; it must be from 1 to 65535")
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        socket.create_server((options.host, options.port), family=family).close()
    except OSError as error:
        problem = f"cannot listen on {options.host}:{options.port} ({error})"
        raise UserError(f"{problem}; use another --port or --host") from None
