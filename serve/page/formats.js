/** An answer as a document, as `speechllm ask --format` writes it: see serve/formats.py. */

const NO_SPEECH = "no speech";
const SPEECH = "speech"; // what is spoken by nobody known

/** Documents by their suffix. */
export const FORMATS = {
  srt: (answer) =>
    cues(answer)
      .map((cue, index) => {
        const speaker = cue.speaker ? `${collapsed(cue.speaker)}: ` : "";
        const text = lines(cue.text).replaceAll("-->", "->");
        return `${index + 1}\n${clock(cue.start, ",")} --> ${clock(cue.end, ",")}\n${speaker}${text}\n\n`;
      })
      .join(""),
  vtt: (answer) =>
    "WEBVTT\n" +
    cues(answer)
      .map((cue) => {
        const voice = cue.speaker ? `<v ${escaped(collapsed(cue.speaker))}>` : "";
        return `\n${clock(cue.start, ".")} --> ${clock(cue.end, ".")}\n${voice}${escaped(lines(cue.text))}\n`;
      })
      .join(""),
  rttm: (answer) =>
    cues(answer)
      .map((cue) => {
        const times = [cue.start, cue.end - cue.start].map((time) => (time / 1000).toFixed(3)).join(" ");
        const name = unspaced(cue.speaker || answer.label || SPEECH);
        return `SPEAKER ${unspaced(stem(answer.file))} 1 ${times} <NA> <NA> ${name} <NA> <NA>\n`;
      })
      .join(""),
  json: (answer) => `${JSON.stringify(answer, null, 2)}\n`,
};

/** A file's name without its suffix. */
export const stem = (name) => name.replace(/(.)\.[^.]*$/, "$1");

/** Segments in milliseconds, in order of their start, none without length; of answers without any, the whole. */
function cues(answer) {
  const milliseconds = (seconds) => Math.round(1000 * seconds);
  const found = answer.segments
    .map(({ start, end, ...rest }) => ({ ...rest, start: milliseconds(start), end: milliseconds(end) }))
    .sort((one, other) => one.start - other.start);
  if (!found.length && answer.text && answer.text !== NO_SPEECH)
    found.push({ start: 0, end: milliseconds(answer.seconds_in), speaker: null, text: answer.text });
  return found.map((cue) => ({ ...cue, end: Math.max(cue.end, cue.start + 1) }));
}

function clock(milliseconds, point) {
  const two = (number) => String(Math.floor(number)).padStart(2, "0");
  const seconds = milliseconds / 1000;
  const rest = String(milliseconds % 1000).padStart(3, "0");
  return `${two(seconds / 3600)}:${two((seconds / 60) % 60)}:${two(seconds % 60)}${point}${rest}`;
}

const collapsed = (text) => text.split(/\s+/).filter(Boolean).join(" ");
const unspaced = (name) => name.split(/\s+/).filter(Boolean).join("_") || "<NA>";
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

/** Without empty lines, which would end a cue. */
const lines = (text) => text.split(/[\r\n]+/).map(collapsed).filter(Boolean).join("\n") || `[${SPEECH}]`;
