// The server's API: requests with the key, streams of chat chunks, failures in words.

const KEY = "mmlora-api-key";

let askForKey;

// `ask(isWrong)` shows the user a question and gives the key, or null when the user does not want to.
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export async function models() {
  return (await (await request("v1/models")).json()).data;
}

// Yields the chunks of a streamed chat completion.
export async function* chat(body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", { ...body, ...options }, signal);
  let isComplete = false;
  for await (const data of events(response.body)) {
    isComplete = data === "[DONE]"; // the last event; whoever read no further would hang up on the server
    if (isComplete) continue;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
  if (!isComplete) throw new Error("The connection ended before the answer was complete.");
}

// Paths are relative to the page, so that they hold behind a proxy that serves it under a prefix.
async function request(path, body, signal) {
  for (;;) {
    const response = await send(path, body, signal);
    if (response.ok) return response;
    if (response.status !== 401) throw await failure(response);
    const key = await askForKey(sessionStorage.getItem(KEY) !== null);
    if (key === null) throw await failure(response);
    sessionStorage.setItem(KEY, key);
  }
}

async function send(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  // Headers are bytes, and the server compares those of UTF-8.
  if (key !== null) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`;
  if (body) headers["Content-Type"] = "application/json";
  try {
    return await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
}

async function failure(response) {
  const text = await response.text();
  let message = `The server answered ${response.status} ${response.statusText}.`;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // Not from this server but from a proxy before it; the status must do.
  }
  const wait = response.headers.get("Retry-After");
  return new Error(wait === null ? message : `${message} Try again in ${wait} s.`);
}

// Yields the data of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (pending + value).split(/\r?\n\r?\n/);
      pending = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it has failed already when the user stopped the answer
  }
}
