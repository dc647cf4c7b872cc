/** The page: what was chosen goes to the worker, what it says is shown. */

import { pictureIn, read } from "./picture.js";
import { clear, draw, offerSheet, show } from "./results.js";

const find = (id) => document.getElementById(id);
const [form, file, drop, shown, make, cancel, bar, status] =
  ["form", "file", "drop", "shown", "make", "cancel", "bar", "status"].map(find);
const settings = ["count", "steps", "guidance", "seed", "solver"].map(find);
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const still = matchMedia("(prefers-reduced-motion: reduce)");

// besides, once they are there: facts of the model; picture, RGB bytes as the model takes them; waiting, a file
const state = { running: false, began: 0, stem: "picture", name: "" };
// images of a run take their places one step after the other
let queue = Promise.resolve();

function say(text, wrong = false) {
  status.textContent = text;
  status.classList.toggle("wrong", wrong);
}

function progress(value, text = "") {
  find("progress").hidden = value === undefined;
  bar.value = value ?? 0;
  find("counted").textContent = text;
}

function refresh() {
  // not `disabled`, which would take the focus away
  make.ariaDisabled = String(!state.facts || !state.picture || state.running);
  cancel.hidden = !state.running;
}

const invite = () => say(state.picture ? "Ready." : "Ready: choose a picture.");

async function take(chosen) {
  if (!chosen || state.running) return;
  // the model says how large it wants a picture
  if (!state.facts) {
    state.waiting = chosen;
    find("name").textContent = chosen.name;
    return;
  }
  try {
    state.picture = await read(chosen, state.facts.image);
    state.stem = chosen.name.replace(/\.[^.]*$/, "") || "picture";
    const rgba = new Uint8ClampedArray(state.picture.length / 3 * 4).fill(255);
    state.picture.forEach((value, i) => (rgba[Math.floor(i / 3) * 4 + (i % 3)] = value));
    draw(shown, rgba);
    shown.hidden = false;
    find("invitation").hidden = true;
    drop.classList.add("filled");
    find("name").textContent = `${chosen.name}: the square in its middle, as the model sees it.`;
    invite();
  } catch (error) {
    say(error.message, true);
  }
  refresh();
}

const heard = {
  loading({ got, of }) {
    progress(got / of, `${(got / 1e6).toFixed(1)} of ${(of / 1e6).toFixed(1)} MB`);
  },
  ready({ facts, device }) {
    state.facts = facts;
    find("guidance").value = facts.guidance;
    const solver = find("solver");
    solver.value = facts.schedule.solver;
    // one that this page does not know
    if (!solver.value) solver.value = "dpmpp_2m";
    settings.forEach(told);
    find("facts").textContent =
      `${facts.size} x ${facts.size} pixels, ${facts.precision}, on ${device}; Semantica ${facts.semantica}`;
    progress();
    invite();
    refresh();
    take(state.waiting);
  },
  step({ done, total, first, images, finished }) {
    progress(done / total, `Step ${done} of ${total}`);
    // aloud a few times only
    if (Math.floor((4 * done) / total) > Math.floor((4 * (done - 1)) / total) && done < total) {
      say(`${Math.floor((100 * done) / total)} % done.`);
    }
    if (finished || !still.matches) queue = queue.then(() => show(images, first, finished, state.name));
  },
  async made() {
    await queue;
    await offerSheet(shown, state.name);
    over(`Done in ${((performance.now() - state.began) / 1000).toFixed(1)} s.`);
  },
  stopped() {
    queue.then(() => over("Cancelled."));
  },
  failed({ text }) {
    over(state.facts ? `This went wrong: ${text}` : `The model cannot be loaded: ${text}`, true);
  },
};

function over(text, wrong = false) {
  const focused = document.activeElement === cancel;
  state.running = false;
  progress();
  refresh();
  say(text, wrong);
  // what had the focus is hidden now
  if (focused) make.focus();
}

function told(input) {
  const output = form.querySelector(`output[for="${input.id}"]`);
  if (output) output.value = input.value;
}

worker.onmessage = ({ data: { kind, ...content } }) => heard[kind](content);
worker.onerror = (event) => heard.failed({ text: event.message ?? "a script cannot be read" });
settings.forEach((input) => {
  told(input);
  input.addEventListener("input", () => told(input));
});
file.addEventListener("change", () => take(file.files[0]));
addEventListener("paste", (event) => take(pictureIn(event.clipboardData)));
for (const kind of ["dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(pictureIn(event.dataTransfer));
  });
}
find("another").addEventListener("click", () => {
  find("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
});
cancel.addEventListener("click", () => worker.postMessage({ kind: "stop" }));
form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.running || !state.facts) return;
  if (!state.picture) {
    say("Choose a picture first.", true);
    return;
  }
  const [count, steps, guidance, seed] = settings.slice(0, 4).map(({ value }) => Number(value));
  const asked = { count, steps, guidance, seed, solver: find("solver").value };
  Object.assign(state, { running: true, name: `${state.stem}-seed${seed}`, began: performance.now() });
  clear(count);
  progress(0);
  say("Making variations.");
  refresh();
  worker.postMessage({ kind: "make", picture: state.picture, settings: asked });
});
say("Loading the model.");
worker.postMessage({ kind: "load", base: new URL("..", import.meta.url).href });
