// What people see and touch. The network runs in a worker (network.js, worker.js); this file sends pictures and draws.
// All text from files (class names, the title) is set as textContent, never as HTML.

"use strict";

const byId = (id) => document.getElementById(id);
const about = JSON.parse(byId("about").textContent);
const layers = Object.fromEntries(about.layers.map((layer) => [layer.name, layer]));
const hasTowers = about.towers > 1;
const towers = Array.from({ length: about.towers }, (_, tower) => tower);
const colors = [[90, 190, 220], [245, 150, 80]]; // of the maps of tower 1 and 2
const strongestShown = 6;
const leastRange = 0.2; // of the occlusion map: full color is a change of 20 points at least, so that noise stays pale
const grids = [4, 7], finestGrid = 13; // squares along a side: each grid has those of the one before
const weakDrop = 0.05; // a square that costs less than 5 points says little
const largestCanvas = 2 ** 24; // pixels, the limit of phones; larger pictures are made smaller first

const settings = { off: towers.map(() => false), norm: 1, gray: false };
const shown = {}; // layer name -> { values, side } of the newest run
let probabilities, allOn, firstFilters, worker, picture;
let choices = 0, pictures = 0; // chosen, and read: the last one is shown
let job = 0, hasPicture = false, isBusy = false, isStale = false, occlusionJob = 0;
let squares; // { left, top, drop } of the occlusion map so far
let isOld = false; // the occlusion map on show is of the network before a switch
let open; // { layer, unit } of the dialog
const phone = matchMedia("(max-width: 30rem)");

// ---- Starting ----

function start() {
  describePage();
  makeSwitches();
  makeDrawings();
  makeLayers();
  byId("compare").hidden = !hasTowers;
  if (hasTowers) makeComparison();
  const source = new Blob([byId("worker-source").textContent], { type: "text/javascript" });
  worker = new Worker(URL.createObjectURL(source));
  worker.onmessage = ({ data }) => messages[data.type](data);
  worker.onerror = (event) => say(`The network cannot start: ${event.message || "this browser allows no worker"}`);
  const numbers = [...document.querySelectorAll(".numbers")];
  worker.postMessage({ type: "load", about, parts: numbers.map((element) => element.textContent) });
  numbers.forEach((element) => element.remove()); // tens of megabytes of text
}

const messages = {
  ready({ filters }) {
    firstFilters = filters;
    drawFirstFilters();
    if (!hasPicture) showCanvas(drawings[0].draw());
    document.documentElement.dataset.ready = "";
  },
  picture({ number, pixels }) {
    if (number !== pictures) return; // another was chosen meanwhile
    picture = pixels;
    drawPicture();
  },
  layer({ layer, values, side }) {
    shown[layer] = { values, side };
    drawLayer(layers[layer]);
  },
  answers(message) {
    if (!probabilities) say("");
    ({ probabilities, allOn } = message);
    showAnswers();
    isBusy = false;
    markOld(answerLists, isStale);
    showTime(isStale ? "Computing…" : `Computed in ${(message.milliseconds / 1000).toFixed(2)}\u00a0s.`);
    document.documentElement.dataset.done = message.job;
    if (open) fillDialog();
    if (isStale) run();
  },
  allOn(message) {
    if (message.job !== job) return;
    ({ allOn } = message);
    showAnswers();
  },
  compared(message) {
    if (message.job !== job) return;
    if (hasTowers) showCompared(message.compared);
    markOld(["towers"], false);
    byId("occlude").disabled = false; // before, it would stop the comparison
    if (isOld) startOcclusion();
    document.documentElement.dataset.compared = job;
  },
  occluded: showOcclusion,
  filter: showFilter,
  failed({ message }) {
    isBusy = false;
    markOld([...answerLists, "towers"], false);
    byId("time").textContent = "";
    say(`Something went wrong: ${message}`);
  },
};

function say(text) {
  byId("status").textContent = text;
  byId("status").hidden = !text;
}

/** An element with attributes, text and children. */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

/** With spaces that do not break, like all numbers with a unit on this page. */
function percent(share) {
  if (share < 0.0005) return "<\u00a00.1\u00a0%";
  return `${share > 0.0995 ? Math.round(share * 100) : (share * 100).toFixed(1)}\u00a0%`;
}

function square(side) {
  return `${side}\u00a0×\u00a0${side}`;
}

/** A class name for a sentence: isolated, so that a name written from right to left does not turn the rest around. */
function className(index) {
  return `\u2068${about.classes[index]}\u2069`;
}

function describePage() {
  const count = about.layers.reduce((sum, layer) => sum + layer.weight.rows * (layer.weight.columns + 1), 0);
  const size = count >= 1e6 ? `${(count / 1e6).toFixed(1)}\u00a0million` : count.toLocaleString("en");
  const split = hasTowers
    ? "AlexNet (2012) was too large for one graphics card. So it was split into two towers, one on each card, which meet in a few layers only. Switch a tower off to see what it does."
    : "This one has a single tower, as the paper's network for one graphics card.";
  byId("lead").textContent = `Show this network a photo: on your computer, layer by layer, it computes which of its ${about.classes.length.toLocaleString("en")} classes it sees. ${split}`;
  document.title = `${about.title} · AlexNet at work`;
  const patches = about.patches ? ` The patches come from ${about.patches.images.toLocaleString("en")} validation images of ${about.patches.data}.` : "";
  byId("origin").textContent = `${about.title} · recipe ${about.recipe} · written by alexnet ${about.version}, alexnet export --format html. It has ${size} learned numbers (weights)${count < 5e7 ? "; the AlexNet of 2012 had 61\u00a0million" : ""}. They are rounded to 8\u00a0bits.${patches}`;
  byId("target").append(...about.classes.map((name, index) => make("option", { value: index }, name)));
}

