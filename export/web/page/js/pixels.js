/** Between bytes and the numbers that networks take and give: `semantica.images.to_planes` and `to_uint8`. */

import { rint } from "./schedules.js";

/** RGB bytes [S, S, 3] to numbers [3, S, S] in [-1, 1]. */
export function toPlanes(pixels) {
  const area = pixels.length / 3;
  const planes = new Float32Array(pixels.length);
  pixels.forEach((value, i) => {
    planes[(i % 3) * area + Math.floor(i / 3)] = Math.fround(value / 127.5) - 1;
  });
  return planes;
}

/** Numbers [3, S, S] around [-1, 1] to opaque RGBA bytes [S, S, 4]. */
export function toRgba(planes) {
  const area = planes.length / 3;
  const bytes = new Uint8ClampedArray(4 * area).fill(255);
  for (let c = 0; c < 3; c++) {
    for (let i = 0; i < area; i++) {
      bytes[4 * i + c] = rint(Math.fround(Math.fround(planes[c * area + i] + 1) * 127.5));
    }
  }
  return bytes;
}

/** RGBA bytes without their alpha. */
export function toRgb(rgba) {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let i = 0, j = 0; i < rgba.length; i += 4) {
    rgb[j++] = rgba[i];
    rgb[j++] = rgba[i + 1];
    rgb[j++] = rgba[i + 2];
  }
  return rgb;
}
