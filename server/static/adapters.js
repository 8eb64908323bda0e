// The adapter selection: automatic, none, or chosen adapters with weights.

import { byId, element } from "./elements.js";

let cards = [];

// Lists the adapters among the model cards of /v1/models.
export function offerAdapters(found) {
  cards = found.filter((card) => card.adapter);
  byId("adapters").append(...cards.map(row));
  const defaults = cards.filter(({ adapter }) => adapter.default_for).map(({ id }) => `${id} → ${adapterLabel(id)}`);
  if (defaults.length) byId("defaults").textContent = defaults.join("\n");
  if (!cards.length) document.querySelector("input[value=chosen]").disabled = true;
  byId("panel").addEventListener("change", update);
  byId("panel").addEventListener("input", update);
  update();
}

// The display name of an adapter: its folder for a default, which is served under its key, such as "audio".
export function adapterLabel(name) {
  const card = cards.find(({ id }) => id === name);
  return card?.adapter.default_for ? card.root.split("/").filter(Boolean).pop() : name;
}

// The `lora` field of a request; undefined for the automatic choice of the server.
export function chosenLora() {
  const mode = document.querySelector("input[name=mode]:checked").value;
  if (mode === "automatic") return undefined;
  if (mode === "base") return [];
  return [...document.querySelectorAll(".adapter:has(input[type=checkbox]:checked)")].map((node) => ({
    name: node.dataset.name,
    scale: node.querySelector("input[type=number]").valueAsNumber,
  }));
}

function row(card) {
  const { default_for: key, problem } = card.adapter;
  const facts = problem ?? changes(card.adapter);
  const tick = element("input", { type: "checkbox", disabled: problem !== null });
  const number = element("input", { type: "number", step: "any", value: "1", required: true });
  const slider = element("input", { type: "range", min: "0", max: "2", step: "0.05", value: "1" });
  number.setAttribute("aria-label", `Weight of ${card.id}`);
  slider.setAttribute("aria-label", `Weight of ${card.id}, from 0 to 2`);
  number.oninput = () => (slider.value = number.value);
  slider.oninput = () => (number.value = slider.value);
  const node = element(
    "div",
    { className: "adapter" },
    element("label", {}, tick, element("span", {}, adapterLabel(card.id))),
    element("small", {}, key ? `default for ${key} · ${facts}` : facts),
    element("div", { className: "weight" }, slider, number),
  );
  node.dataset.name = card.id;
  return node;
}

function changes({ parts }) {
  const changed = Object.entries(parts).filter(([, count]) => count);
  return changed.map(([part, count]) => `${count} modules of the ${part.replace("_", " ")}`).join(", ");
}

function update() {
  const lora = chosenLora();
  const mode = document.querySelector("input[name=mode]:checked").value;
  byId("adapters").hidden = mode !== "chosen";
  const named = lora?.map(({ name, scale }) => (scale === 1 ? adapterLabel(name) : `${scale} × ${adapterLabel(name)}`));
  byId("choice-summary").textContent = lora === undefined ? "automatic" : named.join(" + ") || "base model";
}
