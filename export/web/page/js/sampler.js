/**
 * The sampling loop of `semantica.sampling.loop` over a bundle's graphs, one step at a time: whoever iterates may show
 * what there is, or stop.
 *
 * An engine has `facts` (model/model.json), `empty` (the null condition as named tensors), `run(graph, tensors)`, and
 * `bind(tensors)`, which brings what every step reads to where it runs, until `dispose()` of each; a tensor is
 * `{type, data, dims}`, as ONNX Runtime's are.
 */

import { noise } from "./noise.js";
import { toPlanes } from "./pixels.js";
import { levels } from "./schedules.js";
import { advance, guide, plan, predictX, threshold } from "./solvers.js";

const product = (numbers) => numbers.reduce((a, b) => a * b, 1);
const tensor = (data, dims) => ({ type: "float32", data, dims });

/** Typed arrays of one kind one after another. */
function concatenated(parts) {
  const made = new parts[0].constructor(parts.reduce((sum, part) => sum + part.length, 0));
  let place = 0;
  for (const part of parts) {
    made.set(part, place);
    place += part.length;
  }
  return made;
}

/**
 * The null keys or values [1, H, M, D] at the streams' sizes: copies of one token have the same softmax.
 * @param {number[]} sizes tokens of each stream
 */
function filled({ data, dims }, sizes) {
  const [, heads, tokens, width] = dims;
  if (tokens !== sizes.length) return data;
  const parts = [];
  for (let head = 0; head < heads; head++) {
    sizes.forEach((size, stream) => {
      const start = (head * tokens + stream) * width;
      for (let i = 0; i < size; i++) parts.push(data.subarray(start, start + width));
    });
  }
  return concatenated(parts);
}

/** A condition for n samples, and where there is guidance for n null ones after them. */
function batched(own, empty, sizes, n) {
  return Object.fromEntries(
    Object.entries(own).map(([name, { type, data, dims }]) => {
      const parts = Array(n).fill(data);
      if (empty) {
        const { data: raw, dims: size } = empty[name];
        // numbers of 16 bits come as another kind of array in each browser
        const alike = { data: new data.constructor(raw.buffer, raw.byteOffset, product(size)), dims: size };
        parts.push(...Array(n).fill(name === "emb" ? alike.data : filled(alike, sizes)));
      }
      return [name, { type, data: concatenated(parts), dims: [parts.length, ...dims.slice(1)] }];
    }),
  );
}

/**
 * A run of some samples from noise, one step at a time.
 * @param {object} engine
 * @param {object[]} run what `plan` gives
 * @param {Float32Array} z noise of one sample after another
 * @param {object} condition of them, and for guidance of as many null ones
 * @param {{guidance: number, fresh: (step: number) => Float32Array}} given how far v is led away from the null
 *     condition's, and noise for solvers that add it
 * @yields {{x: Float32Array, z: Float32Array}} the predicted clean images, and the next z
 */
async function* walk(engine, run, z, condition, { guidance, fresh }) {
  const { sample: shape, schedule } = engine.facts;
  const [length, half] = [product(shape), z.length];
  const batch = ((guidance === 1 ? 1 : 2) * half) / length;
  const bound = engine.bind(condition);
  let previous;
  try {
    for (const [i, step] of run.entries()) {
      const { v } = await engine.run("denoise", {
        z: tensor(guidance === 1 ? z : concatenated([z, z]), [batch, ...shape]),
        logsnr: tensor(new Float32Array(batch).fill(step.logsnr), [batch]),
        ...bound,
      });
      const guided = guidance === 1 ? v.data : guide(v.data.subarray(0, half), v.data.subarray(half), guidance);
      const x = threshold(predictX(step, z, guided), length, schedule);
      z = advance(step, z, x, previous, step.noise ? fresh(i) : undefined);
      previous = x;
      yield { x, z };
    }
  } finally {
    // also where nobody asks for the next step
    Object.values(bound).forEach((one) => one.dispose());
  }
}

/** Finished samples as images [3, R, R]: themselves, or latents decoded one at a time. */
async function finished(engine, samples) {
  const { graphs, sample: shape, size } = engine.facts;
  if (!graphs.decode) return samples;
  const images = [];
  for (const latents of samples) {
    const { images: decoded } = await engine.run("decode", { latents: tensor(latents, [1, ...shape]) });
    images.push(decoded.data.slice(0, 3 * size * size));
  }
  return images;
}

/**
 * Variations of a picture, some at a time.
 * @param {object} engine
 * @param {Uint8Array} picture RGB [S, S, 3], S the encoder's side
 * @param {{count: number, steps: number, guidance: number, seed: number, solver: string}} settings
 * @yields {{done: number, total: number, first: number, images: Float32Array[], finished: boolean}} after each step:
 *     how many there were, of how many; numbers [3, R, R] of the variations from `first` on, what they are predicted to
 *     become, or finished. Of latents there are no images before.
 */
export async function* sample(engine, picture, { count, steps, guidance, seed, solver }) {
  const { image: side, sample: shape, streams, schedule, batch, graphs } = engine.facts;
  const own = await engine.run("condition", { image: tensor(toPlanes(picture), [1, 3, side, side]) });
  const run = plan(solver, levels(schedule, solver, steps));
  const length = product(shape);
  const total = Math.ceil(count / batch) * steps;
  let done = 0;
  for (let first = 0; first < count; first += batch) {
    const rows = Array.from({ length: Math.min(batch, count - first) }, (_, j) => first + j);
    // of variation j of the only picture
    const drawn = (...index) => concatenated(rows.map((j) => noise(seed, [0, j, ...index], length)));
    const split = (all) => rows.map((_, j) => all.slice(j * length, (j + 1) * length));
    const condition = batched(own, guidance === 1 ? undefined : engine.empty, streams, rows.length);
    let last;
    for await (const { x, z } of walk(engine, run, drawn(), condition, { guidance, fresh: (i) => drawn(i + 1) })) {
      last = z;
      done += 1;
      if (done % steps) yield { done, total, first, images: graphs.decode ? [] : split(x), finished: false };
    }
    yield { done, total, first, images: await finished(engine, split(last)), finished: true };
  }
}
