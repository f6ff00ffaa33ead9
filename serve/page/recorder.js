/** The microphone, to a WAV file: what a browser's own recorder writes (WebM) the server does not read. */

const RATE = 16000; // Hz; enough for speech, and an hour of it is within what a server takes by default

/**
 * Start to record. `onLevel(loudness within [0, 1], seconds so far)` is told several times a second.
 * Gives a function that stops, and gives the WAV file. Throws an Error in one line without a microphone.
 */
export async function record(onLevel) {
  if (!navigator.mediaDevices) throw new Error("the microphone needs a page by https, or from localhost");
  // as it is heard: what browsers do to voices for calls, the model has not heard in training
  const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio }).catch((error) => {
    throw new Error(`no microphone: ${error.message}`);
  });
  const [context, source] = listening(stream);
  await context.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
  const capture = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 });
  const blocks = [];
  let count = 0;
  const ended = new Promise((resolve) => {
    capture.port.onmessage = ({ data }) => {
      if (!data) return resolve();
      blocks.push(data);
      count += data.length;
      onLevel(data.reduce((peak, sample) => Math.max(peak, Math.abs(sample)), 0) / 32768, count / context.sampleRate);
    };
  });
  source.connect(capture);
  return async () => {
    capture.port.postMessage("stop");
    await ended;
    for (const track of stream.getTracks()) track.stop();
    await context.close();
    return new Blob([header(count, context.sampleRate), ...blocks], { type: "audio/wav" });
  };
}

/** Some browsers cannot resample a microphone: then at its own rate. */
function listening(stream) {
  try {
    const context = new AudioContext({ sampleRate: RATE });
    return [context, context.createMediaStreamSource(stream)];
  } catch {
    const context = new AudioContext();
    return [context, context.createMediaStreamSource(stream)];
  }
}

/** Of a WAV file of one channel of 16-bit samples. */
function header(count, rate) {
  const view = new DataView(new ArrayBuffer(44));
  const text = (at, letters) => [...letters].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * count, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); // of this part
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true); // bytes a second
  view.setUint16(32, 2, true); // bytes a sample
  view.setUint16(34, 16, true); // bits a sample
  text(36, "data");
  view.setUint32(40, 2 * count, true);
  return view;
}
