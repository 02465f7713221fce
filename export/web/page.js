// The page's controls: what is asked for goes to the worker, what comes back is shown.

import {stepsOf} from "./draw.js";
import {guidanceOf} from "./guidance.js";

const $ = id => document.getElementById(id);
// Where a slider stands that leaves its number to the style or the model.
const RECOMMENDED = {"style-guidance": -0.25, "text-guidance": -0.25, steps: 0};
const KEPT = 24;
const canvas = document.createElement("canvas");
const worker = new Worker(new URL("worker.js", import.meta.url), {type: "module"});
let styles = {}, defaults = {}, asked = null;

const shown = {
  loading({done, total}) {
    progress(done, total, `loading, ${megabytes(done)} of ${megabytes(total)} MB`);
  },
  checking() {
    busy("checking what this device draws");
  },
  ready({manifest, references, runtime}) {
    ({styles, defaults} = manifest);
    choice("", "none");
    for (const name of Object.keys(styles).sort()) choice(name, name, references.includes(name));
    $("runtime").textContent = `${runtime}; model ${manifest.model}, ${manifest.precision}.`;
    $("draw").disabled = false;
    rest("");
    sliders();
  },
  step({step, steps, image}) {
    if (image) show(image);
    progress(step, steps, `step ${step} of ${steps}`);
  },
  done({tokens, seed, image, seconds}) {
    show(image);
    keep(`${asked.prompt.trim()}${asked.style ? `, ${asked.style}` : ""}, seed ${seed}`);
    $("picture").dataset.tokens = tokens.join(" ");
    rest(`${$("picture").alt}; ${seconds.toFixed(1)} s`);
  },
  stopped() {
    rest("stopped");
  },
  error({message}) {
    rest(message, true);
  },
};

worker.onmessage = ({data}) => shown[data.type](data);
worker.onerror = event => rest(`the page's worker failed: ${event.message ?? "it could not be loaded"}`, true);

function progress(value, max, text) {
  Object.assign($("progress"), {hidden: false, max, value});
  say(text);
}

/** Something runs, nobody knows for how long. */
function busy(text) {
  $("progress").hidden = false;
  $("progress").removeAttribute("value");
  say(text);
}

/** Nothing runs any more. */
function rest(text, wrong = false) {
  asked = null;
  $("draw").textContent = "Draw";
  $("progress").hidden = true;
  say(text, wrong);
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function megabytes(bytes) {
  return (bytes / 1e6).toFixed(0);
}

const chosen = () => document.querySelector("#styles input:checked")?.value || null;
const given = id => (Number($(id).value) === RECOMMENDED[id] ? undefined : Number($(id).value));

function sliders() {
  const style = styles[chosen()], guidance = guidanceOf(style, defaults);
  const recommended = {"style-guidance": guidance.style, "text-guidance": guidance.text, steps: stepsOf(style, defaults)};
  for (const [id, number] of Object.entries(recommended)) {
    const left = number === undefined ? "as recommended" : `${number}, as recommended`;
    $(`${id}-value`).textContent = given(id) ?? left;
  }
  $("adapter-value").textContent = $("adapter").value;
  $("strengths").hidden = !style;
}

function choice(name, text, reference = false) {
  const label = document.createElement("label"), input = document.createElement("input");
  Object.assign(input, {type: "radio", name: "style", value: name, checked: !name});
  const picture = document.createElement(reference ? "img" : "span");
  if (reference) Object.assign(picture, {alt: "", src: new URL(`references/${encodeURIComponent(name)}.png`, import.meta.url)});
  else picture.className = "none";
  label.title = styles[name]?.licence ? `licence: ${styles[name].licence}` : "";
  label.append(input, picture, text);
  $("styles").append(label);
}

function show({width, height, data}) {
  Object.assign(canvas, {width, height});
  canvas.getContext("2d").putImageData(new ImageData(data, width, height), 0, 0);
  if ($("picture").hidden) {
    $("picture").hidden = false;
    $("picture").scrollIntoView({block: "nearest"});
  }
  $("picture").src = canvas.toDataURL();
}

/** Put the picture among the recent ones. */
function keep(text) {
  const button = document.createElement("button"), image = document.createElement("img");
  Object.assign(button, {type: "button", title: text});
  Object.assign(image, {alt: text, src: $("picture").src});
  button.append(image);
  button.onclick = () => {
    Object.assign($("picture"), {src: image.src, alt: text});
    say(text);
  };
  $("recent").prepend(button);
  while ($("recent").children.length > KEPT) $("recent").lastChild.remove();
  $("picture").alt = text;
}

function draw() {
  const seed = $("seed").value.trim();
  if (!/^[0-9]*$/.test(seed)) return say(`seed '${seed}' is not allowed: a whole number, or nothing`, true);
  asked = {prompt: $("prompt").value, style: chosen(), guidance: {text: given("text-guidance")}, steps: given("steps")};
  if (asked.style) {
    asked.strength = Number($("adapter").value);
    asked.guidance.style = given("style-guidance");
  }
  if (seed) asked.seed = BigInt(seed);
  $("draw").textContent = "Stop";
  busy("reading the prompt");
  ($("picture").hidden ? $("status") : $("picture")).scrollIntoView({block: "nearest"});
  return worker.postMessage({type: "draw", request: asked});
}

$("form").addEventListener("submit", event => {
  event.preventDefault();
  if (asked) worker.postMessage({type: "stop"});
  else draw();
});
$("form").addEventListener("input", sliders);
$("device").addEventListener("change", () => location.assign(`?device=${$("device").value}`));
const device = new URLSearchParams(location.search).get("device") ?? "auto";
$("device").value = device;
busy("loading");
worker.postMessage({type: "open", device});
