// An exported folder of form "bank", opened: its graphs in ONNX Runtime, its tokenizer, its styles.
//
// Needs no browser: `ort` is onnxruntime-web or onnxruntime-node, and `read` gives a file's bytes by its path.

import {readAdapter} from "./adapter.js";
import {Tokenizer} from "./tokenizer.js";

const GRAPHS = ["text", "condition", "step", "pixels"];
const AESTHETIC_SCORE = 6;

export class Model {
  /**
   * Open a folder.
   *
   * ort      the module of ONNX Runtime
   * read     async (path, bytes) => Uint8Array; `bytes` is the size that is expected, undefined for manifest.json
   * options  a function: the name of a graph -> options of its session
   */
  static async open(ort, read, options = () => ({})) {
    const manifest = JSON.parse(new TextDecoder().decode(await read("manifest.json")));
    if (manifest.schema !== 1) throw new Error(`manifest.json has schema ${manifest.schema}; 1 is supported`);
    if (manifest.form !== "bank") throw new Error(`this folder is of form '${manifest.form}'; 'bank' is needed`);
    const model = new Model(ort, manifest, read);
    const tokenizer = manifest.tokenizer.find(file => file.path.endsWith("/tokenizer.json"));
    if (!tokenizer) throw new Error("this folder has no tokenizer.json");
    model.tokenizer = new Tokenizer(JSON.parse(new TextDecoder().decode(await model.file(tokenizer))), manifest.length);
    // One after the other: a phone has no room for several graphs while they are loaded.
    for (const name of GRAPHS) model.sessions[name] = await model.session(manifest.graphs[name], options(name));
    return model;
  }

  constructor(ort, manifest, read) {
    Object.assign(this, {ort, manifest, read, sessions: {}, adapters: new Map()});
    this.inputs = Object.fromEntries(GRAPHS.map(name => [name, manifest.graphs[name].inputs]));
    this.tables = [...this.inputs.condition, ...this.inputs.step].filter(tensor => /\.(down|up)$/.test(tensor.name));
  }

  /** The style of this name, as the manifest describes it; undefined for null, the base. */
  style(name) {
    if (name === null) return undefined;
    const style = Object.hasOwn(this.manifest.styles, name) ? this.manifest.styles[name] : undefined;
    const allowed = Object.keys(this.manifest.styles).sort().join(", ") || "none";
    if (!style) throw new Error(`style '${name}' is unknown; allowed are ${allowed}`);
    return style;
  }

  /** A file of the manifest, which must have the size that it tells, and the hash where the platform has hashes. */
  async file({path, bytes, sha256}) {
    const data = await this.read(path, bytes);
    if (data.length !== bytes) throw new Error(`${path} has ${data.length} bytes, not ${bytes}`);
    const digest = await globalThis.crypto?.subtle?.digest("SHA-256", data);
    if (digest && Array.from(new Uint8Array(digest), byte => byte.toString(16).padStart(2, "0")).join("") !== sha256) {
      throw new Error(`${path} was changed: its sha256 is another`);
    }
    return data;
  }

  async session({file, data}, options) {
    const beside = data ? {externalData: [{path: data.path, data: await this.file(data)}]} : {};
    return this.ort.InferenceSession.create(await this.file(file), {logSeverityLevel: 3, ...beside, ...options});
  }

  /** What prompts say: features (R, L, D) and pooled vectors (R, P). */
  async text(prompts) {
    const ids = prompts.flatMap(prompt => this.tokenizer.ids(prompt));
    return this.sessions.text.run({ids: this.longs(ids, [prompts.length, this.manifest.length])});
  }

  /** What is the same at every step for these branches, one row each: what `step` takes beside the tokens. */
  async condition(branches, style, strength) {
    const rows = branches.length, side = this.manifest.side * this.manifest.factor;
    const text = await this.text(branches.map(branch => branch.prompt));
    const micro = Array(rows).fill([side, side, 0, 0, AESTHETIC_SCORE]).flat();
    const adapters = {
      slots: this.longs(branches.map(branch => Number(branch.styled)), [rows]),
      scales: this.floats(branches.map(branch => (branch.styled ? strength * style.scale : 1)), [rows]),
      ...(await this.bank(style)),
    };
    const given = {...text, micro: this.floats(micro, [rows, 5]), ...adapters};
    const made = await this.sessions.condition.run(this.only("condition", given));
    return this.only("step", {...adapters, ...made});
  }

  /** Tables of two slots for every place of an adapter: zeros, the base, and the style. */
  async bank(style) {
    const tensors = style ? await this.tensors(style) : new Map();
    for (const name of tensors.keys()) {
      if (!this.tables.some(table => table.name === name)) throw new Error(`this export has no place for ${name}`);
    }
    // An axis "lanes_P" is P times a rank; all tables are made as wide as the widest tensor needs.
    let rank = 1;
    const lanes = axis => (typeof axis === "string" ? Number(axis.replace("lanes_", "")) : 0);
    for (const {name, axes} of this.tables) {
      tensors.get(name)?.dims.forEach((size, index) => {
        const parts = lanes(axes[index + 1]);
        if (parts) rank = Math.max(rank, Math.ceil(size / parts));
        else if (size !== axes[index + 1]) throw new Error(`${name} is ${size} wide, this export takes ${axes[index + 1]}`);
      });
    }
    const made = {};
    for (const {name, axes} of this.tables) {
      const [rows, columns] = axes.slice(1).map(axis => (lanes(axis) ? lanes(axis) * rank : axis));
      const table = new Float32Array(2 * rows * columns), own = tensors.get(name);
      for (let row = 0; own && row < own.dims[0]; row++) {
        const width = own.dims[1];
        table.set(own.data.subarray(row * width, (row + 1) * width), (rows + row) * columns);
      }
      made[name] = new this.ort.Tensor("float32", table, [2, rows, columns]);
    }
    return made;
  }

  /** A style's tensors from its files, read once. */
  async tensors(style) {
    if (!this.adapters.has(style.name)) {
      const read = [];
      for (const file of Object.values(style.files)) {
        try {
          read.push(...readAdapter(await this.file(file)));
        } catch (error) {
          throw new Error(`${file.path} cannot be read: ${error.message}`);
        }
      }
      this.adapters.set(style.name, new Map(read));
    }
    return this.adapters.get(style.name);
  }

  /** One decoding step: tokens_out, the next step's tokens, and preview, every position drawn; BigInt64Arrays. */
  async step(given) {
    const made = await this.sessions.step.run(given);
    return {tokens: made.tokens_out.data, preview: made.preview.data};
  }

  /** Codes -> {width, height, data}, 3 bytes a pixel. */
  async pixels(tokens, grid) {
    const {images} = await this.sessions.pixels.run({tokens: new this.ort.Tensor("int64", tokens, [1, ...grid])});
    const [, height, width] = images.dims;
    return {width, height, data: images.data};
  }

  only(graph, given) {
    return Object.fromEntries(this.inputs[graph].filter(({name}) => name in given).map(({name}) => [name, given[name]]));
  }

  longs(values, dims) {
    return new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
  }

  floats(values, dims) {
    return new this.ort.Tensor("float32", Float32Array.from(values), dims);
  }
}
