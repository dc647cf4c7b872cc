/** The model beside the page, so that the page answers while it computes: messages in, messages out. */

import { load } from "./engine.js";
import { toRgba } from "./pixels.js";
import { sample } from "./sampler.js";

const said = (kind, content = {}, transfer = []) => self.postMessage({ kind, ...content }, transfer);
const failed = (error) => said("failed", { text: error instanceof Error ? error.message : String(error) });

let engine;
let stopped = false;

/** After messages that have come meanwhile, such as one to stop. */
const turn = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = resolve;
    port2.postMessage(null);
  });

async function make({ picture, settings }) {
  stopped = false;
  for await (const { done, total, first, images, finished } of sample(engine, picture, settings)) {
    const shown = images.map(toRgba);
    said("step", { done, total, first, images: shown, finished }, shown.map(({ buffer }) => buffer));
    await turn();
    if (stopped) return said("stopped");
  }
  return said("made");
}

self.onmessage = async ({ data }) => {
  try {
    if (data.kind === "load") {
      engine = await load(new URL(data.base), (got, of) => said("loading", { got, of }));
      said("ready", { facts: engine.facts, device: engine.device });
    } else if (data.kind === "make") await make(data);
    else if (data.kind === "stop") stopped = true;
  } catch (error) {
    failed(error);
  }
};
