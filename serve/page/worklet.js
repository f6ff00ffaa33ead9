/** Hands on what the microphone hears as 16-bit samples; at "stop" the rest, and null after the last of it. */
const SIZE = 2048;

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Int16Array(SIZE);
    this.filled = 0;
    this.port.onmessage = () => {
      this.port.postMessage(this.block.slice(0, this.filled));
      this.port.postMessage(null);
      this.stopped = true;
    };
  }

  process([[samples]]) {
    if (this.stopped) return false;
    for (const sample of samples ?? []) {
      this.block[this.filled++] = Math.round(32767 * Math.min(1, Math.max(-1, sample)));
      if (this.filled === SIZE) {
        this.port.postMessage(this.block.slice());
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("capture", Capture);
