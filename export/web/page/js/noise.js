/**
 * Standard normal noise: the very draws of `semantica.solvers.noise`, which are those of NumPy's SeedSequence (after
 * O'Neill's seed_seq_fe), Philox 4x64-10 (Salmon et al., SC 2011) and ziggurat (Doornik, 2005) in float32.
 */

const POOL = 4;
const WORD = (1n << 64n) - 1n;

/** @returns {number[]} a whole number below 2^53 as words of 32 bits, the lowest first, at least one. */
function words(value) {
  if (!Number.isSafeInteger(value) || value < 0) throw new RangeError(`${value} is no whole number from 0 to 2^53 - 1`);
  const high = Math.floor(value / 2 ** 32);
  return high ? [value >>> 0, high] : [value >>> 0];
}

/**
 * What NumPy's `SeedSequence(seed, spawn_key=index).generate_state(2, uint64)` gives.
 * @param {number} seed
 * @param {number[]} index
 * @returns {[bigint, bigint]}
 */
export function keyOf(seed, index) {
  const own = words(seed);
  // zeros part a seed from what is derived of it
  while (index.length && own.length < POOL) own.push(0);
  const entropy = [...own, ...index.flatMap(words)];
  let constant = 0x43b0d7e5;
  const hash = (value) => {
    value ^= constant;
    constant = Math.imul(constant, 0x931e8875);
    value = Math.imul(value, constant);
    return value ^ (value >>> 16);
  };
  const mix = (x, y) => {
    const mixed = Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y);
    return mixed ^ (mixed >>> 16);
  };
  const pool = Array.from({ length: POOL }, (_, i) => hash(entropy[i] ?? 0));
  for (let from = 0; from < POOL; from++) {
    for (let to = 0; to < POOL; to++) if (from !== to) pool[to] = mix(pool[to], hash(pool[from]));
  }
  for (const word of entropy.slice(POOL)) {
    for (let to = 0; to < POOL; to++) pool[to] = mix(pool[to], hash(word));
  }
  constant = 0x8b51f9dd;
  const state = pool.map((value) => {
    value ^= constant;
    constant = Math.imul(constant, 0x58f38ded);
    value = Math.imul(value, constant);
    return BigInt((value ^ (value >>> 16)) >>> 0);
  });
  return [state[0] | (state[1] << 32n), state[2] | (state[3] << 32n)];
}

/** Philox 4x64 with ten rounds, as NumPy counts: a function that gives the next word of 32 bits. */
function philox([first, second]) {
  let counter = 0n;
  const block = new Uint32Array(8);
  let place = block.length;

  function refill() {
    counter += 1n;
    let [a, b, c, d] = [counter & WORD, counter >> 64n, 0n, 0n];
    let [low, high] = [first, second];
    for (let round = 0; round < 10; round++) {
      const left = 0xd2e7470ee14c6c93n * a;
      const right = 0xca5a826395121157n * c;
      [a, b, c, d] = [(right >> 64n) ^ b ^ low, right & WORD, (left >> 64n) ^ d ^ high, left & WORD];
      low = (low + 0x9e3779b97f4a7c15n) & WORD;
      high = (high + 0xbb67ae8584caa73bn) & WORD;
    }
    [a, b, c, d].forEach((word, i) => {
      block[2 * i] = Number(word & 0xffffffffn);
      block[2 * i + 1] = Number(word >> 32n);
    });
    place = 0;
  }

  return () => {
    if (place === block.length) refill();
    return block[place++];
  };
}

// where the ziggurat's tail begins, and the area of each of its 256 layers
const TAIL = 3.6541528853610088;
const AREA = 0.00492867323399;
const LAYERS = 256;

/** Widths, heights and bounds of the layers: a draw of 23 bits below its bound needs no second one. */
function ziggurat() {
  const scale = 2 ** 23;
  const density = (x) => Math.exp(-0.5 * x * x);
  const bound = new Uint32Array(LAYERS);
  const width = new Float32Array(LAYERS);
  const height = new Float32Array(LAYERS);
  const base = AREA / density(TAIL);
  bound[0] = (TAIL / base) * scale;
  width[0] = base / scale;
  width[LAYERS - 1] = TAIL / scale;
  height[0] = 1;
  height[LAYERS - 1] = density(TAIL);
  let outer = TAIL;
  for (let i = LAYERS - 2; i > 0; i--) {
    const inner = Math.sqrt(-2 * Math.log(AREA / outer + density(outer)));
    bound[i + 1] = (inner / outer) * scale;
    width[i] = inner / scale;
    height[i] = density(inner);
    outer = inner;
  }
  return { bound, width, height };
}

const { bound, width, height } = ziggurat();
const f32 = Math.fround;
const log1p = (x) => f32(Math.log1p(x));

/**
 * Standard normal numbers, a function of (seed, index, count) alone.
 * @param {number} seed a whole number, 0 or more
 * @param {number[]} index further numbers, such as those of a variation and a step
 * @param {number} count
 * @returns {Float32Array}
 */
export function noise(seed, index, count) {
  const next = philox(keyOf(seed, index));
  const uniform = () => (next() >>> 8) / 2 ** 24;
  const made = new Float32Array(count);
  for (let i = 0; i < count; i++) made[i] = draw(next, uniform);
  return made;
}

function draw(next, uniform) {
  for (;;) {
    const bits = next();
    const layer = bits & 0xff;
    const size = (bits >>> 9) & 0x7fffff;
    const x = f32(f32(size) * width[layer]) * ((bits >>> 8) & 1 ? -1 : 1);
    if (size < bound[layer]) return x;
    if (layer === 0) return tail(size, uniform);
    const slope = f32(f32(height[layer - 1] - height[layer]) * f32(uniform()));
    if (f32(slope + height[layer]) < Math.exp(-0.5 * x * x)) return x;
  }
}

/** Beyond the last layer (Marsaglia, 1964). */
function tail(size, uniform) {
  for (;;) {
    const x = f32(-f32(1 / TAIL) * log1p(-uniform()));
    const y = -log1p(-uniform());
    if (f32(y + y) > f32(x * x)) return (size >>> 8) & 1 ? -f32(f32(TAIL) + x) : f32(f32(TAIL) + x);
  }
}
