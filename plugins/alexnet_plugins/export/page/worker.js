// Runs the network away from the page, so that the page stays quick. network.js comes before this in the worker.
//
// In:  load {about, parts} · picture {number, rgba, width, height} · run {off, norm, gray} · occlude {..., target, grids, squares} · filter {layer, unit} · stop
// Out: ready {filters} · picture {number, pixels} · layer {...} · answers {...} · allOn {...} · compared {...} · occluded {...} · filter {...} · failed {message}

"use strict";

let loading, network, picture; // `loading` is a promise; `picture` is the crop in color
let newest = 0; // number of the newest job; older ones stop at their next pause
let allOn; // the answers to this picture with nothing switched off
let comparison; // { norm, compared }: what each tower says about this picture, which the other switches do not change

const tasks = {
  async load({ about, parts }) {
    network = new Network(about, await unpack(parts));
    postMessage({ type: "ready", filters: dequantize(network.data, about.layers[0].weight) });
  },

  picture({ number, rgba, width, height }) {
    const { size, side } = network.about;
    newest = 0; // stops the jobs of the picture before
    allOn = comparison = undefined;
    picture = crop(prepare(rgba, width, height, size), size, side);
    postMessage({ type: "picture", number, pixels: picture });
  },

  async run({ job, off, norm, gray }) {
    newest = job;
    const pixels = gray ? withoutColor(picture) : picture;
    const start = performance.now();
    let shown;
    const probabilities = network.run(pixels, { off, norm }, (layer, step, values, side) => {
      if (step === layer.shown) shown = { values: values.slice(), side }; // the next step may change them in place
      if (step === layer.last && shown) postMessage({ type: "layer", job, layer: layer.name, ...shown }, [shown.values.buffer]);
      if (step === layer.last) shown = undefined;
    });
    if (!gray && norm === 1 && !off.includes(true)) allOn = probabilities;
    postMessage({ type: "answers", job, probabilities, allOn, milliseconds: performance.now() - start });
    if (!allOn) {
      await pause();
      if (job !== newest) return;
      allOn = network.run(picture);
      postMessage({ type: "allOn", job, allOn });
    }
    if (off.length > 1 && comparison?.norm !== norm) {
      const compared = [];
      for (const towers of [[false, false], [false, true], [true, false]]) {
        const answers = [];
        for (const image of [picture, withoutColor(picture)]) {
          await pause();
          if (job !== newest) return;
          answers.push(network.run(image, { off: towers, norm }));
        }
        compared.push(answers);
      }
      comparison = { norm, compared };
    }
    postMessage({ type: "compared", job, compared: comparison?.compared });
  },

  /** One grid of squares after the other; `squares` are those that are known already. */
  async occlude({ job, off, norm, gray, target, grids, squares }) {
    newest = job;
    const { side } = network.about, edge = 48, count = grids[grids.length - 1] ** 2;
    const pixels = gray ? withoutColor(picture) : picture;
    const whole = network.run(pixels, { off, norm })[target];
    for (const corners of grids.map((grid) => squareCorners(side, edge, grid))) {
      for (const [left, top] of corners.flatMap((y) => corners.map((x) => [x, y]))) {
        if (squares.some((square) => square.left === left && square.top === top)) continue;
        squares.push({ left, top, drop: whole - network.run(cover(pixels, side, left, top, edge, network.mean), { off, norm })[target] });
        await pause();
        if (job !== newest) return;
        postMessage({ type: "occluded", job, squares, edge, target, whole, done: squares.length / count });
      }
    }
  },

  filter({ layer, unit }) {
    postMessage({ type: "filter", layer, unit, inputs: network.strongestInputs(layer, unit, 6) });
  },

  stop({ job }) {
    newest = job;
  },
};

onmessage = async ({ data }) => {
  try {
    if (data.type === "load") loading = tasks.load(data);
    await loading;
    if (data.type !== "load") await tasks[data.type](data);
  } catch (error) {
    postMessage({ type: "failed", message: String(error.message || error) });
  }
};

/** Let waiting messages in. */
function pause() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = resolve;
    port2.postMessage(0);
  });
}

/** From base64 texts of gzip to the bytes, in one buffer. */
async function unpack(parts) {
  const stream = new Blob(parts.map(decodeBase64)).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

function decodeBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}
