/**
 * Solvers, thresholding and guidance: the arithmetic of `semantica.solvers`, coefficients in float64, images in
 * float32. In its notation,
 * z = alpha x + sigma eps, alpha^2 + sigma^2 = 1; v = alpha eps - sigma x; log-SNR = log(alpha^2 / sigma^2).
 */

const f32 = Math.fround;

/** DDIM without noise (arXiv 2010.02502, equation 12), which is DPM-Solver++(1). */
function ddim(from, to, size) {
  return { z: to.sigma / from.sigma, x: -to.alpha * Math.expm1(-size / 2) };
}

/** Ancestral sampling, variance sigma_s^2 (1 - exp(lambda_t - lambda_s)). */
function ddpm(from, to, size) {
  const fraction = -Math.expm1(-size);
  const z = (Math.exp(-size) * to.alpha) / from.alpha;
  return { z, x: to.alpha * fraction, noise: to.sigma * Math.sqrt(fraction) };
}

/** DPM-Solver++(2M), arXiv 2211.01095, algorithm 2; its first and last steps are of first order. */
function dpmpp2m(from, to, size, before) {
  const first = ddim(from, to, size);
  if (before === undefined || size === Infinity) return first;
  const ahead = size / (2 * before);
  return { z: first.z, x: (1 + ahead) * first.x, previous: -ahead * first.x };
}

export const SOLVERS = { dpmpp_2m: dpmpp2m, ddim, ddpm };

/**
 * Every coefficient of a run; step i is z z_i + x x_i + previous x_(i-1) + noise eps.
 * @param {string} solver
 * @param {number[]} levels n + 1 increasing log-SNRs; the last may be infinite
 * @returns {{logsnr: number, alpha: number, sigma: number, z: number, x: number, previous: number, noise: number}[]}
 */
export function plan(solver, levels) {
  const scales = levels.map((logsnr) => ({
    alpha: (1 + Math.exp(-logsnr)) ** -0.5,
    sigma: (1 + Math.exp(logsnr)) ** -0.5,
  }));
  const sizes = levels.slice(1).map((logsnr, i) => logsnr - levels[i]);
  return sizes.map((size, i) => {
    // the last step is of first order whatever level it ends at
    const before = i > 0 && i < sizes.length - 1 ? sizes[i - 1] : undefined;
    const own = SOLVERS[solver](scales[i], scales[i + 1], size, before);
    return { logsnr: levels[i], ...scales[i], previous: 0, noise: 0, ...own };
  });
}

/** alpha z - sigma v, the clean images that v predicts. */
export function predictX(step, z, v) {
  const [alpha, sigma] = [f32(step.alpha), f32(step.sigma)];
  return z.map((value, i) => f32(f32(alpha * value) - f32(sigma * v[i])));
}

/** The next z. previous: x of the step before; eps: fresh noise; each read where its coefficient is not 0. */
export function advance(step, z, x, previous, eps) {
  const [a, b, c, d] = [step.z, step.x, step.previous, step.noise].map(f32);
  return z.map((value, i) => {
    let next = f32(f32(a * value) + f32(b * x[i]));
    if (c) next = f32(next + f32(c * previous[i]));
    return d ? f32(next + f32(d * eps[i])) : next;
  });
}

/** weak + scale (own - weak), classifier-free guidance (arXiv 2207.12598). */
export function guide(own, weak, scale) {
  const factor = f32(scale);
  return own.map((value, i) => f32(weak[i] + f32(factor * f32(value - weak[i]))));
}

/**
 * Predicted clean images back in their range, in place.
 * @param {Float32Array} x images one after another
 * @param {number} length numbers of each
 * @param {object} config `thresholding`: none, clip or dynamic (Imagen, arXiv 2205.11487, section 2.3); `clip_range`,
 *     `dynamic_thresholding_ratio`
 */
export function threshold(x, length, config) {
  const { thresholding: kind = "clip", clip_range: range = 1, dynamic_thresholding_ratio: ratio = 0.995 } = config;
  if (kind === "none") return x;
  for (let start = 0; start < x.length; start += length) {
    const image = x.subarray(start, start + length);
    const limit = kind === "clip" ? range : Math.max(range, quantile(image.map(Math.abs).sort(), ratio));
    const scale = f32(range / limit);
    for (let i = 0; i < length; i++) image[i] = Math.min(Math.max(image[i], -limit), limit) * scale;
  }
  return x;
}

/** Of sorted numbers, between neighbours linearly. */
function quantile(sorted, ratio) {
  const position = ratio * (sorted.length - 1);
  const low = sorted[Math.floor(position)];
  const high = sorted[Math.ceil(position)];
  return f32(low + f32(f32(position % 1) * f32(high - low)));
}
