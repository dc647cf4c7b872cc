// variations of a picture in Node, by the model that `semantica export --one-file` writes
// usage: node variations.mjs MODEL.onnx PICTURE.ppm OUT.ppm [COUNT=4] [STEPS=20] [GUIDANCE=1.5] [NOISE.f32]
import { readFileSync, writeFileSync } from "node:fs";
import { argv, exit } from "node:process";
import ort from "onnxruntime-node";

/** A binary PPM as {width, height, data}. */
function readPpm(path) {
  const bytes = readFileSync(path);
  const header = /^P6\s+(?:#[^\n]*\n\s*)*(\d+)\s+(\d+)\s+255\s/.exec(bytes.toString("latin1", 0, 512));
  if (!header) throw new Error(`${path} is no binary PPM with 8 bits`);
  const [width, height] = [Number(header[1]), Number(header[2])];
  const data = new Uint8Array(bytes.subarray(header[0].length, header[0].length + 3 * width * height));
  if (data.length < 3 * width * height) throw new Error(`${path} ends too early`);
  return { width, height, data };
}

/** Standard normal numbers (Box and Muller). */
function normal(count) {
  const draw = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
  return Float32Array.from({ length: count }, draw);
}

/** Numbers from a file of float32. */
function readNoise(path, count) {
  const bytes = readFileSync(path);
  if (bytes.length !== 4 * count) throw new Error(`${path} has ${bytes.length} bytes, not ${4 * count}`);
  return new Float32Array(new Uint8Array(bytes).buffer);
}

async function main([model, picture, out, count = 4, steps = 20, guidance = 1.5, noise]) {
  if (!out) {
    throw new Error("usage: variations.mjs MODEL.onnx PICTURE.ppm OUT.ppm [COUNT] [STEPS] [GUIDANCE] [NOISE.f32]");
  }
  const session = await ort.InferenceSession.create(model);
  const shapes = Object.fromEntries(session.inputMetadata.map(({ name, shape }) => [name, shape]));
  const [, side] = shapes.image;
  const latent = shapes.noise.slice(1);
  const batch = Number(count);
  const { width, height, data } = readPpm(picture);
  if (width !== side || height !== side) {
    throw new Error(`${picture} has ${width} x ${height} pixels, the model takes ${side} x ${side}`);
  }
  // one picture for each variation, and noise of its own
  const images = new Uint8Array(batch * data.length);
  for (let i = 0; i < batch; i++) images.set(data, i * data.length);
  const numbers = batch * latent.reduce((a, b) => a * b);
  const result = await session.run({
    image: new ort.Tensor("uint8", images, [batch, side, side, 3]),
    noise: new ort.Tensor("float32", noise ? readNoise(noise, numbers) : normal(numbers), [batch, ...latent]),
    steps: new ort.Tensor("int64", [BigInt(steps)], []),
    guidance: new ort.Tensor("float32", [Number(guidance)], []),
  });
  const [, rows, columns] = result.images.dims;
  // the variations one under the other
  writeFileSync(out, Buffer.concat([Buffer.from(`P6\n${columns} ${batch * rows}\n255\n`), result.images.data]));
}

main(argv.slice(2)).catch((error) => {
  console.error(error.message);
  exit(1);
});
