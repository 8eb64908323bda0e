// Starts the playground: what the server serves, the controls of the page, the key.

import { offerAdapters } from "./adapters.js";
import { models, onKeyNeeded } from "./api.js";
import { clearComposer, discardRecording, say, setUpComposer } from "./composer.js";
import { ask, clear, isRunning, stop } from "./conversation.js";
import { byId, element, icon } from "./elements.js";
import { loadAttachment } from "./media.js";

const BUNDLED = /\/assets\/assistant$/; // where the assistant that comes with the server lies
const SAMPLES = [
  { kind: "a question", glyph: "type", text: "what is two plus three?" },
  { kind: "a spoken question", glyph: "record", text: "answer the question", file: "two_plus_three.flac" },
  { kind: "a picture", text: "describe the picture", file: "shapes.png" },
];

const wide = matchMedia("(min-width: 60rem)"); // as in the style sheet: the panel is a column, which cannot be closed

let model; // the base model's name, once it is known
let finding; // the answer that tells it, once it was asked for

// Finds out what is served: once, though the page and a quick first question both want to know.
function findModels() {
  finding ??= readModels().catch((error) => {
    finding = undefined;
    throw error;
  });
  return finding;
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
    if (!model) await findModels();
  } catch {
    // The answer will say what is wrong.
  }
  await ask(model, text, attachments);
}

// The bundled assistant is tiny: it answers best without chance, and one question at a time.
function offerSamples() {
  byId("temperature").value = "0";
  byId("memory").checked = false;
  byId("samples").hidden = false;
  byId("samples").replaceChildren(...SAMPLES.map(sampleButton));
}

function sampleButton({ kind, glyph, text, file }) {
  const isPicture = file?.endsWith(".png");
  const preview = isPicture ? element("img", { src: `playground/${file}`, alt: "a picture of shapes" }) : icon(glyph);
  const button = element("button", { type: "button" }, preview, element("small", {}, kind), element("span", {}, text));
  button.onclick = async () => {
    byId("text").focus();
    try {
      const media = file ? [await loadSample(file)] : [];
      if (!isRunning()) send(text, media);
    } catch (error) {
      say(error.message);
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
  if (isWrong) byId("key-text").textContent = "The server does not take this key.";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      resolve(byId("key").value.trim());
      byId("key").value = "";
      dialog.close();
    };
    byId("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => resolve(null); // changes nothing after a key was given
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
findModels().catch((error) => say(error.message));
