"""A page to make pictures in, look into a model, and judge how often people are fooled.

python scripts/app.py                        the shipped models, and finished runs under runs/
python scripts/app.py --model runs/mine/diffusion --model emoji

Needs the extra `app`: pip install -e '.[app]'. It listens on this machine alone unless --host says otherwise.
"""

import argparse
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from ldm.commands.cli import argument_parser, run_script
from ldm.config import UserError
from ldm.distributed import find_device


def parse_arguments() -> argparse.Namespace:
    """The command line; --help needs no heavy import."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--model", action="append", metavar="NAME_OR_FOLDER", default=[], help="may be given several times"
    )
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens it to everyone who can reach this machine")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/app"),
        metavar="DIR",
        help="for pictures and judgements; default: outputs/app",
    )
    parser.add_argument("--device", default="", help="default: cuda where there is one, else cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which pictures are judged; default: 0")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """UserError for what can be refused before anything is loaded."""
    if find_spec("gradio") is None:
        raise UserError("the page needs gradio: pip install -e '.[app]', or make app")
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port {args.port} is not possible: from 1 to 65535")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {str(args.out)!r} is there and is no folder; give another name")
    with socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host, args.port))
        except (OSError, socket.gaierror) as error:
            raise UserError(
                f"cannot listen on {args.host}:{args.port} ({error}); give another --port or --host"
            ) from None


def main() -> None:
    """Opens the models, then serves the page until ctrl-C."""
    args = parse_arguments()
    check(args)
    folder = args.out.resolve()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "served")  # all that is served lies here
    from PIL import Image

    from ldm.app.serve import serve
    from ldm.app.studio import Models, find_models
    from ldm.images import LIMIT

    Image.MAX_IMAGE_PIXELS = LIMIT // 2  # Pillow refuses twice as many
    models = Models(find_models(args.model), find_device(args.device))
    models[models.names[0]]  # a name that is none is said now, not in the page
    for name in models.names if args.model else ():
        models[name]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {str(args.out)!r} cannot be made ({error.strerror}); give another folder") from None
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"warning: listening on {args.host}: everyone who can reach this machine can use the page and see"
            " what others make in it; there is no password",
            file=sys.stderr,
        )
    shown = "<address of this machine>" if args.host in ("0.0.0.0", "::") else args.host
    print(f"open http://{shown}:{args.port}  (models: {', '.join(models.names)}; ctrl-C ends it)", flush=True)
    serve(models, folder, args.host, args.port, args.seed)


if __name__ == "__main__":
    run_script(main)
