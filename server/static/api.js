// Client of the server's API: requests with the API key, streamed chat chunks, readable errors.

const KEY = "mmlora-api-key";

let askForKey;

// `ask(isWrong)` asks the user for the key; it resolves to null when the user cancels.
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
    isComplete = data === "[DONE]"; // the last event; the rest is still read, so that the connection ends normally
    if (isComplete) continue;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
  if (!isComplete) throw new Error("The connection ended before the response was complete.");
}

// Paths are relative to the page, so that they work behind a proxy with a path prefix.
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
  // Headers are byte strings, and the server compares the UTF-8 bytes of the key.
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
  let message = `The server responded with ${response.status} ${response.statusText}.`;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // The response of a proxy in front of the server: only the status is shown.
  }
  const wait = response.headers.get("Retry-After");
  return new Error(wait === null ? message : `${message} Try again in ${wait} s.`);
}

// Yields the data fields of server-sent events.
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
    reader.cancel().catch(() => {}); // it has already failed if the user stopped the response
  }
}
