// The conversation: its exchanges, the requests, and the streamed responses.

import { chosenLora } from "./adapters.js";
import { chat } from "./api.js";
import { byId } from "./elements.js";
import { ExchangeView } from "./exchange.js";
import { release } from "./media.js";

let exchanges = []; // { content, attachments, view }, oldest first
let running = null; // the AbortController of the running request

export const isRunning = () => running !== null;

export const stop = () => running?.abort();

export function clear() {
  stop();
  exchanges.forEach(({ attachments }) => release(attachments));
  exchanges = [];
  byId("exchanges").replaceChildren();
  byId("welcome").hidden = false;
}

// Sends a message to a model and shows the response.
export function ask(model, text, attachments) {
  const content = attachments.map(({ part }) => part);
  if (text) content.push({ type: "text", text });
  const exchange = { content, attachments };
  exchange.view = new ExchangeView(text, attachments, () => answer(model, exchange));
  exchanges.push(exchange);
  byId("welcome").hidden = true;
  byId("exchanges").append(exchange.view.node);
  return answer(model, exchange);
}

async function answer(model, exchange) {
  if (running) return;
  const { view } = exchange;
  setRunning(new AbortController());
  view.begin();
  view.node.scrollIntoView({ block: "end" });
  const announcement = await receive({ model, ...options(), messages: messages(exchange) }, view);
  setRunning(null);
  byId("status").textContent = announcement;
}

// Shows a response as it is streamed, and returns the announcement for screen readers.
async function receive(body, view) {
  const speed = new Speed();
  try {
    for await (const chunk of chat(body, running.signal)) {
      speed.note(chunk);
      follow(() => {
        if (chunk.lora) view.showLora(chunk.lora);
        chunk.choices.forEach(({ delta }) => view.append(delta.content ?? ""));
      });
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      follow(() => view.fail(error.message));
      return `Failed: ${error.message}`;
    }
    follow(() => view.finish(["stopped"]));
    return "Stopped.";
  }
  follow(() => view.finish([...(view.answer ? [] : ["empty answer"]), ...speed.figures()]));
  return `Answer: ${view.answer || "empty"}`;
}

// Applies a change to the page and scrolls to the end, unless the user has scrolled up.
function follow(change) {
  const transcript = byId("transcript");
  const isAtEnd = transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < 80;
  change();
  if (isAtEnd) transcript.scrollTop = transcript.scrollHeight;
}

function messages(exchange) {
  const system = byId("system").value.trim();
  const earlier = byId("memory").checked ? exchanges.slice(0, exchanges.indexOf(exchange)) : [];
  const turns = earlier
    .filter(({ view }) => view.answer) // without failed requests
    .flatMap(({ content, view }) => [{ role: "user", content }, { role: "assistant", content: view.answer }]);
  const start = system ? [{ role: "system", content: system }] : [];
  return [...start, ...turns, { role: "user", content: exchange.content }];
}

// Empty fields use the server's defaults: JSON omits `undefined`.
function options() {
  const number = (id) => (byId(id).value === "" ? undefined : byId(id).valueAsNumber);
  return { lora: chosenLora(), temperature: number("temperature"), max_tokens: number("max-tokens") };
}

function setRunning(controller) {
  running = controller;
  byId("stop-button").hidden = !running;
  byId("send-button").hidden = Boolean(running);
  if (running) byId("status").textContent = "Answering…";
}

// Latency and throughput of a response, measured in the browser.
class Speed {
  #start = performance.now();
  #first;
  #last;
  #numTokens = 0;
  #isCut = false;

  note({ choices, usage }) {
    if (usage) this.#numTokens = usage.completion_tokens;
    if (!choices.length) return;
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#isCut ||= choices[0].finish_reason === "length";
  }

  figures() {
    const figures = [this.#numTokens === 1 ? "1 token" : `${this.#numTokens} tokens`];
    if (this.#numTokens > 2 && this.#last > this.#first) { // two tokens are too few for a rate
      const rate = (1000 * (this.#numTokens - 1)) / (this.#last - this.#first);
      figures.push(`${Number(rate.toPrecision(3))} tokens/s`); // without an exponent
    }
    const wait = this.#first - this.#start;
    figures.push(`first token ${wait < 1000 ? `${Math.round(wait)} ms` : `${(wait / 1000).toFixed(1)} s`}`);
    return this.#isCut ? [...figures, "token limit reached"] : figures;
  }
}
