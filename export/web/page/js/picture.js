/** A picture that somebody chose, as the bytes that the model takes. */

import { toRgb } from "./pixels.js";
import { fit } from "./resample.js";

// as `semantica.images.MAX_PIXELS`; and what the canvas of every browser holds
const MOST = Math.floor(1024 ** 3 / 4 / 3);
const CANVAS = 4096 ** 2;
const LEAST_SIDE = 2;

/**
 * @param {Blob} file in any format that the browser reads
 * @param {number} size
 * @returns {Promise<Uint8Array>} RGB [size, size, 3]: upright, on white, without colour management
 */
export async function read(file, size) {
  // numbers as they are stored, as Pillow gives them
  const as = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, as);
  } catch {
    throw new Error("This is no picture that the browser can read.");
  }
  let { width, height } = bitmap;
  if (width * height > MOST) throw new Error(`The picture has ${width} x ${height} pixels: at most ${MOST} are read.`);
  if (Math.min(width, height) < LEAST_SIDE) throw new Error(`The picture has ${width} x ${height} pixels: too few.`);
  const shrink = Math.min(1, Math.sqrt(CANVAS / (width * height)));
  [width, height] = [Math.max(1, Math.floor(width * shrink)), Math.max(1, Math.floor(height * shrink))];
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return fit(toRgb(context.getImageData(0, 0, width, height).data), width, height, size);
}

/** The picture in a paste or a drop, if there is one. */
export const pictureIn = (transfer) => [...(transfer?.files ?? [])].find(({ type }) => type.startsWith("image/"));
