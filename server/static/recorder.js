// Records the microphone in the browser's own format: WebM with Opus, or MP4 with AAC in Safari. The server reads both.

const LEVEL_INTERVAL_MS = 50;

// Calls `onLevel(peak, seconds)` while it records, with a peak of 0 to 1.
export async function startRecording(onLevel) {
  const stream = await openMicrophone();
  const context = new AudioContext();
  const analyser = context.createAnalyser();
  context.createMediaStreamSource(stream).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);

  const recorder = new MediaRecorder(stream, { audioBitsPerSecond: 128000 });
  const chunks = [];
  recorder.ondataavailable = ({ data }) => chunks.push(data);
  recorder.start();
  const start = performance.now();
  const timer = setInterval(() => {
    analyser.getFloatTimeDomainData(samples);
    onLevel(Math.max(...samples.map(Math.abs)), (performance.now() - start) / 1000);
  }, LEVEL_INTERVAL_MS);

  function close() {
    clearInterval(timer);
    stream.getTracks().forEach((track) => track.stop()); // which also stops the recorder
    return context.close();
  }

  return {
    cancel: close,
    async finish() {
      await new Promise((resolve) => {
        recorder.onstop = resolve;
        recorder.stop();
      });
      await close();
      const recording = new Blob(chunks, { type: recorder.mimeType });
      if (!recording.size) throw new Error("The microphone recorded nothing.");
      return recording;
    },
  };
}

async function openMicrophone() {
  if (!navigator.mediaDevices) {
    throw new Error("Browsers record only on pages served over HTTPS or from localhost. Attach a file instead.");
  }
  // Unprocessed speech: noise suppression makes it harder for models to understand.
  const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: false };
  try {
    return await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    throw new Error(
      error.name === "NotAllowedError" ? "The browser blocks the microphone on this page." : "No usable microphone was found.",
    );
  }
}
