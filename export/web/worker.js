// Loads and draws beside the page, which stays quick meanwhile.
//
// in    {type: "open", device}  {type: "draw", request}  {type: "stop"}
// out   {type: "loading", done, total}  {type: "checking"}  {type: "ready", manifest, references, runtime}
//       {type: "step", step, steps, image?}  {type: "done", tokens, seed, steps, image, seconds}  {type: "stopped"}
//       {type: "error", message}
// An image is {width, height, data}, 4 bytes a pixel.

import {candidates, start} from "./device.js";
import {draw} from "./draw.js";
import {Model} from "./model.js";

const ROOT = new URL("../", import.meta.url);
const AGREEMENT = 0.99;
const messages = {open, draw: drawn, stop: async () => { stopping = true; }};
let model = null, stopping = false;

self.onmessage = async ({data}) => {
  try {
    await messages[data.type](data);
  } catch (error) {
    tell("error", {message: oneLine(error)});
  }
};

async function open({device}) {
  const page = await (await got("web/page.json")).json();
  const left = [];
  for (const each of await candidates(device)) {
    try {
      const {ort, options, name} = await start(each, page.nodes);
      model = await Model.open(ort, counted(page.bytes), options);
      if (each.device !== "wasm") await check(page.probe);
      const runtime = [name, ...left].join("; ");
      return tell("ready", {manifest: model.manifest, references: page.references, runtime});
    } catch (error) {
      left.push(`${each.device} was left: ${oneLine(error)}`);
    }
  }
  throw new Error(left.at(-1).replace(/^\w+ was left: /, ""));
}

/** Throws unless the tokens of a first step are those of the export; a token whose two best codes all but tie may fall. */
async function check({request, tokens}) {
  tell("checking", {});
  const drawn = await draw(model, {...request, seed: BigInt(request.seed)});
  const equal = tokens.filter((token, index) => BigInt(token) === drawn.tokens[index]).length / tokens.length;
  if (!(equal >= AGREEMENT)) throw new Error(`only ${(100 * equal).toFixed(0)} % of its tokens are as they should be`);
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

function oneLine(error) {
  return `${error?.message ?? error}`.split("\n")[0];
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
