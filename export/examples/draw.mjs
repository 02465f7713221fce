// Draw with ONNX Runtime alone from a folder that `stylemuse export --form bank` wrote; "-" is the base, no style.
//
// npm install onnxruntime-node @huggingface/tokenizers pngjs
// node draw.mjs FOLDER "a fox" STYLE SEED OUT.png

import {readFileSync, writeFileSync} from "node:fs";
import {join} from "node:path";

import {Tokenizer} from "@huggingface/tokenizers";
import ort from "onnxruntime-node";
import {PNG} from "pngjs";

const [folder, given, style, seed, out] = process.argv.slice(2);
const read = path => JSON.parse(readFileSync(join(folder, path), "utf8"));
const {schedule: steps, side, length, mask_id, defaults, styles} = read("manifest.json");
const tokenizer = new Tokenizer(read("tokenizer/tokenizer.json"), read("tokenizer/tokenizer_config.json"));
const pad = tokenizer.token_to_id(tokenizer.config.pad_token);

// Guidance: a picture is a weighted sum of rows, each a prompt in a style's slot (0 is the base) at a scale.
function guidance() {
  if (style === "-") return [[defaults.scale, given, 0, 1], [1 - defaults.scale, "", 0, 1]];
  const {slot, scale, descriptor, recommended} = styles[style];
  const [prompt, advice] = [`${given} ${descriptor}`, {style: 2, text: 5, ...recommended}];
  const rows = [[1 + advice.style, prompt, slot, scale], [advice.text - advice.style, prompt, 0, 1]];
  return [...rows, [-advice.text, "", 0, 1]].filter(([weight]) => weight);
}

// A prompt is cut before its end token, and padded.
function ids(prompt) {
  const all = tokenizer.encode(prompt).ids;
  const cut = all.length > length ? [...all.slice(0, length - 1), all.at(-1)] : all;
  return [...cut, ...Array(length - cut.length).fill(pad)];
}

const rows = guidance();
const count = steps.masked_after.length;
const whole = (values, ...dims) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
const real = (values, ...dims) => new ort.Tensor("float32", Float32Array.from(values), dims);
const session = await ort.InferenceSession.create(join(folder, "generate.onnx"));
const {images, tokens_out} = await session.run({
  ids: whole(rows.flatMap(([, prompt]) => ids(prompt)), rows.length, length),
  slots: whole(rows.map(row => row[2]), rows.length),
  scales: real(rows.map(row => row[3]), rows.length),
  tokens: whole(Array(side * side).fill(mask_id), 1, side, side),
  branches: whole(rows.keys(), 1, rows.length),
  weights: real(Array(count).fill(rows.map(row => row[0])).flat(), count, 1, rows.length),
  seeds: whole([seed], 1),
  masked: whole(steps.masked_after, count, 1),
  token_temperature: real(steps.token_temperature, count, 1),
  choice_temperature: real(steps.choice_temperature, count, 1),
  raw_logit: new ort.Tensor("bool", [steps.score === "logit"], [1]),
});
const [, height, width] = images.dims;
const rgb = {colorType: 2, inputColorType: 2, inputHasAlpha: false};
writeFileSync(out, PNG.sync.write({width, height, data: Buffer.from(images.data)}, rgb));
console.log(JSON.stringify(Array.from(tokens_out.data, Number)));
