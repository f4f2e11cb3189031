"""The tabs that sample: Generate, Edit, Compare and Look inside."""

from dataclasses import replace

import gradio as gr
from PIL import Image, ImageOps

from ldm.app.attention import attention_maps, word_overlays
from ldm.app.sampling import Settings, picture_metadata, restore
from ldm.app.workspace import IMMEDIATE, QUEUE, Workspace, message, only
from ldm.config import UserError
from ldm.images import captioned_grid, upright_rgb

CANVAS = 512  # pixels; a larger one sends PNGs above the limit on uploads, on a smaller one the brush hides the picture
RESAMPLE = 2  # model calls per step within a mask; with one, the model of shapes left some masks grey
BRUSHES = ["rgba(255, 59, 107, 0.6)", "rgba(0, 200, 255, 0.6)"]  # one of them is seen on every picture
LIMIT, MOST = 8, 24  # values of a setting, pictures of two
ESTIMATES = 8
EXAMPLES = {
    "guidance": "1, 2, 3, 5, 8",
    "steps": "5, 10, 20, 40",
    "sampler": "ddim, euler, dpmpp_2m, unipc",
    "model": "",
    "guidance_rescale": "0, 0.3, 0.7, 1",
    "seed": "0, 1, 2, 3, 4, 5",
}


