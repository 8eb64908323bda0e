// Audio clips and images of a message: from a file to a content part of the API, and to its tile on the page.

import { clock, drawing, element, icon, iconButton } from "./elements.js";
import { encodeWav } from "./wav.js";

// Formats that the server reads are sent unchanged; others that the browser can play are converted to WAV.
const READ_BY_SERVER = /^audio\/(wav|wave|x-wav|flac|x-flac|ogg|mpeg|mp3|mp4|m4a|x-m4a|aac|webm)(;|$)/;
const AUDIO_NAME = /\.(wav|flac|ogg|oga|opus|mp3|m4a|aac|webm)$/i; // the server reads these, too; some have no type
const RATE_HZ = 16000; // of clips decoded here; speech models use no higher rate
const NUM_BARS = 36;

export async function loadAttachment(file) {
  const kind = AUDIO_NAME.test(file.name) ? "audio" : file.type.split("/")[0];
  if (kind === "image") return attachment(kind, file, file.name);
  if (kind !== "audio") throw new Error(`${file.name} is neither audio nor an image.`);
  const samples = await decode(file);
  const isSentUnchanged = READ_BY_SERVER.test(file.type) || AUDIO_NAME.test(file.name);
  const blob = isSentUnchanged ? file : samples && encodeWav(samples, RATE_HZ);
  if (!blob) throw new Error(`This browser cannot decode ${file.name}.`);
  return { ...(await attachment(kind, blob, file.name)), samples };
}

async function attachment(kind, blob, name) {
  const part = { type: `${kind}_url`, [`${kind}_url`]: { url: await dataUrl(blob) } };
  return { kind, name, part, url: URL.createObjectURL(blob) };
}

export function release(attachments) {
  attachments.forEach(({ url }) => URL.revokeObjectURL(url));
}

// The tile of an attachment, with a remove button if `onRemove` is given.
export function tile(attachment, onRemove) {
  const { kind, name, url, samples } = attachment;
  const node = element("div", { className: `tile ${kind}`, title: name });
  if (kind === "image") {
    node.append(element("img", { src: url, alt: name }));
  } else {
    node.append(...player(url, name));
    if (samples) node.append(waveform(samples), element("span", {}, clock(Math.round(samples.length / RATE_HZ))));
    else node.append(element("span", {}, name));
  }
  if (onRemove) node.append(iconButton("remove", `Remove ${name}`, onRemove));
  return node;
}

// The audio element is part of the page (hidden), so that playback stops when the tile is removed.
function player(url, name) {
  const audio = element("audio", { src: url });
  const button = iconButton("play", `Play ${name}`, () => (audio.paused ? audio.play() : audio.pause()));
  audio.onplay = () => button.replaceChildren(icon("stop"));
  audio.onpause = () => {
    audio.currentTime = 0;
    button.replaceChildren(icon("play"));
  };
  return [audio, button];
}

function waveform(samples) {
  const peaks = Array.from({ length: NUM_BARS }, (_, i) => {
    const [start, end] = [i, i + 1].map((bar) => Math.floor((bar * samples.length) / NUM_BARS));
    return samples.subarray(start, end).reduce((peak, sample) => Math.max(peak, Math.abs(sample)), 0);
  });
  const loudest = Math.max(...peaks) || 1;
  const bars = peaks.map((peak, i) => {
    const height = 1 + (10 * peak) / loudest;
    return `M${3 * i + 1.5} ${12 - height}v${2 * height}`;
  });
  const attributes = { class: "waveform", viewBox: `0 0 ${3 * NUM_BARS} 24`, "aria-hidden": true };
  return drawing("svg", attributes, drawing("path", { d: bars.join("") }));
}

// Mono samples at RATE_HZ, or null if the browser cannot decode the clip.
async function decode(blob) {
  try {
    const context = new OfflineAudioContext(1, 1, RATE_HZ);
    const buffer = await context.decodeAudioData(await blob.arrayBuffer());
    const channels = Array.from({ length: buffer.numberOfChannels }, (_, i) => buffer.getChannelData(i));
    return channels[0].map((_, i) => channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length);
  } catch {
    return null;
  }
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`The file cannot be read: ${reader.error.message}`));
    reader.readAsDataURL(blob);
  });
}
