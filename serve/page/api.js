/** What the server is asked. Every error is one line for people; `status` is the server's, where it answered. */

const V1 = new URL("../v1/", document.baseURI);
const KEY = "speechllm-key";

export const storedKey = () => sessionStorage.getItem(KEY) ?? "";
export const storeKey = (key) => sessionStorage.setItem(KEY, key.trim());

/** The model's id and its tasks: each one's name, and the words that ask for it. */
export async function readModel() {
  const [model] = (await (await request("models")).json()).data;
  return { id: model.id, tasks: model.tasks ?? { transcribe: "Transcribe this audio" } };
}

/**
 * Ask all questions about a recording; tells `onText(question's number, more text)` while answers grow.
 *
 * recording: {name, blob}. shots: {name, blob, answer} each, solved examples of the first question.
 */
export async function ask({ recording, questions, shots, signal, onText }) {
  const answers = shots.length
    ? await askOneByOne(recording, questions, shots, signal, onText)
    : await askAtOnce(recording, questions, signal, onText);
  return answers.map((answer) => ({ ...answer, file: recording.name }));
}

/** The recording is sent and heard once. */
async function askAtOnce(recording, [instruction, ...also], signal, onText) {
  const body = new FormData();
  body.append("file", recording.blob, recording.name);
  body.append("instruction", instruction);
  for (const question of also) body.append("also", question);
  body.append("stream", "true");
  let answers;
  for await (const event of events("audio/transcriptions", { body, signal })) {
    if (event.type === "transcript.text.delta") onText(event.index, event.delta);
    else answers = event.answers;
  }
  return answers ?? cutShort();
}

/** Solved examples are earlier turns of a conversation, which ends with one question. */
async function askOneByOne(recording, questions, shots, signal, onText) {
  const turns = [];
  for (const shot of shots) {
    turns.push({ role: "user", content: [await audioPart(shot), { type: "text", text: questions[0] }] });
    turns.push({ role: "assistant", content: shot.answer });
  }
  const audio = await audioPart(recording);
  return Promise.all(
    questions.map(async (text, number) => {
      const messages = [...turns, { role: "user", content: [audio, { type: "text", text }] }];
      const body = JSON.stringify({ messages, stream: true });
      const headers = { "Content-Type": "application/json" };
      let answer;
      for await (const chunk of events("chat/completions", { body, headers, signal })) {
        onText(number, chunk.choices[0].delta.content ?? "");
        answer = chunk.answer;
      }
      return answer ?? cutShort();
    }),
  );
}

async function audioPart({ name, blob }) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${name}: the browser cannot read this file any more`));
    reader.readAsDataURL(blob);
  });
  const format = /\.([a-z0-9]{1,8})$/.exec(name.toLowerCase())?.[1] ?? "wav"; // a label: the bytes tell it
  return { type: "input_audio", input_audio: { data: url.slice(url.indexOf(",") + 1), format } };
}

/** The server-sent events that answer a POST, parsed. */
async function* events(path, init) {
  const response = await request(path, { method: "POST", ...init });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (pending + value).split("\n\n");
    pending = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Error(parsed.error.message);
      yield parsed;
    }
  }
}

async function request(path, init = {}) {
  const headers = { ...init.headers };
  if (storedKey()) headers.Authorization = `Bearer ${storedKey()}`;
  const response = await fetch(new URL(path, V1), { ...init, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("the server cannot be reached");
  });
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const message = told?.error?.message ?? `the server answered ${response.status} ${response.statusText}`;
  throw Object.assign(new Error(message), { status: response.status });
}

function cutShort() {
  throw new Error("the connection ended before the answer did");
}
