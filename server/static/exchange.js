// The view of one exchange: the message, the streamed response, and the adapter and figures of the response.

import { adapterLabel } from "./adapters.js";
import { element, iconButton } from "./elements.js";
import { tile } from "./media.js";

export class ExchangeView {
  #text = document.createTextNode("");
  #facts = element("div", { className: "facts" });
  #retry;

  constructor(text, attachments, onRetry) {
    const tiles = element("div", { className: "tiles" }, ...attachments.map((item) => tile(item)));
    const message = element("div", { className: "message" }, tiles);
    if (text) message.append(element("p", {}, text));
    const answer = element("p", { className: "answer" }, this.#text);
    this.#retry = iconButton("retry", "Regenerate with the adapters selected now", onRetry);
    this.node = element("article", { className: "exchange" }, message, answer, this.#facts);
  }

  get answer() {
    return this.#text.data;
  }

  begin() {
    this.#text.data = "";
    this.#facts.replaceChildren();
    this.node.classList.add("running");
  }

  append(text) {
    this.#text.appendData(text);
  }

  showLora({ adapter, digest, reason, warning }) {
    const badge = element("span", { className: "badge" }, adapter === null ? "base model" : adapterLabel(adapter));
    badge.classList.toggle("base", adapter === null);
    const why = reason === "none" ? "no default applies" : reason;
    if (digest) badge.title = `digest ${digest}`;
    this.#facts.replaceChildren(badge, element("span", { className: "reason", title: reason }, why));
    if (warning) this.#facts.append(element("p", { className: "warning" }, warning));
  }

  finish(figures) {
    this.#facts.append(...figures.map((figure) => element("span", { className: "figure" }, figure)), this.#retry);
    this.node.classList.remove("running");
  }

  fail(message) {
    this.#facts.append(element("p", { className: "failure" }, message));
    this.finish([]);
  }
}