// ---- Pictures ----

async function showFile(file) {
  const choice = ++choices;
  try {
    const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
    if (choice !== choices) return; // another picture was chosen while this one was read
    const scale = Math.min(1, Math.sqrt(largestCanvas / (bitmap.width * bitmap.height)));
    const canvas = makeCanvas(Math.ceil(bitmap.width * scale), Math.ceil(bitmap.height * scale), "#fff"); // transparent pictures lie on white
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    bitmap.close();
    showCanvas(canvas);
  } catch (error) {
    if (choice === choices) say(`${file.name || "This"} cannot be read as a picture. Try a JPEG or PNG file.`);
  }
}

function makeCanvas(width, height, color) {
  const canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (color) {
    context.fillStyle = color;
    context.fillRect(0, 0, width, height);
  }
  return canvas;
}

function showCanvas(canvas) {
  const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  hasPicture = true;
  if (probabilities) say(""); // at the start, "Unpacking" stays until there are answers
  showAtOnce(canvas);
  markOld(["towers"], true);
  whites = {};
  choices++;
  stopWebcam();
  clearOcclusion();
  worker.postMessage({ type: "picture", number: ++pictures, rgba: data, width, height }, [data.buffer]);
  byId("target").dataset.chosen = "";
  run();
}

/** The middle of the picture as the browser resizes it, until the worker has prepared it. */
function showAtOnce(canvas) {
  const { size, side } = about, edge = (Math.min(canvas.width, canvas.height) * side) / size, small = makeCanvas(side, side);
  const context = small.getContext("2d");
  context.drawImage(canvas, (canvas.width - edge) / 2, (canvas.height - edge) / 2, edge, edge, 0, 0, side, side);
  picture = context.getImageData(0, 0, side, side).data.filter((_, i) => i % 4 < 3);
  drawPicture();
}

function drawPicture() {
  const { side } = about, canvas = byId("picture");
  canvas.width = canvas.height = side;
  const image = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) {
    const [red, green, blue] = picture.subarray(i * 3, i * 3 + 3);
    const luma = Math.round(0.299 * red + 0.587 * green + 0.114 * blue);
    image.data.set(settings.gray ? [luma, luma, luma, 255] : [red, green, blue, 255], i * 4);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.setAttribute("aria-label", `The picture as the network sees it, ${side} by ${side} pixels`);
}

const drawings = [
  {
    name: "Parachute",
    draw() {
      const canvas = makeCanvas(256, 256, "#7db7e8"), context = canvas.getContext("2d");
      ["#d62828", "#f8f8f8", "#1d4ed8", "#f8f8f8", "#f2b705"].forEach((color, i) => { // panels, from the rim inwards
        context.fillStyle = color;
        context.beginPath();
        context.ellipse(128, 112, 94 - i * 19, 82, 0, Math.PI, 2 * Math.PI);
        context.fill();
      });
      context.strokeStyle = "#333";
      context.lineWidth = 1.5;
      for (let x = 34; x <= 222; x += 18.8) {
        context.beginPath();
        context.moveTo(x, 112);
        context.lineTo(128, 205);
        context.stroke();
      }
      context.fillStyle = "#222";
      context.beginPath();
      context.arc(128, 200, 7, 0, 7);
      context.fill();
      context.fillRect(121, 206, 14, 24);
      return canvas;
    },
  },
  {
    name: "Golf ball",
    draw() {
      const canvas = makeCanvas(256, 256), context = canvas.getContext("2d");
      const grass = context.createLinearGradient(0, 0, 0, 256);
      grass.addColorStop(0, "#2f6b2a");
      grass.addColorStop(1, "#5fa83c");
      context.fillStyle = grass;
      context.fillRect(0, 0, 256, 256);
      for (let i = 0; i < 900; i++) { // blades, the same every time
        const x = (i * 97) % 256, y = (i * 53 + (i >> 3)) % 256;
        context.strokeStyle = i % 2 ? "#3f8a32" : "#79bf4d";
        context.beginPath();
        context.moveTo(x, y);
        context.lineTo(x + ((i * 7) % 5) - 2, y - 9);
        context.stroke();
      }
      const ball = context.createRadialGradient(105, 95, 10, 128, 125, 85);
      ball.addColorStop(0, "#fff");
      ball.addColorStop(1, "#b9bcc2");
      context.fillStyle = ball;
      context.beginPath();
      context.arc(128, 128, 80, 0, 7);
      context.fill();
      context.fillStyle = "rgb(110 115 125 / .38)";
      for (let row = -6; row <= 6; row++) {
        for (let column = -6; column <= 6; column++) {
          const x = column * 13 + (row % 2 ? 6 : 0), y = row * 12, distance = Math.hypot(x, y);
          if (distance > 72) continue;
          context.beginPath();
          context.ellipse(128 + x, 128 + y, 4.5, 4.5 * Math.sqrt(1 - (distance / 82) ** 2), Math.atan2(y, x) + 1.57, 0, 7);
          context.fill();
        }
      }
      return canvas;
    },
  },
  {
    name: "Stripes and colors",
    draw() {
      const canvas = makeCanvas(256, 256, "#808080"), context = canvas.getContext("2d");
      [0, 45, 90, 135].forEach((degrees, i) => { // gray stripes on the left
        context.save();
        context.beginPath();
        context.rect(20 + (i % 2) * 54, 20 + (i >> 1) * 110, 50, 106);
        context.clip();
        context.translate(45 + (i % 2) * 54, 73 + (i >> 1) * 110);
        context.rotate((degrees * Math.PI) / 180);
        for (let x = -90; x < 90; x += 10) {
          context.fillStyle = "#fff";
          context.fillRect(x, -90, 5, 180);
          context.fillStyle = "#000";
          context.fillRect(x + 5, -90, 5, 180);
        }
        context.restore();
      });
      ["#e02020", "#18a030", "#2050e0", "#e8d010", "#d020c0", "#10b8c8"].forEach((color, i) => { // colors on the right
        context.fillStyle = color;
        context.beginPath();
        context.arc(158 + (i % 2) * 52, 52 + (i >> 1) * 75, 24, 0, 7);
        context.fill();
      });
      return canvas;
    },
  },
];

