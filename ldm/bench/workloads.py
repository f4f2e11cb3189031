"""All that is measured, as data, with what is aimed at. Imports nothing heavy."""

from dataclasses import replace

from ldm.bench.cases import GRADIENT, PICTURE, Case, Target
from ldm.config import UserError

WORKLOADS = (
    "import",
    "cold-start",
    "unet-forward",
    "sampling",
    "vae-encode",
    "vae-decode",
    "train-unet",
    "train-clip",
    "train-vae",
    "step-share",
    "data",
    "features",
    "growth",
)
AT_MOST_THEIRS = Target(figure="memory", limit=1.0, at_least=False)


def process_cases() -> list[Case]:
    """Imports, and from nothing to the first picture."""
    at_most = Target(figure="slower", limit=1.3, at_least=False)
    ours = ("-c", "import ldm; from ldm import Pipeline")
    shared = {"tolerance": None, "quick": True}
    imports = [
        Case(
            name="import/ldm and its Pipeline, against torch",
            commands={"ldm": ours, "torch": ("-c", "import torch")},
            sides=("ldm", "torch"),
            targets=(at_most,),
            **shared,
        ),
        Case(
            name="import/the pipeline of each",
            commands={"ldm": ours, "diffusers": ("-c", "from diffusers import StableDiffusionPipeline")},
            **shared,
        ),
    ]
    first = {"diffusers": ("-m", "ldm.bench.first_picture", "diffusers")}
    cold = [
        ("Python", ("-m", "ldm.bench.first_picture", "ldm")),
        ("scripts/sample.py", ("-m", "ldm.bench.first_picture", "script")),
    ]
    return imports + [
        Case(
            name=f"cold-start/first 64 px picture by {how}",
            commands={"ldm": command} | first,
            tolerance=PICTURE,
            targets=(Target(figure="ratio", limit=2.5),),
            share=0.6,
        )
        for how, command in cold
    ]


def forward_cases() -> list[Case]:
    """One guided pass of the U-Net: one picture, with and without the prompt."""
    guided = "the context is prepared once a picture, outside"
    cases = [
        Case(
            name=f"unet-forward/{model} {side}x{side}",
            kind="unet",
            params={"model": model, "side": side, "batch": 1, "guided": True},
            note=guided,
            quick=model == "shapes",
        )
        for model, side in (("shapes", 8), ("emoji", 8), ("sd-32", 16), ("sd-32", 32), ("sd-32", 64))
    ]
    plain = {"model": "sd-32", "side": 32, "batch": 2, "guided": False}
    note = "two different latents, raw context"
    return [*cases, Case(name="unet-forward/sd-32 32x32, plain", kind="unet", params=plain, note=note)]


def sampling_cases() -> list[Case]:
    """From prompts to pictures: 25 steps of ddim, guidance 5."""
    cases = []
    for model, side, aim in (
        ("shapes", 8, 2.5),
        ("emoji", 8, 2.5),
        ("sd-32", 16, 2.5),
        ("sd-32", 32, 1.5),
        ("sd-32", 64, 1.5),
    ):
        for batch in (1, 8) if side < 64 else (1,):  # 8 of those take minutes a run
            slow = side * batch
            params = {"model": model, "side": side, "batch": batch, "steps": 25, "guidance": 5.0}
            share = 0.4 if slow >= 64 else 0.6
            case = Case(
                name=f"sampling/{model} {side}x{side}, batch {batch}",
                kind="sampling",
                params=params,
                tolerance=PICTURE,
                targets=(Target(figure="ratio", limit=aim), AT_MOST_THEIRS),
                share=1.0 if model == "shapes" else share,
                quick=model == "shapes" and batch == 1,
            )
            cases.append(case)
    return cases


def vae_cases() -> list[Case]:
    """Both ways, of the shipped emoji model and of a reduced Stable Diffusion one."""
    cases = []
    for way, targets in (("encode", ()), ("decode", (Target(figure="ratio", limit=1.2),))):
        for model, size, batch in (("emoji", 64, 8), ("sd-32", 256, 1)):
            case = Case(
                name=f"vae-{way}/{model} {size} px, batch {batch}",
                kind=f"vae-{way}",
                params={"model": model, "size": size, "batch": batch},
                targets=targets,
                quick=model == "emoji",
            )
            cases.append(case)
    return cases


