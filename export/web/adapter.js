// Reads ONNX Runtime's adapter files (.onnx_adapter): tensors of a style by the graphs' names.
//
// They are FlatBuffers: a table points to its vtable, which says where each field lies; everything is little-endian.
//   Adapter    format_version, adapter_version, model_version, parameters
//   Parameter  name, dims (int64), data_type, raw_data
// Source: onnxruntime/lora/adapter_format/adapter_schema.fbs.

const IDENTIFIER = "TORT";
const FLOAT = 1;
const [PARAMETERS, NAME, DIMS, TYPE, DATA] = [3, 0, 1, 2, 3];

/** The file's tensors: name -> {dims, data (Float32Array)}. Throws where the file is not one, or of other numbers. */
export function readAdapter(bytes) {
  const file = new Buffer(bytes);
  if (bytes.length < 8 || file.text(4, 4) !== IDENTIFIER) throw new Error("no adapter of ONNX Runtime");
  const tensors = new Map();
  for (const parameter of file.tables(file.field(file.follow(0), PARAMETERS))) {
    const name = file.string(file.field(parameter, NAME));
    if (file.int(file.field(parameter, TYPE)) !== FLOAT) throw new Error(`${name} is not of 32-bit floating point`);
    const dims = file.longs(file.field(parameter, DIMS));
    const data = new Float32Array(file.bytes(file.field(parameter, DATA)).buffer);
    if (data.length !== dims.reduce((size, dim) => size * dim, 1)) throw new Error(`${name} is not as long as it says`);
    tensors.set(name, {dims, data});
  }
  return tensors;
}

/** Positions are bytes from the start; reading beyond the end throws a RangeError. */
class Buffer {
  constructor(bytes) {
    this.data = bytes;
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  int(at) {
    return this.view.getInt32(at, true);
  }

  follow(at) {
    return at + this.view.getUint32(at, true);
  }

  /** Where a table's field lies. */
  field(table, index) {
    const vtable = table - this.int(table);
    const place = 4 + 2 * index;
    const offset = place < this.view.getUint16(vtable, true) ? this.view.getUint16(vtable + place, true) : 0;
    if (!offset) throw new Error("an adapter without one of its fields");
    return table + offset;
  }

  /** Start and length of the vector that a field points to. */
  vector(at) {
    const start = this.follow(at);
    return [start + 4, this.view.getUint32(start, true)];
  }

  tables(at) {
    const [start, length] = this.vector(at);
    if (length > this.data.length) throw new RangeError("more tables than bytes");
    return Array.from({length}, (_, index) => this.follow(start + 4 * index));
  }

  longs(at) {
    const [start, length] = this.vector(at);
    if (length > this.data.length) throw new RangeError("more sizes than bytes");
    return Array.from({length}, (_, index) => Number(this.view.getBigInt64(start + 8 * index, true)));
  }

  /** A copy, for it may lie at any address. */
  bytes(at) {
    const [start, length] = this.vector(at);
    if (start + length > this.data.length) throw new RangeError("the file ends too early");
    return this.data.slice(start, start + length);
  }

  string(at) {
    return new TextDecoder().decode(this.bytes(at));
  }

  text(at, length) {
    return String.fromCharCode(...this.data.subarray(at, at + length));
  }
}