def build_generate(ui: Workspace) -> None:
    """A prompt becomes pictures; their settings come back from them and from files."""
    folder = ui.pictures.folder
    with ui.results, gr.Row(elem_classes=only("generate")):
        gr.Markdown(f"Pictures and their settings are kept in {folder.parent.name}/{folder.name} until deleted.")
        png = gr.UploadButton(
            "Load settings from a PNG", file_types=[".png"], size="sm", scale=0, min_width=200, elem_id="generate-file"
        )

    def generate(values):
        yield from ui.sample(values, ui.settings(values))

    def show(path):
        settings, notes = restore(path, ui.models)
        shown = {ui.controls[name]: value for name, value in vars(settings).items() if name != "count"}
        return shown | {ui.status: message(f"The settings of that picture, seed {settings.seed}.", *notes)}

    def api(
        request: gr.Request,
        prompt: str,
        model: str = ui.models.names[0],
        seed: int = -1,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> list[dict]:
        """PNGs of a prompt, with its settings in their text chunks: four, of the seeds seed to seed + 3; -1 is a random
        seed. Steps and guidance are by default the model's. The call waits in line with the page's own runs."""
        given = {"prompt": str(prompt), "model": str(model), "seed": seed, "steps": steps, "guidance": guidance}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            given = ui.models.defaults(given["model"]) | given
            values = {c: given.get(name, c.value) for name, c in ui.controls.items()} | {ui.history: []}
            for _ in ui.in_line(generate, values, request):
                pass
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return [gr.FileData(path=file).model_dump() for file in values[ui.history]]

    ui.on_start("generate", generate)
    gr.api(api, api_name="generate", concurrency_limit=QUEUE, concurrency_id="model")
    ui.on_marked(ui.reuse, show, ui.controls.values())
    png.upload(ui.user_errors(show), png, {ui.status, *ui.controls.values()}, **IMMEDIATE)


def build_edit(ui: Workspace) -> None:
    """Redraws a picture, or the part of it under a brush."""
    with ui.tabs["edit"]:
        gr.Markdown("Brush over the part to redraw, or redraw all of it.")
        editor = gr.ImageEditor(
            label="Picture (its centre square is used)",
            type="pil",
            height=420,
            canvas_size=(CANVAS, CANVAS),
            fixed_canvas=True,
            sources=("upload", "clipboard"),
            transforms=(),
            brush=gr.Brush(colors=BRUSHES, color_mode="fixed", default_size="auto"),
            layers=False,
            elem_id="edit-editor",
        )
    with ui.results, gr.Column(elem_classes=only("edit")):
        change = gr.ImageSlider(
            label="The first picture before and after", format="png", buttons=[], max_height=400, elem_id="edit-change"
        )

    def edit(values):
        settings = ui.settings(values, width=0, height=0)
        pipe = ui.pipeline(settings)
        image, mask = read_drawing(values[editor], pipe.latent_shape()[1] * pipe.vae.factor, pipe.vae.factor)
        options = {"strength": settings.strength} | ({"resample": RESAMPLE} if mask else {})
        metadata = {"image": "uploaded", "mask": "drawn" if mask else ""} | options
        _, images = yield from ui.sample(values, settings, metadata, image=image, mask=mask, **options)
        yield {change: (image, images[0])}

    def take(path):
        return {editor: open_picture(path), ui.tab_bar: gr.Tabs(selected="edit")}

    ui.on_start("edit", edit, [editor], [change])
    ui.on_marked(ui.edit, take, [editor, ui.tab_bar])


def open_picture(path: str) -> Image.Image:
    """The value of the editor for a finished picture, from which `read_drawing` returns the picture exactly."""
    image = Image.open(path)
    return ImageOps.scale(image, max(1, CANVAS // max(image.size)), Image.Resampling.NEAREST)


def read_drawing(drawing: dict | None, side: int, factor: int) -> tuple[Image.Image, Image.Image | None]:
    """The centre square of an editor's picture within its transparent margins, resized to `side`, and the mask that was
    brushed, in whole latents of `factor` pixels; None without a stroke. Raises UserError without a picture."""
    background = (drawing or {}).get("background") or Image.new("RGBA", (1, 1))
    if not (box := background.convert("RGBA").getchannel("A").getbbox()):
        raise UserError("there is no picture to edit; upload one")

    def square(layer: Image.Image, side: int) -> Image.Image:
        return ImageOps.fit(layer.convert("RGBA").crop(box), (side, side), Image.Resampling.BOX)

    mask = Image.new("L", (side, side))
    for layer in drawing.get("layers") or ():
        # a latent is redrawn when some 5% of it are brushed: the brush is translucent
        brushed = square(layer, side // factor).getchannel("A").point(lambda alpha: 255 * (alpha >= 8))
        mask = brushed.resize(mask.size, Image.Resampling.NEAREST)
    return upright_rgb(square(background, side)), mask if mask.getbbox() else None


def build_compare(ui: Workspace) -> None:
    """One prompt and seed over values of one setting, or of two as columns and rows."""
    with ui.tabs["compare"]:
        name = gr.Dropdown(list(EXAMPLES), value="guidance", label="Setting to compare")
        text = gr.Textbox(EXAMPLES["guidance"], label=f"Values, up to {LIMIT}, separated by commas")
        other = gr.Dropdown([("none", ""), *EXAMPLES], value="", label="Second setting, down the rows")
        rows = gr.Textbox(label="Its values", visible=False)

    def compare(values):
        if values[name] == values[other]:
            raise UserError("both settings are the same; choose two different ones")
        settings = ui.settings(values, count=1)
        down = variants(settings, values[other], values[rows])
        asked = {
            ", ".join(filter(None, (label, row))): variant
            for row, start in down.items()
            for label, variant in variants(start, values[name], values[text]).items()
        }
        for label, variant in asked.items():  # a distilled model beside others keeps its own steps and guidance
            own = ui.models.defaults(variant.model)
            if own != ui.models.defaults(settings.model):
                compared = (values[name], values[other])
                asked[label] = replace(variant, **{key: x for key, x in own.items() if key not in compared})
        if len(asked) > MOST:
            raise UserError(f"{len(asked)} pictures are too many to compare; at most {MOST}")
        pictures = {}
        for label, variant in asked.items():
            pictures[label] = yield from ui.sample(values, variant)
        images, labels = [image for _, (image,) in pictures.values()], list(pictures)
        columns = len(asked) // len(down) if values[other] else min(4, len(asked))
        sheet = captioned_grid(images, labels, columns=columns, cell=200)
        metadata = {"compared": values[name], "values": values[text], "rows": values[other], "row_values": values[rows]}
        files = ui.pictures.save([sheet], picture_metadata(ui.pipeline(settings), settings, **metadata))
        shown = [(*files, "all"), *((file, label) for label, ((file,), _) in pictures.items())]
        yield {ui.gallery: gr.Gallery(shown, selected_index=0)}

    def examples(name):
        return gr.Textbox(EXAMPLES.get(name) or ", ".join(ui.models.names[:LIMIT]), visible=bool(name))

    for choice, box in ((name, text), (other, rows)):
        choice.input(examples, choice, box, **IMMEDIATE)
        choice.change(None, [name, other], js="compare", **IMMEDIATE)
    ui.tabs["compare"].select(None, [name, other], js="compare", **IMMEDIATE)
    ui.on_start("compare", compare, [name, text, other, rows])


def variants(settings: Settings, name: str, text: str) -> dict[str, Settings]:
    """{label: settings} per value in a comma-separated list; without a name, {"": settings}. Raises UserError for
    values that the setting refuses."""
    if not name:
        return {"": settings}
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not 1 <= len(words) <= LIMIT:
        raise UserError(f"{len(words)} values to compare; write 1 to {LIMIT}, separated by commas")
    kind = type(getattr(settings, name))
    try:
        return {f"{name} {word}": replace(settings, **{name: kind(word)}) for word in words}
    except ValueError as error:
        raise UserError(f"no value of {name}: {error}") from None


def build_inside(ui: Workspace) -> None:
    """The way from noise to a picture, and where each word looks."""
    with ui.tabs["inside"]:
        gr.Markdown("The model's estimates on the way from noise to a picture, and what each word affects.")
    with ui.results, gr.Column(elem_classes=only("inside")):
        label = "What each word affects: bright where cross-attention reads it"
        words = gr.Gallery(label=label, interactive=False, elem_id="inside-words")

    def look(values):
        settings, steps = ui.settings(values, count=1, width=0, height=0), []
        pipe = ui.pipeline(settings)
        with attention_maps(pipe) as maps:
            files, images = yield from ui.sample(values, settings, kept=steps)
        shown = [steps[round(i * (len(steps) - 1) / ESTIMATES)] for i in range(ESTIMATES)]
        estimates = [(*step.decode(), f"t = {step.t:.0f}") for step in shown]
        yield {
            ui.gallery: gr.Gallery([(*files, "the picture"), *estimates], selected_index=0),
            words: word_overlays(maps, pipe.tokenizer, settings.prompt, *images),
        }

    ui.on_start("inside", look, outputs=[words])
