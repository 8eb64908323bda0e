// Entry point of the playground: loads the served models, connects the controls and asks for the API key.

import { offerAdapters } from "./adapters.js";
import { models, onKeyNeeded } from "./api.js";
import { clearComposer, discardRecording, setUpComposer, showNotice } from "./composer.js";
import { ask, clear, isRunning, stop } from "./conversation.js";
import { byId, element, icon } from "./elements.js";
import { loadAttachment } from "./media.js";

const BUNDLED = /\/assets\/assistant$/; // path of the bundled assistant
const SAMPLES = [
  { kind: "a question", glyph: "type", text: "what is two plus three?" },
  { kind: "a spoken question", glyph: "record", text: "answer the question", file: "two_plus_three.flac" },
  { kind: "an image", text: "describe the picture", file: "shapes.png" },
];

const wide = matchMedia("(min-width: 60rem)"); // as in the style sheet: the panel is a column that cannot be closed

let model; // the base model's name, once it is known
let loading; // the promise of `readModels`, once it was requested

// Loads the served models once, also if the first question is sent before the page has loaded them.
function loadModels() {
  loading ??= readModels().catch((error) => {
    loading = undefined;
    throw error;
  });
  return loading;
}

async function readModels() {
  const cards = await models();
  const base = cards.find((card) => !card.adapter);
  model = base.id;
  byId("model").textContent = model;
  offerAdapters(cards);
  if (BUNDLED.test(base.root)) offerSamples();
}

async function send(text, attachments) {
  try {
    if (!model) await loadModels();
  } catch {
    // The chat request fails with the same error, and shows it.
  }
  await ask(model, text, attachments);
}

// The bundled assistant is tiny: it works best at temperature 0 and without earlier turns.
function offerSamples() {
  byId("temperature").value = "0";
  byId("memory").checked = false;
  byId("samples").hidden = false;
  byId("samples").replaceChildren(...SAMPLES.map(sampleButton));
}

function sampleButton({ kind, glyph, text, file }) {
  const isImage = file?.endsWith(".png");
  const preview = isImage ? element("img", { src: `playground/${file}`, alt: "an image of shapes" }) : icon(glyph);
  const button = element("button", { type: "button" }, preview, element("small", {}, kind), element("span", {}, text));
  button.onclick = async () => {
    byId("text").focus();
    try {
      const media = file ? [await loadSample(file)] : [];
      if (!isRunning()) send(text, media);
    } catch (error) {
      showNotice(error.message);
    }
  };
  return button;
}

async function loadSample(name) {
  const blob = await (await fetch(`playground/${name}`)).blob();
  return loadAttachment(new File([blob], name, { type: blob.type }));
}

function askForKey(isWrong) {
  const dialog = byId("key-dialog");
  if (isWrong) byId("key-text").textContent = "The server rejected this key.";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      resolve(byId("key").value.trim());
      byId("key").value = "";
      dialog.close();
    };
    byId("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => resolve(null); // no effect once a key was entered
  });
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("key-dialog").open && !discardRecording()) stop();
});
byId("stop-button").onclick = stop;
byId("clear").onclick = () => {
  clear();
  clearComposer();
  byId("text").focus();
};
wide.onchange = () => (byId("panel").open = wide.matches);
wide.onchange();
onKeyNeeded(askForKey);
setUpComposer(send, () => !isRunning());
byId("text").focus();
loadModels().catch((error) => showNotice(error.message));