function makeDrawings() {
  byId("drawings").append(...drawings.map(({ name, draw }) => make("button", { onclick: () => showCanvas(draw()) }, name)));
}

byId("file").onchange = ({ target }) => {
  if (target.files[0]) showFile(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
};
document.addEventListener("paste", ({ clipboardData }) => clipboardData.files[0] && showFile(clipboardData.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files[0]) showFile(event.dataTransfer.files[0]);
  else say("This is not a file. Save the picture on this computer, then open it.");
});

byId("webcam").onclick = async () => {
  const video = byId("video"), button = byId("webcam");
  if (!video.hidden) {
    const canvas = makeCanvas(video.videoWidth, video.videoHeight);
    canvas.getContext("2d").drawImage(video, 0, 0);
    showCanvas(canvas);
    return;
  }
  button.disabled = true; // until it is known whether there is a webcam
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
    await video.play();
    video.hidden = false;
    button.textContent = "Take the picture";
    say("");
  } catch (error) {
    stopWebcam();
    say("The webcam cannot be used: there is none, or the browser does not allow it for this page.");
  }
  button.disabled = false;
};

function stopWebcam() {
  const video = byId("video");
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  video.hidden = true;
  byId("webcam").textContent = "Use the webcam";
}

// ---- Running, switches, answers ----

function run() {
  if (!hasPicture) return;
  isStale = isBusy;
  markOld(answerLists, true);
  showTime("Computing…");
  if (isBusy) return;
  isBusy = true;
  occlusionJob = 0;
  byId("cancel").hidden = byId("progress").hidden = byId("occlude").disabled = true;
  worker.postMessage({ type: "run", job: ++job, ...settings });
}

const answerLists = ["answers", "first-answer"];

/** Pale: of the picture or the switches before, until the new answers come. */
function markOld(ids, value) {
  for (const id of ids) byId(id).setAttribute("aria-busy", value);
}

function makeSwitches() {
  if (hasTowers) {
    byId("tower-switches").hidden = false;
    byId("tower-switches").append(...towers.map((tower) => {
      const box = make("input", { type: "checkbox", id: `tower-${tower + 1}`, onchange: () => setTower(tower, !box.checked) });
      box.checked = true;
      return make("label", { class: "check" }, box, make("strong", { class: `tower-${tower + 1}` }, `Tower ${tower + 1}`));
    }));
  }
  byId("color").onchange = ({ target }) => {
    settings.gray = !target.checked;
    if (picture) drawPicture();
    changed();
  };
}

function setTower(tower, isOff) {
  settings.off[tower] = isOff;
  document.querySelectorAll(`.tower[data-tower="${tower}"], .from-${tower + 1}`).forEach((element) => element.classList.toggle("is-off", isOff));
  about.layers.forEach((layer) => (byId(`meeting-${layer.name}`).textContent = describeMeeting(layer)));
  changed();
}

const nothingSeen = "Nothing of the picture reaches layer 8, so the answer is the same for every picture.";

function changed() {
  const { off, norm } = settings, text = [];
  const names = towers.filter((tower) => off[tower]).map((tower) => tower + 1);
  if (names.length === 1) text.push(`Tower ${names[0]} is off: all it says in layers 1 to 7 counts as zero. The network did not learn to do without it.`);
  if (names.length > 1) text.push(`Towers ${names.join(" and ")} are off: all they say in layers 1 to 7 counts as zero. ${nothingSeen}`);
  byId("norm-value").textContent = `Normalization ${norm ? `at ${percent(norm)}` : "off"}`;
  byId("norm-value").hidden = norm === 1; // else it stays so with the next picture
  if (norm < 1) text.push(`Response normalization ${norm ? `at ${percent(norm)}` : "off"}: strong maps dampen their neighbors ${norm ? "less" : "no longer"}. Its constant factor stays, since the next layers learned with values of that size. This is not a network that was trained without it.`);
  byId("switch-text").textContent = text.join(" ");
  keepOcclusion();
  run();
}

function best(values) {
  return values.reduce((top, value, index) => (value > values[top] ? index : top), 0);
}

/** The five best answers. While something is off, also what the network said with everything on, whose best answer stays in the list. */
function showAnswers() {
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, 5);
  for (const [index, value] of order.entries()) byId(`class-${index}`).textContent = `${className(value)}: ${percent(probabilities[value])}`;
  if (!byId("target").dataset.chosen && !isStale) { // stale: of the picture before
    byId("target").value = order[0];
    byId("target").dataset.chosen = "yes";
  }
  const isChanged = Boolean(allOn) && (settings.gray || settings.norm < 1 || settings.off.includes(true));
  const [first] = order, expected = isChanged ? best(allOn) : first;
  if (!order.includes(expected)) order[order.length - 1] = expected;
  byId("was").hidden = !isChanged;
  byId("answers").replaceChildren(...order.map((index) => makeAnswer(index, isChanged)));
  const was = isChanged ? ` (was ${expected === first ? "" : `${className(expected)} `}${percent(allOn[expected])})` : "";
  byId("first-answer").textContent = `Now: ${className(first)} ${percent(probabilities[first])}${was}`; // where the list is out of sight
}

