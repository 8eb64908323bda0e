// Runs on the audio thread: hands on the microphone's samples, some hundredths of a second at a time.

class Recorder extends AudioWorkletProcessor {
  #block = new Float32Array(1024);
  #length = 0;

  process([[channel]]) {
    if (!channel) return true; // no source is connected yet
    this.#block.set(channel, this.#length); // always 128 samples, of which 1024 is a multiple
    this.#length += channel.length;
    if (this.#length === this.#block.length) {
      this.port.postMessage(this.#block);
      this.#length = 0;
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
