// Records the microphone, at the device's own rate: the server resamples better than browsers do.

import { encodeWav } from "./wav.js";

// Tells `onLevel(peak, seconds)` how loud it is (0 to 1) and how long it has recorded.
export async function startRecording(onLevel) {
  const stream = await openMicrophone();
  const context = new AudioContext();
  const blocks = [];
  let length = 0;

  function close() {
    stream.getTracks().forEach((track) => track.stop());
    return context.close();
  }

  try {
    await context.audioWorklet.addModule(new URL("recorder-worklet.js", import.meta.url));
  } catch (error) {
    close();
    throw error;
  }
  const node = new AudioWorkletNode(context, "recorder", { channelCount: 1, channelCountMode: "explicit" });
  node.port.onmessage = ({ data }) => {
    blocks.push(data);
    length += data.length;
    onLevel(Math.max(...data.map(Math.abs)), length / context.sampleRate);
  };
  // Its output stays silent; nodes that lead nowhere are not run.
  context.createMediaStreamSource(stream).connect(node).connect(context.destination);

  return {
    cancel: close,
    async finish() {
      await close();
      if (!length) throw new Error("The microphone gave no sound.");
      const samples = new Float32Array(length);
      blocks.reduce((start, block) => (samples.set(block, start), start + block.length), 0);
      return encodeWav(samples, context.sampleRate);
    },
  };
}

async function openMicrophone() {
  if (!navigator.mediaDevices) {
    throw new Error("Browsers record only on pages from https or localhost; attach a file instead.");
  }
  // Speech as it is: what browsers do against noise makes it harder for models to hear.
  const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: false };
  try {
    return await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    throw new Error(
      error.name === "NotAllowedError" ? "The browser does not let this page use the microphone." : "There is no microphone that can be used.",
    );
  }
}