function makeAnswer(index, isChanged) {
  const shares = [probabilities, ...(isChanged ? [allOn] : [])].map((values) => values[index]);
  const bars = shares.map((share) => {
    const bar = make("span");
    bar.style.width = `${share * 100}%`;
    return bar;
  });
  const numbers = make("span", { class: "number" }, percent(shares[0]));
  if (isChanged) numbers.append(" ", make("span", { class: "hint was" }, `was ${percent(shares[1])}`));
  return make("li", {}, make("span", {}, about.classes[index]), numbers, make("span", { class: "bar", "aria-hidden": "true" }, ...bars));
}

function showTime(text) {
  const known = about.classes.length > 12 ? `It knows only its ${about.classes.length.toLocaleString("en")} classes.` : `It knows only: ${about.classes.map((_, index) => className(index)).join(", ")}.`;
  byId("time").textContent = `${text} ${hasTowers && settings.off.every(Boolean) ? nothingSeen : known}`;
}

const networks = ["Both towers", "Tower 1 alone", "Tower 2 alone"];

function nameNetwork(index) {
  return make("th", { scope: "row", class: index ? `tower-${index}` : "" }, networks[index]);
}

/** What each network says about the picture, and how often it was right when the page was written. */
function makeComparison() {
  const { measured } = about;
  byId("towers").append(...networks.map((_, index) => make("tr", {}, nameNetwork(index), make("td"), make("td"))));
  byId("division").textContent = `Neither tower learned to answer alone, with the other switched off.${measured ? describeDivision() : ""}`;
  if (about.patches?.sheets.conv5) byId("division").append(" To see which pictures excite a tower, click its strongest units in ", make("a", { href: "#title-conv5" }, "layer\u00a05"), ".");
  if (!measured) return;
  const { images, data, constant } = measured;
  const highest = Math.max(constant, ...measured.networks.flat().map(({ right }) => right));
  byId("shares").style.setProperty("--guessing", constant / highest);
  byId("shares").append(...measured.networks.map((shares, index) => make("tr", {}, nameNetwork(index), make("td", { class: index ? `tower-${index}` : "" }, ...shares.map((share, isGray) => makeShare(share, isGray, highest))))));
  byId("measured-text").textContent = `${images.toLocaleString("en")} validation images of ${data}, from which the network did not learn. Dashed line: guessing (always the most frequent class), ${percent(constant)}.${describeOneSided()}`;
  byId("measured").hidden = false;
}

/** A bar of right answers, and its number. */
function makeShare({ right, remark }, isGray, highest) {
  const bar = make("span", { class: "length", "aria-hidden": "true" });
  bar.style.setProperty("--share", right / highest);
  const text = make("span", { class: "text" }, percent(right), " ", make("span", { class: "color" }, isGray ? "without color" : "in color"));
  if (remark) text.append(make("span", { class: "hint" }, ` ${remark} than guessing`));
  return make("div", { class: isGray ? "share gray" : "share" }, bar, text);
}

/** What each tower is for, where the test pictures leave no doubt. */
function describeDivision() {
  const { colorful, needs } = about.measured;
  return needs.map((classes, tower) => {
    const roles = [];
    if (colorful === tower + 1) roles.push("carries more of the color");
    if (classes.length) roles.push(`matters most for ${classes.map(className).join(" and ")}`);
    return roles.length ? ` Tower\u00a0${tower + 1} ${roles.join(" and ")}.` : "";
  }).join("");
}

/** Towers that name one class for most pictures. */
function describeOneSided() {
  const calls = about.measured.networks.slice(1).flatMap(([{ answer, share }], tower) => (share > 0.5 ? `tower\u00a0${tower + 1} calls ${percent(share)} of them ${className(answer)}` : []));
  return calls.length ? ` Alone, ${calls.join(", ")}: a tower that names one class for most pictures says little.` : "";
}

/** What the networks say about the picture. compared[network][0 in color, 1 without] are probabilities. */
function showCompared(compared) {
  compared.forEach((answers, network) => answers.forEach((values, gray) => {
    const top = best(values);
    byId("towers").rows[network].cells[gray + 1].replaceChildren(`${className(top)} `, make("span", { class: "number" }, percent(values[top])));
  }));
}

// ---- Where it looks ----

byId("target").onchange = ({ target }) => {
  target.dataset.chosen = "yes";
  clearOcclusion();
};
byId("occlude").onclick = () => {
  clearOcclusion();
  startOcclusion();
};
byId("finer").onclick = () => slide([finestGrid]);

function startOcclusion() {
  squares = [];
  slide(grids);
}

function slide(grids) {
  occlusionJob = ++job;
  byId("progress").value = 0;
  byId("progress").hidden = byId("cancel").hidden = false;
  byId("finer").hidden = true;
  worker.postMessage({ type: "occlude", job, ...settings, target: Number(byId("target").value), grids, squares });
}

byId("cancel").onclick = () => {
  stopOcclusion();
  byId("found").textContent = isOld && !byId("heat").hidden ? "Stopped. The map is of the network before the switch." : "Stopped. The picture shows the places done so far.";
  byId("occlude").focus(); // the button that had it is gone
};
byId("clear").onclick = () => {
  clearOcclusion();
  byId("occlude").focus();
};

function stopOcclusion() {
  if (occlusionJob) worker.postMessage({ type: "stop", job: ++job });
  occlusionJob = 0;
  byId("cancel").hidden = byId("progress").hidden = true;
}

