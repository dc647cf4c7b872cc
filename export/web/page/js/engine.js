/**
 * A bundle's graphs in ONNX Runtime Web: on WebGPU where the browser has it, else in WebAssembly.
 */

/** The tensors of a safetensors file, as bytes. */
export function readSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  delete header.__metadata__;
  return Object.fromEntries(
    Object.entries(header).map(([name, { shape, data_offsets: [start, stop] }]) => [
      // a copy, whose numbers are aligned
      name, { data: new Uint8Array(buffer.slice(8 + length + start, 8 + length + stop)), dims: shape },
    ]),
  );
}

/** What the server says to an address, if that is a file. */
async function asked(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url.pathname}: the server says ${response.status} ${response.statusText}`);
  return response;
}

/** A file of known size beside this page; `onBytes` hears of each piece. */
async function fetched(url, size, onBytes) {
  const made = new Uint8Array(size);
  let place = 0;
  for (const reader = (await asked(url)).body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (place + value.length <= size) made.set(value, place);
    place += value.length;
    onBytes(value.length);
  }
  if (place !== size) throw new Error(`${url.pathname} has ${place} bytes, not ${size}: copy the page's folder again`);
  return made;
}

/** Whether WebGPU runs here what a model is typed as. */
async function hasWebGpu(facts) {
  const adapter = await navigator.gpu?.requestAdapter();
  return Boolean(adapter) && (facts.precision !== "fp16" || adapter.features.has("shader-f16"));
}

/**
 * Read the model and make its sessions.
 * @param {URL} base the page's folder
 * @param {(got: number, of: number) => void} onProgress bytes that have come, of how many
 * @returns an engine, see `sampler.js`, with `device`: what it runs on, in words
 */
export async function load(base, onProgress) {
  const facts = await (await asked(new URL("model/model.json", base))).json();
  const kinds = (await hasWebGpu(facts)) ? ["webgpu", "wasm"] : ["wasm"];
  const files = [facts.weights, facts.empty, ...Object.values(facts.graphs)];
  let of = [...files, facts.runtime[kinds[0]].binary].reduce((sum, { bytes }) => sum + bytes, 0);
  let got = 0;
  const count = (bytes) => onProgress((got += bytes), Math.max(of, got));
  const [weights, empty, ...graphs] = await Promise.all(
    files.map(({ file, bytes }) => fetched(new URL(`model/${file}`, base), bytes, count)),
  );
  const named = Object.fromEntries(Object.keys(facts.graphs).map((name, i) => [name, graphs[i]]));
  for (const [i, kind] of kinds.entries()) {
    try {
      const made = await sessions(base, facts, kind, named, weights, count);
      return { ...made, facts, empty: readSafetensors(empty.buffer) };
    } catch (error) {
      if (i === kinds.length - 1) throw error;
      of += facts.runtime[kinds[i + 1]].binary.bytes;
    }
  }
}

/** A session for each graph on one kind of hardware. */
async function sessions(base, facts, kind, graphs, weights, count) {
  const { module, binary } = facts.runtime[kind];
  const [ort, wasm] = await Promise.all([
    import(new URL(`runtime/${module.file}`, base)),
    fetched(new URL(`runtime/${binary.file}`, base), binary.bytes, count),
  ]);
  // threads share memory, which browsers allow to isolated pages alone
  const threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmBinary = wasm;
  ort.env.logLevel = "error";
  const externalData = [{ path: facts.weights.file, data: weights }];
  // what WebGPU leaves to the CPU is no matter for a warning
  const options = { executionProviders: [kind], externalData, logSeverityLevel: 3 };
  const made = {};
  // one after another: each reads all of the weights
  for (const [name, graph] of Object.entries(graphs)) made[name] = await ort.InferenceSession.create(graph, options);
  const device = kind === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
  const each = (tensors, make) => Object.fromEntries(Object.entries(tensors).map(([key, one]) => [key, make(one)]));
  const held = (one) => (one instanceof ort.Tensor ? one : new ort.Tensor(one.type, one.data, one.dims));
  const run = (name, tensors) => made[name].run(each(tensors, held));
  const gpu = kind === "webgpu" ? await ort.env.webgpu.device : undefined;
  const bind = (tensors) => each(tensors, gpu ? (one) => onGpu(ort, gpu, one) : held);
  return { run, bind, device };
}

/** A tensor in the memory of the GPU; it is to be disposed of. */
function onGpu(ort, gpu, { type, data, dims }) {
  // whole vectors of four words are read
  const size = Math.ceil(data.byteLength / 16) * 16;
  const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC;
  const buffer = gpu.createBuffer({ size, usage, mappedAtCreation: true });
  new Uint8Array(buffer.getMappedRange()).set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  buffer.unmap();
  return ort.Tensor.fromGpuBuffer(buffer, { dataType: type, dims, dispose: () => buffer.destroy() });
}
