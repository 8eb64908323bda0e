// The message that is being written: text, files that were picked, dropped or pasted, and recordings.

import { byId, clock } from "./elements.js";
import { loadAttachment, release, tile } from "./media.js";
import { startRecording } from "./recorder.js";

let attachments = [];
let loading = Promise.resolve(); // files are added in the order they came in, and before the message is sent
let recording = null;

// `send(text, attachments)` takes a finished message; `maySend()` says whether there is to be one now.
export function setUpComposer(send, maySend) {
  const text = byId("text");
  byId("composer").addEventListener("submit", async (event) => {
    event.preventDefault();
    await keepRecording();
    await loading;
    if (!maySend() || !(text.value.trim() || attachments.length)) return;
    const message = [text.value.trim(), attachments];
    text.value = "";
    empty();
    send(...message);
  });
  text.addEventListener("input", grow);
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  });
  setUpFiles();
  setUpDrop();
  byId("record-button").onclick = () => (recording ? keepRecording() : record());
  byId("keep").onclick = keepRecording;
  byId("discard").onclick = discardRecording;
}

export function clearComposer() {
  discardRecording();
  release(attachments);
  empty();
}

function empty() {
  attachments = [];
  byId("attachments").replaceChildren();
  say("");
  grow();
}

// Tells what went wrong with the message; an empty text takes that back.
export function say(problem) {
  byId("notice").textContent = problem;
  byId("notice").hidden = !problem;
}

// Returns whether there was a recording to throw away.
export function discardRecording() {
  if (!recording) return false;
  recording.cancel();
  setRecording(null);
  return true;
}

function setUpFiles() {
  const picker = byId("files");
  byId("attach-button").onclick = () => picker.click();
  picker.onchange = () => {
    addFiles([...picker.files]);
    picker.value = ""; // so that the same file can be picked again
  };
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    addFiles(files);
  });
}

function setUpDrop() {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  const show = (isShown) => (byId("drop").hidden = !isShown);
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    show(true);
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget ?? show(false));
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    show(false);
    addFiles([...event.dataTransfer.files]);
  });
}

function addFiles(files) {
  say("");
  for (const file of files) {
    loading = loading.then(async () => {
      try {
        add(await loadAttachment(file));
      } catch (error) {
        say(error.message);
      }
    });
  }
  byId("text").focus();
}

function add(item) {
  attachments.push(item);
  const node = tile(item, () => {
    attachments = attachments.filter((other) => other !== item);
    node.remove();
    release([item]);
    byId("text").focus();
  });
  byId("attachments").append(node);
}

async function record() {
  say("");
  byId("record-button").disabled = true; // the browser may ask first
  try {
    setRecording(await startRecording(showLevel));
  } catch (error) {
    say(error.message);
  }
  byId("record-button").disabled = false;
}

async function keepRecording() {
  if (!recording) return;
  const { finish } = recording;
  setRecording(null);
  try {
    const blob = await finish();
    addFiles([new File([blob], "recording", { type: blob.type })]);
  } catch (error) {
    say(error.message);
  }
}

function setRecording(now) {
  recording = now;
  byId("recording").hidden = !now;
  byId("record-button").setAttribute("aria-pressed", String(Boolean(now)));
  showLevel(0, 0);
}

function showLevel(peak, seconds) {
  byId("level").value = Math.sqrt(peak); // speech is quiet on a linear scale
  byId("recorded-time").textContent = clock(seconds);
}

// As high as its text.
function grow() {
  const { style } = byId("text");
  style.height = "auto";
  style.height = `${byId("text").scrollHeight}px`;
}
