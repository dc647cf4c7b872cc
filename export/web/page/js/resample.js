/**
 * `semantica.images.fit` on bytes: the centre square of a picture, resized by Pillow's arithmetic. Antialiased bicubic
 * (a = -0.5) in fixed point, along rows and along columns; far larger pictures are averaged over whole blocks
 * before (`reducing_gap=3`). A canvas would filter in whatever way its browser likes.
 */

const SUPPORT = 2;
const GAP = 3;
// of the fixed-point weights: 8 bits of a value, 2 for weights outside [0, 1]
const BITS = 32 - 8 - 2;

function bicubic(x) {
  const a = -0.5;
  const d = Math.abs(x);
  if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
  return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
}

/** For each of `size` outputs over [start, stop) of `length` inputs: the first input it reads, and its weights. */
function taps(length, start, stop, size) {
  const scale = (stop - start) / size;
  const stretch = Math.max(scale, 1);
  const support = SUPPORT * stretch;
  return Array.from({ length: size }, (_, i) => {
    const centre = start + (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(length, Math.trunc(centre + support + 0.5));
    const weights = Array.from({ length: last - first }, (_, k) => bicubic((k + first - centre + 0.5) * (1 / stretch)));
    let sum = 0;
    for (const weight of weights) sum += weight;
    const fixed = weights.map((weight) => {
      const scaled = (sum ? weight * (1 / sum) : weight) * 2 ** BITS;
      return Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    });
    return { first, weights: Int32Array.from(fixed) };
  });
}

const clamped = (sum) => Math.min(255, Math.max(0, sum >> BITS));

/** RGB bytes resized along rows, from [start, stop) of each. */
function alongRows(pixels, width, height, start, stop, size) {
  const made = new Uint8Array(height * size * 3);
  taps(width, start, stop, size).forEach(({ first, weights }, column) => {
    for (let row = 0; row < height; row++) {
      for (let c = 0; c < 3; c++) {
        let sum = 1 << (BITS - 1);
        let place = (row * width + first) * 3 + c;
        for (let k = 0; k < weights.length; k++, place += 3) sum += pixels[place] * weights[k];
        made[(row * size + column) * 3 + c] = clamped(sum);
      }
    }
  });
  return made;
}

/** RGB bytes resized along columns. */
function alongColumns(pixels, width, height, start, stop, size) {
  const made = new Uint8Array(size * width * 3);
  const line = width * 3;
  taps(height, start, stop, size).forEach(({ first, weights }, row) => {
    for (let i = 0; i < line; i++) {
      let sum = 1 << (BITS - 1);
      let place = first * line + i;
      for (let k = 0; k < weights.length; k++, place += line) sum += pixels[place] * weights[k];
      made[row * line + i] = clamped(sum);
    }
  });
  return made;
}

/** RGB bytes of a box [left, top, right, bottom), averaged over blocks of factor x factor, cut at the edges. */
function reduced(pixels, width, box, factor) {
  const [left, top, right, bottom] = box;
  const columns = Math.ceil((right - left) / factor);
  const rows = Math.ceil((bottom - top) / factor);
  const made = new Uint8Array(columns * rows * 3);
  for (let row = 0; row < rows; row++) {
    const [y0, y1] = [top + row * factor, Math.min(top + (row + 1) * factor, bottom)];
    for (let column = 0; column < columns; column++) {
      const [x0, x1] = [left + column * factor, Math.min(left + (column + 1) * factor, right)];
      const count = (x1 - x0) * (y1 - y0);
      const inverse = Math.floor(2 ** 24 / count);
      for (let c = 0; c < 3; c++) {
        let sum = Math.floor(count / 2);
        for (let y = y0; y < y1; y++) {
          for (let x = x0; x < x1; x++) sum += pixels[(y * width + x) * 3 + c];
        }
        made[(row * columns + column) * 3 + c] = Math.floor((sum * inverse) / 2 ** 24);
      }
    }
  }
  return { pixels: made, width: columns, height: rows };
}

/**
 * @param {Uint8Array} pixels RGB, rows from the top
 * @param {number} width
 * @param {number} height
 * @param {number} size side of what is wanted
 * @returns {Uint8Array} RGB [size, size, 3]
 */
export function fit(pixels, width, height, size) {
  const side = Math.min(width, height);
  const [left, top] = [0.5 * (width - side), 0.5 * (height - side)];
  let box = [left, top, Math.min(left + side, width), Math.min(top + side, height)];
  const scale = side / size;
  const factor = Math.trunc(scale / GAP) || 1;
  if (factor > 1) {
    const margin = (SUPPORT - 0.5) * scale;
    const safe = [
      Math.max(0, Math.trunc(box[0] - margin)),
      Math.max(0, Math.trunc(box[1] - margin)),
      Math.min(width, Math.ceil(box[2] + margin)),
      Math.min(height, Math.ceil(box[3] + margin)),
    ];
    ({ pixels, width, height } = reduced(pixels, width, safe, factor));
    box = box.map((edge, i) => (edge - safe[i % 2]) / factor);
  }
  // Pillow passes the box on in float32
  box = box.map(Math.fround);
  // since Pillow 13, what is cut more in height starts there; rounding between the passes depends on it
  if (height - size > Math.max(0, 2 * (width - size))) {
    const flat = alongColumns(pixels, width, height, box[1], box[3], size);
    return alongRows(flat, width, size, box[0], box[2], size);
  }
  const slim = alongRows(pixels, width, height, box[0], box[2], size);
  return alongColumns(slim, size, height, box[1], box[3], size);
}
