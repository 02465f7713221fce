// Loads and draws beside the page, which stays quick meanwhile.
//
// in    {type: "open", device}  {type: "draw", request}  {type: "stop"}
// out   {type: "loading", done, total}  {type: "ready", manifest, references, runtime}
//       {type: "step", step, steps, image?}  {type: "done", tokens, seed, steps, image, seconds}  {type: "stopped"}
//       {type: "error", message}
// An image is {width, height, data}, 4 bytes a pixel.

import {candidates, start} from "./device.js";
import {draw} from "./draw.js";
import {Model} from "./model.js";

const ROOT = new URL("../", import.meta.url);
const messages = {open, draw: drawn, stop: async () => { stopping = true; }};
let model = null, stopping = false;

self.onmessage = async ({data}) => {
  try {
    await messages[data.type](data);
  } catch (error) {
    tell("error", {message: `${error?.message ?? error}`.split("\n")[0]});
  }
};

async function open({device}) {
  const page = await (await got("web/page.json")).json();
  const devices = await candidates(device);
  for (const each of devices) {
    try {
      const {ort, options, name} = await start(each, page.cpu_nodes);
      model = await Model.open(ort, counted(page.bytes), options);
      return tell("ready", {manifest: model.manifest, references: page.references, runtime: name});
    } catch (error) {
      if (each === devices.at(-1)) throw error;
      console.warn(`${each} could not start, the next device is tried: ${error.message}`);
    }
  }
}

async function drawn({request}) {
  stopping = false;
  const began = performance.now();
  let shown = began, cost = 0;
  const result = await draw(model, request, async ({step, steps, pixels}) => {
    // The next message is heard only after a task of its own.
    await new Promise(resolve => setTimeout(resolve));
    if (stopping) return true;
    const facts = {step, steps}, now = performance.now();
    // A preview for every step, unless decoding them would take over half of the time.
    if (step < steps && now - shown >= cost) {
      facts.image = rgba(await pixels());
      shown = performance.now();
      cost = shown - now;
    }
    tell("step", facts);
    return false;
  });
  if (result === null) return tell("stopped", {});
  const {tokens, seed, steps, image} = result, seconds = (performance.now() - began) / 1000;
  return tell("done", {tokens: Array.from(tokens, Number), seed, steps, image: rgba(image), seconds});
}

function tell(type, facts) {
  self.postMessage({type, ...facts});
}

async function got(path) {
  const answer = await fetch(new URL(path, ROOT));
  if (!answer.ok) throw new Error(`${path}: the server answers ${answer.status}`);
  return answer;
}

/** What reads files for a model and tells the page how many of `total` bytes are there. */
function counted(total) {
  let done = 0;
  return async (path, bytes) => {
    const answer = await got(path);
    if (bytes === undefined) return new Uint8Array(await answer.arrayBuffer());
    const data = new Uint8Array(bytes), reader = answer.body.getReader();
    let filled = 0;
    for (;;) {
      const {value, done: ended} = await reader.read();
      if (ended) return data.subarray(0, filled);
      if (filled + value.length > bytes) throw new Error(`${path} is longer than ${bytes} bytes`);
      data.set(value, filled);
      filled += value.length;
      done += value.length;
      tell("loading", {done, total});
    }
  };
}

function rgba({width, height, data}) {
  const wide = new Uint8ClampedArray(4 * width * height).fill(255);
  for (let pixel = 0; pixel < width * height; pixel++) wide.set(data.subarray(3 * pixel, 3 * pixel + 3), 4 * pixel);
  return {width, height, data: wide};
}
