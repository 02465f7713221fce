// A request -> a picture: the decoding loop, over the graphs of an opened folder.
//
// The mirror of `stylemuse`'s loop for one picture: its branches are the rows of every step, the noise is made inside
// step.onnx from the seed. So the same request gives the same tokens here and there.

import {branches, guidanceOf} from "./guidance.js";
import {amused} from "./schedule.js";

const DEFAULT_STEPS = 12;
const MAX_STEPS = 1000;
const MAX_PROMPT = 10_000;
const SEED_BITS = 63n;
const BLANK = /^[\p{White_Space}\x1c-\x1f]+|[\p{White_Space}\x1c-\x1f]+$/gu;

/**
 * Draw a picture.
 *
 * model    as Model.open gave it
 * request  {prompt, style: a name or null, strength: multiplies the adapter, guidance: {style, text} of StyleDrop, what
 *          is left out being as recommended, steps, seed: a BigInt}; what is left out is the style's or the model's
 * onStep   async ({step, steps, tokens, pixels}) => true to stop: after every step, with the tokens as they stand and a
 *          function that decodes them
 *
 * Returns {tokens, grid, image, seed, steps}, or null if it was stopped.
 */
export async function draw(model, request, onStep = async () => false) {
  const plan = decide(model, request);
  const {manifest, ort} = model, {seed, steps, grid} = plan, mask = BigInt(manifest.mask_id);
  const rows = plan.branches.length, numbers = amused(grid[0] * grid[1], steps);
  const constant = {
    ...(await model.condition(plan.branches, plan.style, plan.strength)),
    sources: model.longs(Array(rows).fill(0), [rows]),
    branches: model.longs(plan.branches.keys(), [1, rows]),
    weights: model.floats(plan.branches.map(branch => branch.weight), [1, rows]),
    seeds: model.longs([seed], [1]),
    raw_logit: new ort.Tensor("bool", Uint8Array.of(Number(numbers.rawLogit)), [1]),
  };
  let tokens = new BigInt64Array(grid[0] * grid[1]).fill(mask), preview = tokens;
  for (let step = 0; step < steps; step++) {
    ({tokens, preview} = await model.step({
      ...constant,
      tokens: new ort.Tensor("int64", tokens, [1, ...grid]),
      steps: model.longs([step], [1]),
      masked: model.longs([numbers.maskedAfter[step]], [1]),
      token_temperature: model.floats([numbers.tokenTemperature[step]], [1]),
      choice_temperature: model.floats([numbers.choiceTemperature[step]], [1]),
    }));
    const now = preview, pixels = () => model.pixels(now, grid);
    if (await onStep({step: step + 1, steps, tokens, pixels})) return null;
  }
  return {tokens: preview, grid, image: await model.pixels(preview, grid), seed, steps};
}

/** How many steps a style recommends, or the model. */
export function stepsOf(style, defaults) {
  return style?.recommended.steps ?? defaults.steps ?? DEFAULT_STEPS;
}

/** A request with nothing left open; throws one line for what is not allowed. */
function decide(model, {prompt, style: name = null, strength = 1, guidance, steps, seed = freshSeed()}) {
  const {defaults, side} = model.manifest, style = model.style(name);
  const trimmed = String(prompt).replace(BLANK, "");
  if (!trimmed) throw new Error("the prompt is empty; say what to draw, for example 'a fox'");
  if (prompt.length > MAX_PROMPT) throw new Error(`the prompt has over ${MAX_PROMPT} characters, which are allowed`);
  if (!Number.isFinite(strength)) throw new Error(`strength ${strength} is not allowed: a finite number`);
  const count = steps ?? stepsOf(style, defaults);
  if (!(Number.isInteger(count) && count >= 1 && count <= MAX_STEPS)) {
    throw new Error(`steps = ${count} is not allowed: a whole number from 1 to ${MAX_STEPS}`);
  }
  if (typeof seed !== "bigint" || seed < 0n || seed >> SEED_BITS) {
    throw new Error(`seed ${seed} is not allowed: a BigInt from 0 to 2^63 - 1`);
  }
  const descriptor = style && style.descriptor && !prompt.includes(style.descriptor) ? ` ${style.descriptor}` : "";
  const rows = branches(trimmed + descriptor, Boolean(style), guidanceOf(style, defaults, guidance));
  return {branches: rows, style, strength, steps: count, seed, grid: [side, side]};
}

/** A seed from the operating system, below 2^53, which every JSON reader keeps. */
function freshSeed() {
  const [low, high] = globalThis.crypto.getRandomValues(new Uint32Array(2));
  return (BigInt(high & 0x1fffff) << 32n) | BigInt(low);
}
