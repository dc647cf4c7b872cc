/** Noise levels of a run, as `semantica.solvers.Schedule` and `semantica.discrete.DiscreteSchedule` give them. */

/** n numbers from start to stop, as NumPy spaces them. */
function spaced(start, stop, n) {
  const stride = (stop - start) / Math.max(1, n - 1);
  return Array.from({ length: n }, (_, i) => (i > 0 && i === n - 1 ? stop : start + i * stride));
}

/** Of a half, the even neighbour, as NumPy and IEEE 754 round. */
export function rint(x) {
  const rounded = Math.round(x);
  return rounded - x === 0.5 && rounded % 2 !== 0 ? rounded - 1 : rounded;
}

/**
 * Cosine schedule, shifted by resolution and bounded (simple diffusion, arXiv 2301.11093).
 * @returns {number[]} log-SNRs of n steps, n + 1 numbers; the last is infinite
 */
function cosine(config, steps) {
  const { image_size: size, reference = 64, logsnr_min: least = -15, logsnr_max: most = 15 } = config;
  const shift = 2 * Math.log(reference / size);
  const start = Math.atan(Math.exp((shift - most) / 2));
  const end = Math.atan(Math.exp((shift - least) / 2));
  const times = spaced(1, 0, steps + 1).slice(0, steps);
  return [...times.map((t) => shift - 2 * Math.log(Math.tan(start + t * (end - start)))), Infinity];
}

// log-SNR that stands for no signal, and what multistep solvers take for a last alpha^2 of 0
const DARK = -40;
const LEAST = 2 ** -24;

/** Log-SNR of each timestep of a schedule of betas. */
function levelsOf(config) {
  const { betas, beta_start: start, beta_end: end, count, zero_snr: rescaled } = config;
  const root = betas === "scaled_linear";
  const ends = root ? [Math.sqrt(start), Math.sqrt(end)] : [start, end];
  let product = 1;
  let signal = spaced(...ends, count).map((beta) => (product *= 1 - (root ? beta * beta : beta)));
  if (rescaled) {
    const [first, last] = [Math.sqrt(signal[0]), Math.sqrt(signal[count - 1])];
    const alphas = signal.map((value) => ((Math.sqrt(value) - last) * first) / (first - last));
    signal = alphas.map((alpha) => Math.max(alpha * alpha, LEAST));
  }
  return signal.map((value) => Math.log(value) - Math.log1p(-value));
}

/** Timesteps that a run visits, falling, as diffusers' schedulers choose them (arXiv 2305.08891, table 2). */
function timesteps(config, solver, steps) {
  const { count, spacing, offset = 0 } = config;
  const [multistep, last] = [solver === "dpmpp_2m", count - 1];
  const points = multistep ? steps + 1 : steps;
  const most = Math.floor(last / 2);
  if (steps > most) throw new RangeError(`${steps} steps of ${count} timesteps: give 1 to ${most}`);
  const kind = spacing ?? (multistep ? "linspace" : "leading");
  let found;
  if (kind === "linspace") found = points > 1 ? spaced(0, last, points).map(rint) : [0];
  else if (kind === "leading") {
    const stride = Math.floor(count / points);
    found = Array.from({ length: points }, (_, i) => Math.min(i * stride + offset, last));
  } else {
    found = Array.from({ length: steps }, (_, i) => rint(count - i * (count / steps)) - 1).reverse();
  }
  return found.reverse().slice(0, steps);
}

/** Of a schedule of timesteps; the last level may be that of timestep 0. */
function discrete(config, solver, steps) {
  const all = levelsOf(config);
  const visited = timesteps(config, solver, steps);
  const levels = visited.map((t) => all[t]);
  const multistep = solver === "dpmpp_2m";
  if (config.zero_snr && !multistep && visited[0] === config.count - 1) levels[0] = DARK;
  const clean = config.clean || multistep || !(all[0] > levels[steps - 1]);
  return [...levels, clean ? Infinity : all[0]];
}

/**
 * Log-SNRs of a run.
 * @param {object} config of the model's scheduler, as in a bundle's manifest
 * @param {string} solver
 * @param {number} steps
 * @returns {number[]} n + 1 increasing levels
 */
export function levels(config, solver, steps) {
  if (!Number.isInteger(steps) || steps < 1) throw new RangeError(`${steps} steps: give a whole number, 1 or more`);
  return config.class === "DiscreteSchedule" ? discrete(config, solver, steps) : cosine(config, steps);
}
