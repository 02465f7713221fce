// Where the graphs run: the build of onnxruntime-web, its threads, and the options of each session.
//
// wasm runs everywhere: with one thread where the page is not isolated from other origins, which plain file servers
// don't do. WebGPU runs where the browser has an adapter, and only if what it draws is right. There the draw's noise
// stays on the processor, for a logarithm on a GPU may be off by more than what tells the largest Gumbel numbers apart;
// and, if the first try draws something else, attention too (its kernel is wrong on adapters with subgroups of 4).

const BUILDS = new URL("onnxruntime/", import.meta.url);
const MAX_THREADS = 4;
const WASM = {device: "wasm", kept: []};
const WEBGPU = [{device: "webgpu", kept: ["noise"]}, {device: "webgpu", kept: ["noise", "attention"]}];

export const DEVICES = ["auto", "webgpu", "wasm"];

/** What to try, best first; a GPU that is made of software is used only where it is asked for. */
export async function candidates(wanted) {
  if (!DEVICES.includes(wanted)) throw new Error(`device '${wanted}' is unknown; allowed are ${DEVICES.join(", ")}`);
  if (wanted === "wasm") return [WASM];
  const adapter = await globalThis.navigator.gpu?.requestAdapter().catch(() => null);
  if (wanted === "webgpu") {
    if (!adapter) throw new Error("this browser has no WebGPU here; choose another device");
    return WEBGPU;
  }
  const software = adapter?.info?.isFallbackAdapter ?? adapter?.isFallbackAdapter ?? false;
  return adapter && !software ? [...WEBGPU, WASM] : [WASM];
}

/**
 * ONNX Runtime for one of them: {ort, options, name}; `options` is what Model.open takes.
 * `nodes` has the names of step.onnx's nodes by kind; the kinds that are kept stay on the processor.
 */
export async function start({device, kept}, nodes) {
  const ort = await import(new URL(`ort.${device}.min.mjs`, BUILDS).href);
  const threads = globalThis.crossOriginIsolated ? Math.min(MAX_THREADS, navigator.hardwareConcurrency) : 1;
  ort.env.wasm.wasmPaths = BUILDS.href;
  ort.env.wasm.numThreads = threads;
  const where = device === "wasm" ? [`wasm, ${threads} thread${threads > 1 ? "s" : ""}`] : ["WebGPU"];
  if (kept.includes("attention")) where.push("attention on the processor");
  const onGpu = {
    condition: {name: "webgpu"},
    step: {name: "webgpu", forceCpuNodeNames: kept.flatMap(kind => nodes[kind])},
    pixels: {name: "webgpu"},
  };
  const options = graph => ({executionProviders: device === "webgpu" && onGpu[graph] ? [onGpu[graph], "wasm"] : ["wasm"]});
  return {ort, options, name: `ONNX Runtime ${ort.env.versions.web}, ${where.join(", ")}`};
}
