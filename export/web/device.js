// Where the graphs run: the build of onnxruntime-web, its threads, and the options of each session.
//
// wasm runs everywhere: with one thread where the page is not isolated from other origins, which plain file servers
// don't do. WebGPU runs where the browser has an adapter; there the draw's noise stays on the processor, for a logarithm
// on a GPU may be off by more than what tells the largest Gumbel numbers apart, and a seed would mean another picture.

const BUILDS = new URL("onnxruntime/", import.meta.url);
const MAX_THREADS = 4;
const ON_CPU = new Set(["text"]);

export const DEVICES = ["auto", "webgpu", "wasm"];

/** Devices to try, best first; a GPU that is made of software is used only where it is asked for. */
export async function candidates(wanted) {
  if (!DEVICES.includes(wanted)) throw new Error(`device '${wanted}' is unknown; allowed are ${DEVICES.join(", ")}`);
  if (wanted === "wasm") return ["wasm"];
  const adapter = await globalThis.navigator.gpu?.requestAdapter().catch(() => null);
  if (wanted === "webgpu") {
    if (!adapter) throw new Error("this browser has no WebGPU here; choose another device");
    return ["webgpu"];
  }
  const software = adapter?.info?.isFallbackAdapter ?? adapter?.isFallbackAdapter ?? false;
  return adapter && !software ? ["webgpu", "wasm"] : ["wasm"];
}

/**
 * ONNX Runtime for a device: {ort, options, name}; `options` is what Model.open takes.
 * `cpuNodes` are the nodes of each graph that stay on the processor.
 */
export async function start(device, cpuNodes) {
  const ort = await import(new URL(`ort.${device}.min.mjs`, BUILDS).href);
  const threads = globalThis.crossOriginIsolated ? Math.min(MAX_THREADS, navigator.hardwareConcurrency) : 1;
  ort.env.wasm.wasmPaths = BUILDS.href;
  ort.env.wasm.numThreads = threads;
  const where = device === "webgpu" ? "WebGPU" : `wasm, ${threads} thread${threads > 1 ? "s" : ""}`;
  const options = graph => {
    if (device === "wasm" || ON_CPU.has(graph)) return {executionProviders: ["wasm"]};
    return {executionProviders: [{name: "webgpu", forceCpuNodeNames: cpuNodes[graph] ?? []}, "wasm"]};
  };
  return {ort, options, name: `ONNX Runtime ${ort.env.versions.web}, ${where}`};
}
