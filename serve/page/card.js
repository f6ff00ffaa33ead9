/** What was asked about one recording, and the answers as they come. */

import { h } from "./dom.js";
import { FORMATS, stem } from "./formats.js";
import { Player } from "./player.js";

const COLORS = 6; // in style.css
const UNSURE = 0.5; // words below it are underlined, too
const ENDS = {
  stop: "complete",
  length: "cut: the longest answer there is",
  repetition: "cut: it went round in circles",
  timeout: "cut: time was up",
  cancelled: "cancelled",
  no_speech: "no speech",
  abstained: "withheld: too unsure",
};
const INSTEAD = { no_speech: "Nobody speaks.", abstained: "No answer: too unsure." };

export class Card {
  /** onCancel, onExample(text of the first answer): buttons. */
  constructor({ name, blob }, questions, { onCancel, onExample }) {
    this.name = name;
    this.player = new Player(blob, (seconds) => this.mark(seconds));
    this.rows = []; // {element, start, end} of segments shown
    this.answers = questions.map((question) => new AnswerView(question));
    this.cancel = h("button", { type: "button", class: "plain", onclick: onCancel }, "Cancel");
    this.example = h("button", { type: "button", class: "plain", onclick: () => onExample(this.text) }, "Use as example");
    this.remove = h("button", { type: "button", class: "plain", onclick: () => this.close() }, "Remove");
    this.state = h("p", { class: "state", role: "status" }, "Listening…");
    this.element = h(
      "article",
      { class: "card busy", "aria-label": name },
      h("div", { class: "row spread" }, h("h2", {}, name), h("div", { class: "row" }, this.cancel)),
      this.player.element,
      ...this.answers.map((view) => view.element),
      this.state,
    );
  }

  /** More of the answer to a question. */
  grow(number, text) {
    this.state.textContent = "";
    this.answers[number].grow(text);
  }

  /** All answers. Those to be seen on the waveform are the first that tell times, by the most segments. */
  finish(answers) {
    this.text = answers[0].text;
    answers.forEach((answer, number) => {
      const documents = stem(this.name) + (number ? `-${number + 1}` : "");
      this.answers[number].finish(answer, documents, (segment) => {
        this.show(this.answers[number]);
        this.player.play(segment.start, segment.end);
      });
    });
    this.show(this.answers.reduce((best, view) => (view.rows.length > best.rows.length ? view : best)));
    this.end("", this.example);
  }

  /** Why there is no answer. */
  fail(message) {
    this.end();
    this.state.replaceWith(h("p", { class: "error", role: "alert" }, message));
  }

  end(state = "", ...buttons) {
    this.element.classList.remove("busy");
    this.state.textContent = state;
    this.cancel.replaceWith(...buttons, this.remove);
    for (const view of this.answers) view.element.removeAttribute("aria-busy");
  }

  show(view) {
    this.rows = view.rows;
    this.player.show(view.rows);
  }

  /** Mark the segments that are being played. */
  mark(seconds) {
    for (const { element, start, end } of this.rows ?? [])
      element.toggleAttribute("data-now", seconds > 0 && start <= seconds && seconds < end);
  }

  close() {
    this.player.close();
    for (const { href } of this.element.querySelectorAll("a")) URL.revokeObjectURL(href);
    this.element.remove();
  }
}

class AnswerView {
  constructor(question) {
    this.rows = [];
    this.text = h("p", { class: "text", dir: "auto", "aria-live": "polite" });
    this.element = h("section", { class: "answer", "aria-busy": "true" }, h("h3", {}, question), this.text);
  }

  grow(text) {
    this.text.append(text.replace(/<\|([^|]*)\|>/g, "$1")); // marks of times and speakers
  }

  /** onPlay: told a segment, {start, end}. */
  finish(answer, name, onPlay) {
    this.text.removeAttribute("aria-live"); // it was read out as it came
    const [, language] = /^translate_(\w+)$/.exec(answer.task ?? "") ?? [];
    if (language) this.element.lang = language;
    const [segment] = answer.segments;
    const whole = answer.segments.length === 1 && !segment.speaker && segment.text === answer.text;
    if (answer.segments.length && !whole) this.text.replaceWith(this.list(answer, onPlay));
    else if (answer.words.length) this.text.replaceChildren(...spoken(answer.words));
    else this.text.replaceChildren(named(answer.slots) || answer.text || INSTEAD[answer.finish_reason] || "");
    this.element.append(h("p", { class: "faint facts" }, facts(answer)), documents(answer, name));
  }

  /** Segments as buttons that play them. */
  list(answer, onPlay) {
    const numbers = new Map(); // speakers by their first appearance
    let next = 0; // of the words, those not yet in a segment
    this.rows = answer.segments.map((segment, index) => {
      const { speaker, start, end, text } = segment;
      if (speaker && !numbers.has(speaker)) numbers.set(speaker, numbers.size);
      const color = `var(--color-${(speaker ? numbers.get(speaker) : index % 2) % COLORS})`;
      const words = wordsOf(text, answer.words.slice(next));
      next += words.taken;
      const element = h(
        "button",
        { type: "button", class: "segment", onclick: () => onPlay(segment) },
        h("span", { class: "when" }, `${start.toFixed(2)}–${end.toFixed(2)} s`),
        ...(speaker ? [h("span", { class: "speaker" }, speaker)] : []),
        h("span", { dir: "auto" }, ...words.shown),
      );
      element.style.setProperty("--color", color);
      return { element, start, end, color };
    });
    return h("ul", { class: "segments" }, ...this.rows.map(({ element }) => h("li", {}, element)));
  }
}

/** The words that a segment's text consists of; `taken`: how many of them, and before them, are used up. */
function wordsOf(text, words) {
  const count = text.split(" ").length;
  for (let from = 0; from + count <= words.length; from++) {
    const those = words.slice(from, from + count);
    if (those.map((word) => word.text).join(" ") === text) return { taken: from + count, shown: spoken(those) };
  }
  return { taken: 0, shown: [text] };
}

/** Words, the paler the less sure. */
function spoken(words) {
  return words.flatMap(({ text, confidence }, index) => {
    const tip = `${percent(confidence)} sure`;
    const word = h("span", { class: confidence < UNSURE ? "word unsure" : "word", title: tip }, text);
    word.style.setProperty("--sure", percent(confidence));
    return index ? [" ", word] : [word];
  });
}

const named = (slots) => Object.entries(slots).map((slot) => slot.join(": ")).join(" · ");
const percent = (part) => `${Math.round(100 * part)}%`;

function facts(answer) {
  const heard = `${answer.seconds_consumed.toFixed(1)} of ${answer.seconds_in.toFixed(1)} s heard`;
  return [heard, ENDS[answer.finish_reason], `${percent(answer.confidence)} sure`].join(" · ");
}

function documents(answer, name) {
  const links = Object.entries(FORMATS).map(([suffix, write]) => {
    const url = URL.createObjectURL(new Blob([write(answer)], { type: "text/plain" }));
    return h("a", { href: url, download: `${name}.${suffix}` }, suffix.toUpperCase());
  });
  return h("p", { class: "row documents" }, "Download ", ...links);
}