/** After a switch, the map stays, pale, until the new one covers the picture. */
function keepOcclusion() {
  if (byId("heat").hidden && !occlusionJob) return;
  stopOcclusion();
  setOld(true);
  byId("finer").hidden = true;
}

function setOld(value) {
  isOld = value;
  byId("heat").classList.toggle("is-old", isOld);
  byId("found").textContent = isOld && !byId("heat").hidden ? "Pale: the map before the switch. The new one is being computed." : "";
}

function clearOcclusion() {
  stopOcclusion();
  setOld(false);
  byId("heat").hidden = byId("scale").hidden = true;
  byId("clear").hidden = byId("finer").hidden = true;
}

/** The occlusion map so far. Each pixel gets the mean drop of all squares that covered it: red where the class lost, blue where it gained. */
function showOcclusion({ job: number, done, squares: known, edge, target, whole }) {
  if (number !== occlusionJob) return;
  squares = known;
  byId("progress").value = done;
  if (isOld && !byId("heat").hidden && squares.length < grids[0] ** 2) return;
  if (isOld) setOld(false);
  const { side } = about, sums = new Float32Array(side * side), counts = new Uint16Array(side * side);
  for (const { left, top, drop } of squares) {
    for (let y = top; y < top + edge; y++) {
      for (let at = y * side + left, end = at + edge; at < end; at++) {
        sums[at] += drop;
        counts[at]++;
      }
    }
  }
  let highest = leastRange;
  for (let i = 0; i < sums.length; i++) {
    if (counts[i]) sums[i] /= counts[i];
    highest = Math.max(highest, Math.abs(sums[i]));
  }
  const canvas = byId("heat"), image = new ImageData(side, side);
  for (let i = 0; i < sums.length; i++) { // a gray picture under the color
    const share = sums[i] / highest, color = share > 0 ? [230, 20, 20] : [30, 90, 255], much = Math.abs(share) ** 0.8 * 0.8;
    const gray = 0.299 * picture[i * 3] + 0.587 * picture[i * 3 + 1] + 0.114 * picture[i * 3 + 2];
    for (let c = 0; c < 3; c++) image.data[i * 4 + c] = color[c] * much + gray * (1 - much);
    image.data[i * 4 + 3] = 255;
  }
  canvas.width = canvas.height = side;
  canvas.getContext("2d").putImageData(image, 0, 0);
  if (canvas.hidden) {
    canvas.hidden = byId("scale").hidden = false;
    canvas.scrollIntoView({ block: "nearest" });
  }
  byId("scale").textContent = `Red: the network is less sure when this is hidden. Blue: it is surer. Full color: by ${Math.round(highest * 100)}\u00a0percentage points.`;
  byId("clear").hidden = false;
  if (done < 1) return;
  stopOcclusion();
  byId("finer").hidden = squares.length === finestGrid ** 2;
  byId("found").textContent = describeOcclusion(side - edge, target, whole);
  document.documentElement.dataset.occluded = JSON.stringify(squares);
}

/** Where the square mattered most; its corner lies between 0 and `last`. */
function describeOcclusion(last, target, whole) {
  const most = squares.reduce((a, b) => (b.drop > a.drop ? b : a));
  const third = (corner) => Math.min(2, Math.floor((corner / last) * 3));
  const where = ["at the top", "in the middle", "at the bottom"][third(most.top)] + [" left", "", " right"][third(most.left)];
  const fall = `falls from ${percent(whole)} to ${percent(whole - most.drop)}`;
  if (most.drop < 0.005) return "No square alone makes the network less sure of this class.";
  if (most.drop < weakDrop) return `No square matters much: even ${where}, ${className(target)} only ${fall}.`;
  return `The square matters most ${where}: there, ${className(target)} ${fall}.`;
}

// ---- Layers ----

const sentences = {
  conv1: "Filters of 11\u00a0×\u00a011 pixels slide over the picture. A map is bright where the picture looks like its filter. Large networks learn edges, stripes and spots of color; in small ones, many filters stay blurs.",
  conv2: "Each filter combines maps of layer 1 into corners, curves and textures.",
  conv3: "Each filter combines maps of layer 2 into larger patterns.",
  conv4: "Each filter combines maps of the layer before. The patterns become parts of things.",
  conv5: "Maps of parts of things: bright where the part is, dark elsewhere.",
  fc6: "No maps anymore: each unit looks at all maps at once and says a single number. A dot is a unit.",
  fc7: "Each unit looks at all units of layer 6.",
  fc8: "One number for each class, from all units of layer 7. Together they become 100 %.",
};

function makeLayers() {
  about.layers.forEach((layer, index) => {
    const number = layer.name.slice(-1), isLast = layer.name === "fc8";
    byId("layers").append(makeJoin(index === 0 || layer.seesBoth, index === 0, isLast));
    const size = layer.side > 1 ? ` of ${square(layer.side)}` : "";
    const parts = layer.kernel ? "maps" : "units";
    const title = isLast ? `Layer ${number}: the answers` : `Layer ${number}: ${layer.maps} ${parts}${size}${hasTowers ? " in each tower" : ""}`;
    const meeting = make("span", { class: layer.seesBoth ? "meets" : "", id: `meeting-${layer.name}` }, describeMeeting(layer));
    const about_ = make("p", { class: "hint" }, meeting, sentences[layer.name], describeSteps(layer));
    const section = make("section", { class: "layer", "aria-labelledby": `title-${layer.name}` }, make("h3", { id: `title-${layer.name}` }, title), about_);
    if (index === 0) section.append(makeNorm(), make("p", { class: "hint" }, describeColor()));
    if (isLast) section.append(make("ol", {}, ...Array.from({ length: Math.min(5, about.classes.length) }, (_, i) => make("li", { id: `class-${i}` }))));
    else section.append(make("div", { class: hasTowers ? "columns two" : "columns" }, ...towers.map((tower) => makeTower(layer, tower))));
    byId("layers").append(section);
  });
}

