"""CSS and JavaScript of the page, beside gradio's own."""

# Gradio's editor ignores a file that is no picture, without a word.
HEAD = """
<style>
html[data-tab=make] .only:not(.on-make), html[data-tab=edit] .only:not(.on-edit),
html[data-tab=compare] .only:not(.on-compare), html[data-tab=inside] .only:not(.on-inside),
html[data-tab=judge] .only:not(.on-judge) { display: none !important; }
</style>
<script>
document.documentElement.dataset.tab = "make";
document.addEventListener("change", async event => {
  if (!event.target.closest?.("#edit-editor") || !event.target.files?.length) return;
  const image = new Image();
  image.src = URL.createObjectURL(event.target.files[0]);
  const readable = await image.decode().then(() => true, () => false);
  document.querySelector("#status p").textContent =
    readable ? "" : "That file cannot be read as a picture; choose a PNG, JPEG or WebP.";
}, true);
</script>
"""
CSS = """
#status { min-height: 3em; }
#status progress { width: 100%; height: .6em; }
input:focus-visible, textarea:focus-visible, button:focus-visible { outline: 2px solid #2f6fde; outline-offset: 2px; }
.settings > * { min-width: 200px !important; }
#pictures { min-height: min(460px, 90vw); }
#pictures .grid-wrap { max-height: 75vh; }
#pictures .grid-wrap, #inside-words .grid-wrap { padding-top: 2.2em; }
.caption-label { padding: 0 .4em; border: 0; opacity: .85; }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(96px, 160px)) !important; }
.judged { display: flex; gap: 1em; justify-content: center; }
.judged .cell { position: relative; width: min(256px, 80vw); aspect-ratio: 1; }
.judged.two .cell { width: min(256px, 40vw); }
.judged .cell > * { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; border-radius: 8px; }
.judged .cross { display: grid; place-items: center; font-size: 2em; }
.judged .shot { object-fit: contain; }
.judged .mask { background: repeating-conic-gradient(#777 0 25%, #aaa 0 50%) 0 0 / 24px 24px; }
.judged .cross, .judged .mask, .judged.flash .shot { visibility: hidden; }
.results caption { font-weight: 600; text-align: left; }
.results th, .results td { padding: .2em .6em; text-align: left; }
@media (max-width: 700px) {
  .row > button { min-width: 5em !important; }
  .columns > .column { display: contents; }
  .columns .settings { order: 1; }
  .grid-container { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) !important; }
}
"""
