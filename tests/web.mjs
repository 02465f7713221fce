// The page's modules in node, for the tests: a JSON document of jobs comes on standard input, one of answers goes out.
//
//   {"schedules": [[tokens, steps], ...]}
//   {"folder": ..., "prompts": [...]}
//   {"folder": ..., "requests": [{..., "seed": "7"}, ...], "runtime": "onnxruntime-web" or "onnxruntime-node"}

import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import {join} from "node:path";

import {draw} from "../export/web/draw.js";
import {Model} from "../export/web/model.js";
import {amused} from "../export/web/schedule.js";
import {Tokenizer} from "../export/web/tokenizer.js";

const job = JSON.parse(readFileSync(0, "utf8"));
const read = async path => new Uint8Array(readFileSync(join(job.folder, path)));
const answer = {};
if (job.schedules) answer.schedules = job.schedules.map(([tokens, steps]) => amused(tokens, steps));
if (job.prompts) {
  const {length} = JSON.parse(readFileSync(join(job.folder, "manifest.json"), "utf8"));
  const tokenizer = new Tokenizer(JSON.parse(readFileSync(join(job.folder, "tokenizer/tokenizer.json"), "utf8")), length);
  answer.ids = job.prompts.map(prompt => tokenizer.ids(prompt));
}
if (job.requests) answer.results = await drawn();
process.stdout.write(JSON.stringify(answer));

async function drawn() {
  const require = createRequire(new URL("../export/web/package.json", import.meta.url));
  const ort = require(job.runtime);
  ort.env.wasm.numThreads = 1;
  const model = await Model.open(ort, read);
  const results = [];
  for (const {seed, ...request} of job.requests) {
    const masked = [];
    const mask = BigInt(model.manifest.mask_id);
    try {
      const result = await draw(model, {...request, ...(seed === undefined ? {} : {seed: BigInt(seed)})}, async ({tokens}) => {
        masked.push(tokens.filter(token => token === mask).length);
        return request.stop === masked.length;
      });
      if (result === null) results.push({stopped: masked});
      else results.push({tokens: Array.from(result.tokens, Number), seed: String(result.seed), masked, ...picture(result)});
    } catch (error) {
      results.push({error: error.message});
    }
  }
  return results;
}

function picture({image: {width, height, data}}) {
  return {width, height, pixels: Array.from(data)};
}
