/** The variations on the page: shown while they are made, saved when they are finished. */

const SMALL = 128;
const grid = document.querySelector("#grid");
const sheet = document.querySelector("#sheet");
let urls = [];

/** Draw RGBA bytes [S, S, 4] on a canvas. */
export function draw(canvas, bytes) {
  const side = Math.sqrt(bytes.length / 4);
  if (canvas.width !== side) Object.assign(canvas, { width: side, height: side });
  canvas.classList.toggle("small", side <= SMALL);
  canvas.getContext("2d").putImageData(new ImageData(bytes, side, side), 0, 0);
}

const saved = async (canvas) => {
  const url = URL.createObjectURL(await new Promise((resolve) => canvas.toBlob(resolve, "image/png")));
  urls.push(url);
  return url;
};

/** Places for so many variations; what was there before is gone. */
export function clear(count) {
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = [];
  document.querySelector("#nothing").hidden = true;
  sheet.hidden = true;
  grid.style.setProperty("--columns", Math.min(4, Math.ceil(Math.sqrt(count))));
  grid.replaceChildren(
    ...Array.from({ length: count }, (_, i) => {
      const item = document.createElement("li");
      const figure = item.appendChild(document.createElement("figure"));
      const canvas = figure.appendChild(document.createElement("canvas"));
      Object.assign(canvas, { width: 1, height: 1, role: "img", ariaLabel: `Variation ${i + 1}, not finished` });
      figure.appendChild(document.createElement("figcaption")).textContent = `${i + 1}`;
      return item;
    }),
  );
}

/** The images of a step, from variation `first` on. */
export async function show(images, first, finished, name) {
  const canvases = [...grid.querySelectorAll("canvas, img")].slice(first, first + images.length);
  images.forEach((bytes, i) => draw(canvases[i], bytes));
  if (!finished) return;
  await Promise.all(canvases.map((canvas, i) => finish(canvas, first + i, name)));
}

async function finish(canvas, number, name) {
  const src = await saved(canvas);
  const image = Object.assign(new Image(canvas.width, canvas.height), { src, alt: `Variation ${number + 1}` });
  image.className = canvas.className;
  const caption = canvas.parentElement.querySelector("figcaption");
  await image.decode();
  canvas.replaceWith(image);
  const link = Object.assign(document.createElement("a"), { className: "button", href: src, textContent: "Save" });
  link.download = `${name}-${number}.png`;
  link.ariaLabel = `Save variation ${number + 1}`;
  caption.append(link);
}

/** One picture of the source and all variations, side by side, to be saved. */
export async function offerSheet(source, name) {
  const images = [...grid.querySelectorAll("img")];
  const [side, gap] = [images[0].naturalWidth, 2];
  const columns = Math.ceil(Math.sqrt(images.length + 1));
  const place = (i) => gap + i * (side + gap);
  const rows = Math.ceil((images.length + 1) / columns);
  const canvas = Object.assign(document.createElement("canvas"), { width: place(columns), height: place(rows) });
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  [source, ...images].forEach((image, i) => {
    context.drawImage(image, place(i % columns), place(Math.floor(i / columns)), side, side);
  });
  Object.assign(sheet, { href: await saved(canvas), download: `${name}.png`, hidden: false });
}
