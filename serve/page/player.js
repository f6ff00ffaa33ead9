/** A recording to see and hear: its shape, segments in colours, and a cursor that follows what is played. */

import { clock, h } from "./dom.js";

const BAR = 3; // pixels, the gap included
const SHAPE_RATE = 8000; // Hz, at which the shape is taken
const SHAPE_SIZE = 1500; // values
const LONGEST_SHAPE = 600; // seconds; of more only a line is shown: to decode an hour takes gigabytes
const NOBODY = "var(--field)";

let sounding = null; // one at a time

export class Player {
  /** onTime: told the seconds whenever they change. */
  constructor(blob, onTime = () => {}) {
    this.onTime = onTime;
    this.segments = []; // {start, end, color}
    this.shape = [];
    this.until = null; // seconds at which to stop
    this.audio = new Audio(URL.createObjectURL(blob));
    this.button = h("button", { type: "button", class: "play", "aria-label": "Play", onclick: () => this.toggle() });
    this.canvas = h("canvas");
    this.cursor = h("div", { class: "cursor" });
    this.wave = h(
      "div",
      { class: "wave", role: "slider", tabindex: "0", "aria-label": "Position", "aria-valuemin": "0" },
      this.canvas,
      this.cursor,
    );
    this.time = h("span", { class: "time" });
    this.element = h("div", { class: "player" }, this.button, this.wave, this.time);
    this.wave.addEventListener("click", (event) => this.click(event));
    this.wave.addEventListener("keydown", (event) => this.key(event));
    this.audio.addEventListener("durationchange", () => this.update());
    this.audio.addEventListener("timeupdate", () => this.update());
    this.audio.addEventListener("play", () => this.follow());
    this.audio.addEventListener("pause", () => this.update());
    this.audio.addEventListener("loadedmetadata", () => this.look(blob), { once: true });
    this.audio.addEventListener("error", () => {
      this.button.disabled = true;
      this.time.textContent = "cannot be played here";
    });
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.wave);
    this.closing = new AbortController();
    const { signal } = this.closing;
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw(), { signal });
    this.update();
  }

  get duration() {
    return Number.isFinite(this.audio.duration) ? this.audio.duration : 0;
  }

  /** Show segments in their colours. */
  show(segments) {
    this.segments = segments;
    this.draw();
  }

  /** Play from a time on, to the other one where it is given. */
  play(start, end = null) {
    if (sounding !== this) sounding?.audio.pause();
    sounding = this;
    this.audio.currentTime = start;
    this.until = end;
    this.audio.play().catch(() => {}); // its "error" tells
  }

  toggle() {
    if (this.audio.paused) this.play(this.audio.ended ? 0 : this.audio.currentTime);
    else this.audio.pause();
  }

  close() {
    this.audio.pause();
    this.resized.disconnect();
    this.closing.abort();
    URL.revokeObjectURL(this.audio.src);
  }

  click(event) {
    const box = this.wave.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * this.duration;
    const segment = this.segments.find(({ start, end }) => start <= at && at < end);
    if (segment) this.play(segment.start, segment.end);
    else this.play(at);
  }

  key(event) {
    const to = {
      ArrowLeft: this.audio.currentTime - 1,
      ArrowRight: this.audio.currentTime + 1,
      Home: 0,
      End: this.duration,
    }[event.key];
    if (to !== undefined) this.audio.currentTime = Math.min(this.duration, Math.max(0, to));
    else if (event.key === " " || event.key === "Enter") this.toggle();
    else return;
    event.preventDefault();
  }

  follow() {
    this.update();
    if (!this.audio.paused) requestAnimationFrame(() => this.follow());
  }

  update() {
    const { currentTime: at, paused } = this.audio;
    if (this.until !== null && at >= this.until) {
      this.until = null;
      this.audio.pause();
    }
    this.button.setAttribute("aria-label", paused ? "Play" : "Pause");
    this.cursor.style.left = `${this.duration ? (100 * at) / this.duration : 0}%`;
    this.wave.setAttribute("aria-valuenow", at.toFixed(1));
    this.wave.setAttribute("aria-valuemax", this.duration.toFixed(1));
    this.wave.setAttribute("aria-valuetext", `${at.toFixed(1)} of ${this.duration.toFixed(1)} seconds`);
    this.time.textContent = `${clock(at)} / ${clock(this.duration)}`;
    this.onTime(at);
  }

  async look(blob) {
    this.draw();
    if (this.duration > LONGEST_SHAPE) return;
    try {
      const context = new OfflineAudioContext(1, 1, SHAPE_RATE);
      this.shape = shapeOf((await context.decodeAudioData(await blob.arrayBuffer())).getChannelData(0));
    } catch {
      return; // the line stays
    }
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.wave;
    const scale = window.devicePixelRatio;
    [this.canvas.width, this.canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
    if (!this.duration) return;
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const known = {}; // to look one up takes a while
    const paint = (color) => {
      this.canvas.style.color = color;
      context.fillStyle = known[color] ??= getComputedStyle(this.canvas).color;
    };
    context.globalAlpha = 0.14;
    for (const { start, end, color } of this.segments) {
      paint(color);
      const [left, right] = [start, end].map((seconds) => (seconds / this.duration) * width);
      context.fillRect(left, 0, right - left, height);
    }
    context.globalAlpha = 1;
    const bars = Math.floor(width / BAR);
    for (let bar = 0; bar < bars; bar++) {
      const [from, to] = [bar, bar + 1].map((edge) => Math.floor((edge * this.shape.length) / bars));
      const loud = Math.max(0, ...this.shape.slice(from, Math.max(to, from + 1)));
      const at = ((bar + 0.5) / bars) * this.duration;
      const colors = this.segments.filter(({ start, end }) => start <= at && at < end).map(({ color }) => color);
      const tall = Math.max(2, loud * (height - 8)) / (colors.length || 1);
      // where several speak at once, each has a part of the bar
      (colors.length ? colors : [NOBODY]).forEach((color, part, { length }) => {
        paint(color);
        context.fillRect(bar * BAR, (height - tall * length) / 2 + part * tall, BAR - 1, tall);
      });
    }
  }
}

/** The loudest of each stretch, as a part of the loudest of all. */
function shapeOf(samples) {
  const shape = new Float32Array(Math.min(SHAPE_SIZE, samples.length));
  samples.forEach((sample, index) => {
    const at = Math.floor((index * shape.length) / samples.length);
    shape[at] = Math.max(shape[at], Math.abs(sample));
  });
  const loudest = Math.max(...shape) || 1;
  return shape.map((value) => value / loudest);
}
