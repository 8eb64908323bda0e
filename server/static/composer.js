// The message composer: text, files that are picked, dropped or pasted, and recordings.

import { byId, clock } from "./elements.js";
import { loadAttachment, release, tile } from "./media.js";
import { startRecording } from "./recorder.js";

let attachments = [];
let loading = Promise.resolve(); // files are added in order, and before the message is sent
let recording = null;

// Calls `send(text, attachments)` with each message while `maySend()` returns true.
export function setUpComposer(send, maySend) {
  const text = byId("text");
  byId("composer").addEventListener("submit", async (event) => {
    event.preventDefault();
    await attachRecording();
    await loading;
    if (!maySend() || !(text.value.trim() || attachments.length)) return;
    const message = [text.value.trim(), attachments];
    text.value = "";
    empty();
    send(...message);
  });
  text.addEventListener("input", resizeInput);
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  });
  setUpFiles();
  setUpDrop();
  byId("record-button").onclick = () => (recording ? attachRecording() : record());
  byId("keep").onclick = attachRecording;
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
  showNotice("");
  resizeInput();
}

// Shows a problem with the message; an empty text hides it.
export function showNotice(problem) {
  byId("notice").textContent = problem;
  byId("notice").hidden = !problem;
}

// Returns whether there was a recording.
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
    picker.value = ""; // allows picking the same file again
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
  showNotice("");
  for (const file of files) {
    loading = loading.then(async () => {
      try {
        add(await loadAttachment(file));
      } catch (error) {
        showNotice(error.message);
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
  showNotice("");
  byId("record-button").disabled = true; // the browser may ask for permission first
  try {
    setRecording(await startRecording(showLevel));
  } catch (error) {
    showNotice(error.message);
  }
  byId("record-button").disabled = false;
}

async function attachRecording() {
  if (!recording) return;
  const { finish } = recording;
  setRecording(null);
  try {
    const blob = await finish();
    addFiles([new File([blob], "recording", { type: blob.type })]);
  } catch (error) {
    showNotice(error.message);
  }
}

function setRecording(now) {
  recording = now;
  byId("recording").hidden = !now;
  byId("record-button").setAttribute("aria-pressed", String(Boolean(now)));
  showLevel(0, 0);
}

function showLevel(peak, seconds) {
  byId("level").value = Math.sqrt(peak); // speech would be barely visible on a linear scale
  byId("recorded-time").textContent = clock(seconds);
}

// Fits the height of the input to its text.
function resizeInput() {
  const { style } = byId("text");
  style.height = "auto";
  style.height = `${byId("text").scrollHeight}px`;
}
