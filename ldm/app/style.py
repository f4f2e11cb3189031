"""CSS and JavaScript of the page, beside gradio's own."""

# Gradio's editor ignores a file that is no picture, without a word.
HEAD = """
<style>
html[data-tab=generate] .only:not(.on-generate), html[data-tab=edit] .only:not(.on-edit),
html[data-tab=compare] .only:not(.on-compare), html[data-tab=inside] .only:not(.on-inside),
html[data-tab=judge] .only:not(.on-judge), html[data-tab=compare] .compared,
html[data-tab=judge] .form:has(> .only:only-child),
html:not([data-tab=compare], [data-tab=inside]) #pictures .caption-label { display: none !important; }
</style>
<script>
document.documentElement.dataset.tab = "generate";
const shown = where => [...document.querySelectorAll(where)].find(element => element.offsetParent);
const image = () => document.querySelector("#pictures .selected img");
// The file's name of the picture in the ring, "" unless it is a finished one.
const marked = () => image()?.src.match(/[^/]+-[0-9a-f]{16}[.]png$/)?.[0] ?? "";
const download = () => Object.assign(document.createElement("a"), {href: image().src, download: marked()}).click();
const enlarge = () => {
  const dialog = document.createElement("dialog");
  dialog.append(Object.assign(new Image(), {src: image().src, alt: image().alt}), image().alt);
  dialog.ariaLabel = "Enlarged picture";
  dialog.onclick = () => dialog.close();
  dialog.onclose = () => dialog.remove();
  document.body.append(dialog);
  dialog.showModal();
};
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && !document.querySelector("dialog")) shown("#stop")?.click();
  if (!event.target.matches("textarea, input:not([type=radio])") && !event.ctrlKey && !event.metaKey)
    [...document.querySelectorAll("#judge-answer input")].filter(e => e.offsetParent)[event.key - 1]?.click();
});
document.addEventListener("load", ({target}) => {
  if (target.naturalWidth) target.style.imageRendering = target.naturalWidth <= 32 ? "pixelated" : "";
  const label = target.alt && target.parentElement.querySelector(".caption-label");
  if (!label) return;
  target.parentElement.ariaLabel = target.alt;  // a thumbnail is called by its prompt, or what a comparison calls it
  label.ariaHidden = true;
}, true);
const compare = (...names) => {
  document.querySelectorAll(".compared").forEach(element => element.classList.remove("compared"));
  names.forEach(name => document.getElementById(`setting-${name}`)?.classList.add("compared"));
};
let gone = false;
setInterval(() => fetch(location.pathname, {method: "HEAD"}).then(() => gone && location.reload(), () => {
  gone = true;
  document.querySelector("#status progress")?.remove();
  document.querySelector("#status p").textContent =
    "The server went away. Start it again (ldm app); this page then goes on with your prompt and pictures.";
}), 3000);
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
#status { min-height: 3.8em; }
#status progress { width: 100%; height: .6em; accent-color: var(--color-accent); }
#status progress::-webkit-progress-value { background: var(--color-accent); }
body:not(:has(#status progress)) #stop { display: none; }
:is(input, textarea, button, [tabindex]):focus-visible {
  outline: 2px solid var(--color-accent) !important; outline-offset: 2px;
}
.settings .form > * { min-width: 210px !important; }
.settings .tab-like-container input { width: 4em; }
#pictures { min-height: min(460px, 90vw); }
#pictures .grid-wrap { max-height: 80vh; }
#pictures .grid-wrap, #inside-words .grid-wrap { padding-top: 2.2em; }
:root body.dark { --color-accent: var(--primary-400); }
#pictures .empty, :is(#inside-words, #edit-change):has(.empty) { display: none; }
#pictures:has(.empty)::after {
  content: "Your pictures appear here."; position: absolute; inset: 45% 0; text-align: center;
}
.caption-label { padding: 0 .4em; border: 0; opacity: .9; }
.grid-container {  /* three columns or more */
  grid-template-columns: repeat(auto-fill, minmax(min(150px, 30%), 1fr)) !important; grid-auto-flow: dense;
}
.gallery-item:has(.selected) { grid-area: span 3 / span 3; }
#pictures .selected { outline: 3px solid var(--color-accent); outline-offset: -1px; }
body:not(:has(#pictures .selected img[src$=".png"]:not([src$="/image.png"]))) .taking { display: none; }
dialog { border: 0; padding: 0; background: none; color: #fff; text-align: center; cursor: zoom-out; }
dialog::backdrop { background: #111; }
dialog img { display: block; width: 90vw; height: 85vh; object-fit: contain; }
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
  .row > button { min-width: max-content !important; flex: auto; }
  .columns > .column { display: contents; }
  .columns .settings { order: 1; }
  #status { min-height: 0; }
  #inside-words .grid-wrap { padding-top: 3.6em; }
  #edit-editor [data-testid=block-label] { display: none; }
  #examples .gallery { flex-wrap: nowrap; overflow-x: auto; }
  #examples .gallery > * { flex: none; white-space: nowrap; }
}
"""