/** Where the towers meet, and what arrives there if one is off. */
function describeMeeting(layer) {
  if (!hasTowers || layer.name === "conv1") return "";
  if (!layer.seesBoth) return "Each tower sees only itself. ";
  const [off, ...others] = towers.filter((tower) => settings.off[tower]);
  if (others.length) return "The towers would meet here, but both are off: only zeros arrive. ";
  if (off !== undefined) return `The towers would meet here, but tower ${off + 1} is off: only tower ${2 - off} is heard. `;
  return "The towers meet: each sees both. ";
}

function describeColor() {
  const { differ, pValue } = about.colors;
  if (!hasTowers || pValue === null) return "";
  const found = differ ? "Here the towers differ in color, too" : "Here the difference in color may be chance";
  return `The paper found that in every training one tower learns filters without color and the other colorful ones. ${found}: divided at random into two halves, the same filters differ as much in ${pValue < 0.005 ? "fewer than 1" : `about ${Math.round(100 * pValue)}`} of 100 tries.`;
}

/** The slider of response normalization, if the network has any. */
function makeNorm() {
  if (!about.layers.some((layer) => layer.then.some((step) => step.kind === "across-maps" || step.kind === "within-map"))) return "";
  const slider = make("input", { type: "range", id: "norm", min: 0, max: 100, step: 10, oninput: () => {
    settings.norm = slider.value / 100;
    changed();
  } });
  slider.value = 100;
  return make("label", { class: "norm" }, "Response normalization, after these maps (see layer 2): ", make("span", {}, "off ", slider, " on"));
}

function describeSteps(layer) {
  const explain = (words, meaning) => (layer.name === "conv1" ? `${words} (${meaning})` : words);
  const words = {
    pool: (step) => explain(`pooling to ${square(step.side)}`, `of each ${square(step.size)} values, the largest stays`),
    "across-maps": () => explain("response normalization", "strong maps dampen their neighbors"),
    "within-map": () => explain("normalization within the map", "strong places dampen those around them"),
    dropout: () => "",
    activation: (step) => (step.function === "relu" ? explain("ReLU", "what is negative becomes zero") : step.function),
  };
  const steps = layer.then.map((step) => words[step.kind](step)).filter(Boolean);
  return steps.length ? ` Then: ${steps.join(", ")}.` : "";
}