def training_cases() -> list[Case]:
    """Forward, backward, clip, AdamW and average on inputs that lie ready; our whole step through `ldm.train.run`."""
    aim, shared = (Target(figure="ratio", limit=1.5),), {"tolerance": GRADIENT}
    cases = [
        Case(
            name=f"train-unet/{model} {side}x{side}, batch {batch}",
            kind="train-unet",
            params={"model": model, "side": side, "batch": batch},
            targets=aim,
            quick=model == "shapes",
            **shared,
        )
        for model, side, batch in (("shapes", 8, 64), ("emoji", 8, 32), ("sd-32", 16, 8))
    ]
    clip = Case(
        name="train-clip/emoji's sizes 64 px, batch 32",
        kind="train-clip",
        params={"batch": 32},
        note="against transformers' CLIPModel",
        **shared,
    )
    vae = Case(
        name="train-vae/emoji 64 px, batch 8",
        kind="train-vae",
        params={"model": "emoji", "size": 64, "batch": 8},
        note="absolute error and KL; no perceptual loss and no discriminator on either side",
        **shared,
    )
    alone = {"sides": ("ldm",), "tolerance": None, "memory": False}
    aim = (Target(figure="share", limit=0.1, at_least=False),)
    real = [
        Case(
            name=f"step-share/{model}, {optimizer}, batch 64",
            kind="step-share",
            params={"model": model, "batch": 64, "muon": optimizer == "Muon"},
            targets=aim,
            note="the real step on cached latents, its captions encoded in it",
            **alone,
        )
        for model, optimizer in (("shapes", "AdamW"), ("shapes", "Muon"), ("emoji", "AdamW"))
    ]
    return [*cases, clip, vae, *real]


def feeding_cases() -> list[Case]:
    """Our data sets and the features of evaluations, in pictures a second."""
    alone = {"sides": ("ldm",), "tolerance": None, "memory": False}
    data = [
        Case(
            name=f"data/{source}, {workers} workers",
            kind="data",
            params={"source": source, "workers": workers, "batch": 32, "batches": 8},
            items=256,
            quick=source == "shapes made on the fly" and not workers,
            **alone,
        )
        for source in ("folder", "shards", "latents", "shapes made on the fly")
        for workers in (0, 2)
    ]
    features = {"kind": "features", "params": {"batch": 32, "size": 64}, "items": 32}
    return [*data, Case(name="features/effnet-lite0 at 224 px, batch 32", **features, **alone)]


def growth_cases() -> list[Case]:
    """How time grows along each axis, the others at their first value here: an SD-shaped U-Net at 16x16 latents."""
    base = {"model": "sd-32", "side": 16, "batch": 1, "guided": True}
    axes = {
        "batch": [(n, base | {"batch": n}) for n in (1, 2, 4, 8, 16)],
        "latent side": [(n, base | {"side": n}) for n in (8, 16, 32, 64)],
        "width": [(n, base | {"model": f"sd-{n}"}) for n in (32, 64, 128)],
        "prompt length": [(n, base | {"length": n}) for n in (8, 32, 77)],
    }
    shared = {"share": 0.4, "memory": False}
    cases = [
        Case(name=f"growth/{axis} {n}", kind="unet", params=params, point=(axis, n), **shared)
        for axis, values in axes.items()
        for n, params in values
    ]
    sampling = {"model": "sd-32", "side": 16, "batch": 1, "guidance": 5.0}
    steps = [
        Case(
            name=f"growth/steps {n}",
            kind="sampling",
            params=sampling | {"steps": n},
            point=("steps", n),
            tolerance=PICTURE,
            **shared,
        )
        for n in (1, 5, 10, 25, 50)
    ]
    return cases + steps


def compiled(case: Case) -> Case:
    """The same under torch.compile on both sides."""
    return replace(
        case,
        name=f"{case.name}, compiled",
        params=case.params | {"compile": True},
        targets=(),
        note="; ".join(filter(None, [case.note, "compiling is reported apart"])),
        tolerance=None if case.tolerance is None else max(case.tolerance, GRADIENT),
    )


COMPILED = ("unet-forward", "sampling", "vae-decode")


def all_cases(compile: bool = False) -> list[Case]:
    """Every case in the order of the table."""
    makers = (process_cases, forward_cases, sampling_cases, vae_cases, training_cases, feeding_cases, growth_cases)
    cases = [case for make in makers for case in make()]
    return cases + [compiled(case) for case in cases if compile and case.workload in COMPILED]


def choose(only: str | None, quick: bool = False, compile: bool = False) -> list[Case]:
    """The cases of the workloads named in `only` (with commas; None: all). UserError for an unknown one."""
    names = WORKLOADS if only is None else tuple(filter(None, (name.strip() for name in only.split(","))))
    for name in names or ("",):
        if name not in WORKLOADS:
            raise UserError(f"workload {name!r} is unknown; known: {', '.join(WORKLOADS)}")
    found = [case for case in all_cases(compile) if case.workload in names]
    if not quick:
        return found
    chosen = [case for case in found if case.quick]
    missing = [name for name in names if name not in {case.workload for case in chosen}]
    return chosen + [next(case for case in found if case.workload == name) for name in missing]
