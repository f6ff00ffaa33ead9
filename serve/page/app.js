/** The form: a recording, questions about it, examples; each time it is sent makes a card. */

import { ask, readModel, storedKey, storeKey } from "./api.js";
import { Card } from "./card.js";
import { byId, clock, h } from "./dom.js";
import { Player } from "./player.js";
import { record } from "./recorder.js";

let recording = null; // {name, blob}
let preview = null; // its Player
let stopRecording = null; // while the microphone is on
let recorded = 0; // so many times
const shots = new Map(); // row → {name, blob, input: of its answer}

function complain(message) {
  byId("problem").textContent = message;
}

// -- the recording --

function choose(name, blob) {
  complain("");
  preview?.close();
  recording = { name, blob };
  preview = new Player(blob);
  byId("chosen").replaceChildren(h("p", { class: "name" }, name), preview.element);
}

async function toggleRecording() {
  const button = byId("record");
  button.disabled = true; // until it has begun, or ended
  try {
    if (stopRecording) {
      const blob = await stopRecording();
      stopRecording = null;
      const name = `recording-${++recorded}.wav`;
      choose(name, blob);
      byId("chosen").append(h("a", { href: preview.audio.src, download: name }, "Save the recording"));
    } else {
      complain("");
      stopRecording = await record((loudness, seconds) => {
        byId("level").value = loudness;
        byId("elapsed").textContent = clock(seconds);
      });
    }
  } catch (error) {
    complain(error.message);
  }
  byId("recording").hidden = !stopRecording;
  button.textContent = stopRecording ? "Stop" : "Record";
  button.disabled = false;
}

function takeFile(input, take) {
  input.addEventListener("change", () => {
    const [file] = input.files;
    if (file) take(file.name, file);
    input.value = ""; // so that the same one can be chosen again
  });
}

function takeDrops(zone) {
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
  document.addEventListener("dragleave", () => zone.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    const files = event.dataTransfer.files;
    if (files.length === 1) choose(files[0].name, files[0]);
    else complain("Drop one file, please.");
  });
}

// -- the questions --

/** Those the model knows, the first chosen; one with a gap is completed by hand. */
function offer(tasks) {
  const known = Object.values(tasks);
  byId("tasks").replaceChildren(
    ...known.map((wording, index) =>
      wording.includes("{}")
        ? h("button", { type: "button", class: "chip", onclick: () => write(wording) }, wording.replace("{}", "…"))
        : h("label", { class: "chip" }, h("input", { type: "checkbox", value: wording, checked: index === 0 }), wording),
    ),
  );
}

/** A row for a question of one's own. A gap is selected, to be typed over. */
function write(wording = "") {
  const input = h("input", { "aria-label": "Question", placeholder: "What do you want to know?" });
  const row = h("div", { class: "row own" }, input, removal(() => row.remove()));
  byId("own").append(row);
  input.value = wording.replace("{}", "…");
  input.focus();
  const gap = input.value.indexOf("…");
  if (gap >= 0) input.setSelectionRange(gap, gap + 1);
}

function questions() {
  const chosen = [...byId("tasks").querySelectorAll(":checked")];
  const own = [...byId("own").querySelectorAll("input")];
  return [...chosen, ...own].map((input) => input.value.trim()).filter(Boolean);
}

// -- the examples --

function addShot(name, blob, answer = "") {
  byId("examples").open = true;
  const input = h("input", { "aria-label": `Answer about ${name}`, placeholder: "Its answer" });
  input.value = answer;
  const remove = removal(() => {
    shots.delete(row);
    row.remove();
  });
  const row = h("div", { class: "row own" }, h("span", { class: "name" }, name), input, remove);
  shots.set(row, { name, blob, input });
  byId("shots").append(row);
  input.focus();
}

function removal(remove) {
  return h("button", { type: "button", class: "plain", "aria-label": "Remove", onclick: remove }, "✕");
}

// -- to ask --

async function submit() {
  if (stopRecording) await toggleRecording();
  const asked = questions();
  const examples = [...shots.values()].map(({ name, blob, input }) => ({ name, blob, answer: input.value.trim() }));
  if (!recording) return complain("Record something, or choose a file.");
  if (!asked.length) return complain("Choose a question, or write one.");
  if (examples.some(({ answer }) => !answer)) return complain("An example has no answer yet.");
  complain("");
  const { name, blob } = recording;
  const cancelling = new AbortController();
  const card = new Card(recording, asked, {
    onCancel: () => cancelling.abort(),
    onExample: (answer) => addShot(name, blob, answer),
  });
  byId("answers").querySelector(".empty")?.remove();
  byId("answers").prepend(card.element);
  card.element.scrollIntoView();
  const { signal } = cancelling;
  const onText = (number, text) => card.grow(number, text);
  try {
    card.finish(await ask({ recording, questions: asked, shots: examples, signal, onText }));
  } catch (error) {
    cancelling.abort(); // what else is under way for it
    if (error.name === "AbortError") card.end("Cancelled");
    else card.fail(error.message);
    if (error.status === 401) byId("access").open = true;
  }
}

async function start() {
  complain("");
  try {
    const model = await readModel();
    byId("model").textContent = model.id;
    offer(model.tasks);
  } catch (error) {
    complain(error.message);
    byId("access").open = error.status === 401;
  }
}

byId("record").addEventListener("click", toggleRecording);
takeFile(byId("file"), choose);
takeFile(byId("shot"), addShot);
takeDrops(byId("drop"));
byId("write").addEventListener("click", () => write());
byId("key").value = storedKey();
byId("key").addEventListener("change", (event) => {
  storeKey(event.target.value);
  start();
});
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
start();
