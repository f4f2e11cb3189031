"""What the browser gets beside gradio's own: how the page looks, and a word on pictures that it cannot read."""

import gradio as gr

THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
# The editor of pictures says nothing of a file that is none, and tells the server nothing.
READABLE = """
async function readable(event) {
  const files = (event.dataTransfer || event.clipboardData || event.target).files;
  if (!files?.length || !event.target.closest?.("#edit-editor")) return;
  const image = new Image(), url = URL.createObjectURL(files[0]);
  image.src = url;
  const said = document.querySelector("#edit-status p");
  const good = await image.decode().then(() => true, () => false);
  if (!good || said.textContent.startsWith("That file")) {
    said.textContent = good ? "" : "That file cannot be read as a picture; choose a PNG, JPEG or WebP.";
    said.className = good ? "" : "wrong";
  }
  URL.revokeObjectURL(url);
}
for (const name of ["change", "drop", "paste"]) document.addEventListener(name, readable, true);
"""
HEAD = f'<meta name="viewport" content="width=device-width, initial-scale=1"><script>{READABLE}</script>'
CSS = """
.status { height: 4.6em; overflow-y: auto; }
.status progress { width: 100%; height: .6em; }
.wrong { color: #b00020; font-weight: 600; }
.dark .wrong { color: #ff9aa8; }
input:focus-visible, textarea:focus-visible, button:focus-visible { outline: 2px solid #2f6fde; outline-offset: 2px; }
.still .grid-wrap, .still .image-container { padding-top: 2.2em; }
.still .grid-container { grid-template-columns: repeat(auto-fill, minmax(96px, 160px)) !important; }
.plots { display: flex; flex-wrap: wrap; gap: 1em; --accent: #2f6fde; --warm: #d9822b; --soft: #888; --line: #8884; }
.plots figure { margin: 0; flex: 1 1 280px; max-width: 480px; }
.plots svg { width: 100%; height: auto; }
.plots svg text { fill: currentColor; font-size: 11px; }
.figures { display: flex; flex-wrap: wrap; gap: .6em; }
.figures figure { margin: 0; text-align: center; }
.figures img { width: 112px; height: 112px; object-fit: contain; border-radius: 6px; }
#inside-way .figures, #inside-words .figures { flex-wrap: nowrap; overflow-x: auto; }
#inside-way figure { flex: 0 1 112px; min-width: 60px; white-space: nowrap; }
#inside-way img { width: 100%; height: auto; aspect-ratio: 1; }
#inside-words figure { flex: none; font-size: .9em; } #inside-words img { width: 64px; height: 64px; margin: auto; }
.coarse { image-rendering: pixelated; }
.large img { width: min(160px, 35vw); height: min(160px, 35vw); }
.judged { display: flex; gap: 1em; justify-content: center; align-items: start; --side: min(256px, 80vw); }
.judged.two { --side: min(256px, 40vw); }
.judged > img, .judged .cell { width: var(--side); aspect-ratio: 1; border-radius: 8px; }
.judged > img { object-fit: contain; }
.judged .cell { position: relative; }
.judged .cell > * { position: absolute; inset: 0; width: 100%; height: 100%; border-radius: 8px; margin: 0; }
.judged .cross { display: grid; place-items: center; font-size: 2em; }
.judged .mask { background: repeating-conic-gradient(#777 0 25%, #aaa 0 50%) 0 0 / 24px 24px; }
.results { display: flex; flex-wrap: wrap; gap: 1.5em; }
.results table { border-collapse: collapse; } .results caption { font-weight: 600; text-align: left; }
.results p { flex-basis: 100%; }
.results table, .results tr, .results th, .results td { border: 0 !important; }
.results th, .results td { border-bottom: 1px solid #8884 !important; padding: .2em .6em; }
.results th { font-weight: 400; text-align: left; } .results td { text-align: right; }
@media (max-width: 500px) {
  h1 { font-size: 1.4em !important; }
  .row > button { min-width: 5em !important; }
  #judge-view, #judge-view .html-container { min-height: 0 !important; }
  .asked { min-height: 3em; }
  .still .grid-container { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) !important; }
}
footer { display: none !important; }
"""