/** Lines between two layers: straight in each tower, or crossing where the towers meet. */
function makeJoin(meets, isFirst, isLast) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "join");
  svg.setAttribute("viewBox", "0 0 100 40");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const places = hasTowers ? [25, 75] : [50];
  places.forEach((from, i) => places.forEach((to, j) => {
    if (!meets && i !== j) return;
    const [top, bottom] = [isFirst ? 50 : from, isLast ? 50 : to];
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M ${top} 0 C ${top} 20 ${bottom} 20 ${bottom} 40`);
    path.setAttribute("class", `from-${(isFirst ? j : i) + 1}`);
    svg.append(path);
  }));
  return svg;
}

function makeTower(layer, tower) {
  const box = make("div", { class: `tower tower-${tower + 1}`, "data-tower": tower });
  if (hasTowers) box.append(make("h4", {}, `Tower\u00a0${tower + 1}, units\u00a0${tower * layer.maps}\u00a0to\u00a0${(tower + 1) * layer.maps - 1}`));
  if (layer.name === "conv1") {
    box.append(make("p", {}, `Filters, ${percent(about.colors.shares[tower])} color (faint ones count less), each on its own scale:`), make("canvas", { class: "filters", id: `filters-${tower}`, role: "img", "aria-label": `The ${layer.maps} filters of tower ${tower + 1}` }), make("p", {}, "Their maps, in the same places:"));
  }
  const canvas = make("canvas", { class: "maps", id: `maps-${layer.name}-${tower}`, role: "img" });
  canvas.onclick = (event) => {
    const columns = gridColumns(layer), rows = Math.ceil(layer.maps / columns);
    const unit = Math.floor((event.offsetY / canvas.clientHeight) * rows) * columns + Math.floor((event.offsetX / canvas.clientWidth) * columns);
    if (unit < layer.maps) openUnit(layer, tower * layer.maps + unit);
  };
  box.append(canvas, make("div", { class: "listing" }, make("p", {}, "Strongest (click one):"), make("div", { class: "strongest", id: `strongest-${layer.name}-${tower}` })));
  return box;
}

/** Columns of a grid, without gaps if possible: wide on a screen; on a phone few, so that maps stay large. */
function gridColumns({ maps: count, kernel }) {
  const ideal = phone.matches ? Math.max(3, Math.sqrt(kernel ? count / 3 : 2 * count)) : Math.sqrt((kernel ? 2.5 : 6) * count);
  const fitting = Array.from({ length: count }, (_, i) => i + 1).filter((columns) => count % columns === 0);
  const nearest = fitting.reduce((a, b) => (Math.abs(b - ideal) < Math.abs(a - ideal) ? b : a));
  return Math.abs(nearest - ideal) < ideal / 2 ? nearest : Math.ceil(ideal);
}

phone.onchange = () => {
  if (firstFilters) drawFirstFilters();
  Object.keys(shown).forEach((name) => drawLayer(layers[name]));
};

/** From dark over the tower's color to white. The power lets weak values be seen. */
function paint(data, at, share, [red, green, blue]) {
  const s = Math.min(1, Math.max(0, share)) ** 0.7;
  const mix = s < 0.6 ? (c) => (c * s) / 0.6 : (c) => c + ((255 - c) * (s - 0.6)) / 0.4;
  data[at] = mix(red);
  data[at + 1] = mix(green);
  data[at + 2] = mix(blue);
  data[at + 3] = 255;
}

let whites = {}; // of each layer, for this picture

/** What is black and what is white in a layer: zero, and the value that one in 500 exceeds, of both towers while both are on. */
function brightness(layer) {
  const { values } = shown[layer.name], low = about.signed ? -1 : 0;
  if (!(layer.name in whites) || !towers.some((tower) => settings.off[tower])) {
    const sample = values.filter((_, i) => i % Math.ceil(values.length / 20000) === 0).sort();
    whites[layer.name] = sample[Math.floor(sample.length * 0.998)];
  }
  return [low, whites[layer.name] > low ? whites[layer.name] - low : 1];
}

function drawLayer(layer) {
  const { values, side } = shown[layer.name], all = layer.maps * layer.towers;
  const [low, range] = brightness(layer), gap = side > 1 ? 1 : 0, cell = side + gap;
  const peaks = new Float32Array(all).fill(-Infinity);
  for (let i = 0; i < values.length; i++) if (values[i] > peaks[i % all]) peaks[i % all] = values[i];
  for (const tower of towers) {
    const columns = gridColumns(layer), rows = Math.ceil(layer.maps / columns);
    const canvas = byId(`maps-${layer.name}-${tower}`);
    canvas.width = columns * cell - gap;
    canvas.height = rows * cell - gap;
    canvas.style.imageRendering = side > 20 ? "auto" : "pixelated";
    const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
    for (let unit = 0; unit < layer.maps; unit++) {
      const left = (unit % columns) * cell, top = Math.floor(unit / columns) * cell;
      for (let y = 0; y < side; y++) {
        for (let x = 0; x < side; x++) {
          const value = values[(y * side + x) * all + tower * layer.maps + unit];
          paint(image.data, ((top + y) * canvas.width + left + x) * 4, (value - low) / range, colors[tower]);
        }
      }
    }
    context.putImageData(image, 0, 0);
    const first = tower * layer.maps;
    const strongest = Array.from({ length: layer.maps }, (_, i) => first + i).sort((a, b) => peaks[b] - peaks[a]).slice(0, strongestShown);
    const name = hasTowers ? `tower ${tower + 1}, ` : "";
    canvas.setAttribute("aria-label", `Layer ${layer.name.slice(-1)}, ${name}${layer.maps} ${layer.kernel ? "maps" : "units"}${settings.off[tower] ? ", off" : "; the strongest are listed below"}`);
    byId(`strongest-${layer.name}-${tower}`).replaceChildren(...strongest.map((unit) => {
      const button = make("button", { onclick: () => openUnit(layer, unit), "aria-label": `${nameUnit(layer, unit)} of layer ${layer.name.slice(-1)}` });
      if (layer.kernel) {
        const small = make("canvas", { "aria-hidden": "true" });
        drawMap(small, layer, unit);
        button.append(small);
      }
      button.append(String(unit));
      return button;
    }));
  }
}

/** One map, as bright as in the grid. */
function drawMap(canvas, layer, unit) {
  const { values, side } = shown[layer.name], all = layer.maps * layer.towers, [low, range] = brightness(layer);
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d"), image = context.createImageData(side, side);
  for (let i = 0; i < side * side; i++) paint(image.data, i * 4, (values[i * all + unit] - low) / range, colors[Math.floor(unit / layer.maps)]);
  context.putImageData(image, 0, 0);
}

/** The weights of a filter of layer 1 as colors: zero is middle gray, `highest` is as far as it goes. */
function drawWeights(image, left, top, weights, kernel, highest) {
  for (let i = 0; i < kernel * kernel; i++) {
    const at = ((top + Math.floor(i / kernel)) * image.width + left + (i % kernel)) * 4;
    for (let c = 0; c < 3; c++) image.data[at + c] = 127.5 + (127.5 * weights[i * 3 + c]) / highest;
    image.data[at + 3] = 255;
  }
}

function highestOf(weights) {
  return weights.reduce((a, b) => Math.max(a, Math.abs(b)), 1e-30);
}

function drawFirstFilters() {
  const layer = layers.conv1, { kernel, maps } = layer, length = kernel * kernel * 3;
  const columns = gridColumns(layer), rows = Math.ceil(maps / columns), cell = kernel + 1;
  for (const tower of towers) {
    const canvas = byId(`filters-${tower}`);
    canvas.width = columns * cell - 1;
    canvas.height = rows * cell - 1;
    const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
    for (let unit = 0; unit < maps; unit++) {
      const from = (tower * maps + unit) * length;
      const weights = firstFilters.subarray(from, from + length);
      drawWeights(image, (unit % columns) * cell, Math.floor(unit / columns) * cell, weights, kernel, highestOf(weights));
    }
    context.putImageData(image, 0, 0);
  }
}

// ---- One unit ----

function openUnit(layer, unit) {
  open = { layer, unit };
  fillDialog();
  if (!byId("unit").open) byId("unit").showModal();
}

/** Units are numbered on from tower 1 to tower 2, so their tower is named. */
function nameUnit(layer, unit) {
  return `unit ${unit}${hasTowers ? ` (tower\u00a0${Math.floor(unit / layer.maps) + 1})` : ""}`;
}

function figure(canvas, caption) {
  return make("figure", {}, canvas, make("figcaption", {}, caption));
}

function fillDialog() {
  const { layer, unit } = open, number = layer.name.slice(-1), all = layer.maps * layer.towers;
  const { values, side } = shown[layer.name];
  let peak = -Infinity;
  for (let i = unit; i < values.length; i += all) peak = Math.max(peak, values[i]);
  byId("unit-title").textContent = `Layer ${number}, ${nameUnit(layer, unit)}`;
  byId("unit-text").textContent = layer.kernel
    ? `The highest value of its map for this picture: ${peak.toPrecision(3)}.`
    : `Its value for this picture: ${peak.toPrecision(3)}.`;
  byId("figures").replaceChildren();
  if (layer.kernel) {
    const map = make("canvas", { role: "img", "aria-label": `Map of unit ${unit}` });
    drawMap(map, layer, unit);
    byId("figures").append(figure(map, `Its map, ${square(side)}`), figure(drawLookedAt(layer, unit, peak), "The picture where the map is bright"));
  }
  if (layer.name === "conv1") {
    const { kernel } = layer, length = kernel * kernel * 3, canvas = make("canvas", { width: kernel, height: kernel, role: "img", "aria-label": `Filter of unit ${unit}` });
    const image = new ImageData(kernel, kernel), weights = firstFilters.subarray(unit * length, (unit + 1) * length);
    drawWeights(image, 0, 0, weights, kernel, highestOf(weights));
    canvas.getContext("2d").putImageData(image, 0, 0);
    byId("figures").append(figure(canvas, "Its filter: what it looks for"));
  }
  showPatches(layer, unit);
  byId("listens").replaceChildren();
  if (layer.name !== "conv1") worker.postMessage({ type: "filter", layer: layer.name, unit });
}

/** The picture, dark where the map is dark. */
function drawLookedAt(layer, unit, peak) {
  const { values, side } = shown[layer.name], all = layer.maps * layer.towers, size = about.side;
  const canvas = makeCanvas(size, size), context = canvas.getContext("2d");
  const mask = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) mask.data[i * 4 + 3] = 200 * (1 - Math.min(1, Math.max(0, values[i * all + unit] / (peak > 0 ? peak : 1))) ** 0.5);
  const small = makeCanvas(side, side);
  small.getContext("2d").putImageData(mask, 0, 0);
  context.drawImage(byId("picture"), 0, 0);
  context.drawImage(small, 0, 0, size, size);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "The picture where the map is bright");
  canvas.style.imageRendering = "auto";
  return canvas;
}

const sheets = {};

async function showPatches(layer, unit) {
  const box = byId("excites"), { patches } = about;
  box.replaceChildren();
  if (!layer.kernel) return;
  box.append(make("h3", {}, "What excites it"));
  if (!patches) {
    box.append(make("p", { class: "hint" }, "This page was written without a data set, so it has no pictures to search."));
    return;
  }
  const source = patches.sheets[layer.name];
  if (!sheets[layer.name]) {
    const image = new Image();
    image.src = source;
    sheets[layer.name] = image.decode().then(() => image);
  }
  const image = await sheets[layer.name], { side, columns, count } = patches;
  if (!open || open.layer !== layer || open.unit !== unit) return;
  const tiles = Array.from({ length: count }, (_, i) => {
    const tile = unit * count + i, canvas = make("canvas", { width: side, height: side, role: "img", "aria-label": `Patch ${i + 1}` });
    canvas.getContext("2d").drawImage(image, (tile % columns) * side, Math.floor(tile / columns) * side, side, side, 0, 0, side, side);
    canvas.style.imageRendering = "auto";
    return canvas;
  });
  box.replaceChildren(make("h3", {}, "What excites it"), make("p", { class: "hint" }, `The patches with its highest values among ${patches.images.toLocaleString("en")} validation images (gray: beyond the edge of the image):`), make("div", { class: "patches" }, ...tiles));
}

/** The units of the layer before that this one listens to most: the largest weights, whatever the picture. */
function showFilter({ layer: name, unit, inputs }) {
  if (!open || open.layer.name !== name || open.unit !== unit) return;
  const before = about.layers[about.layers.indexOf(open.layer) - 1];
  const buttons = inputs.map(({ map, balance }) => {
    const button = make("button", { onclick: () => openUnit(before, map), class: `tower-${Math.floor(map / before.maps) + 1}` });
    if (before.kernel) {
      const canvas = make("canvas", { "aria-hidden": "true" });
      drawMap(canvas, before, map);
      button.append(canvas);
    }
    button.append(make("strong", {}, Math.abs(balance) < 1 / 3 ? "±" : balance > 0 ? "+" : "−"), ` ${nameUnit(before, map)}`);
    return button;
  });
  byId("listens").replaceChildren(
    make("h3", {}, `The units of layer ${before.name.slice(-1)} it listens to most`),
    make("p", { class: "hint" }, `+ it grows when that unit is strong · − it shrinks${before.kernel ? " · ± it depends on the place" : ""}`),
    make("div", { class: "kernels" }, ...buttons),
  );
}

function step(by) {
  const count = open.layer.maps * open.layer.towers;
  openUnit(open.layer, (open.unit + by + count) % count);
}

byId("close").onclick = () => byId("unit").close();
byId("previous").onclick = () => step(-1);
byId("next").onclick = () => step(1);
byId("unit").onclose = () => (open = undefined);
byId("unit").onclick = ({ target }) => target === byId("unit") && byId("unit").close();
byId("unit").onkeydown = ({ key }) => {
  if (key === "ArrowLeft") step(-1);
  if (key === "ArrowRight") step(1);
};

start();
