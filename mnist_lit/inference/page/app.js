// Draws black ink on a transparent canvas, sends it to the server and shows the prediction.

const drawing = document.getElementById("drawing");
const ink = drawing.getContext("2d");
const pen = document.getElementById("pen");
const answer = document.getElementById("answer");
const seen = document.getElementById("seen").getContext("2d");
const inside = document.getElementById("inside");
const occlusion = document.getElementById("occlusion").getContext("2d");
const maps = document.getElementById("maps");

const PEN = 22; // canvas pixels; about two of the 28 pixels that the network sees
const STEP = 10; // canvas pixels per press of an arrow key
const PAUSE = 80; // minimum milliseconds between two requests
const CLEAR_EFFECT = 0.01; // a change of the probability that is shown as such; smaller ones are paler

const rows = Array.from({ length: 10 }, () => {
  const row = document.createElement("li");
  const name = document.createElement("b");
  const bar = document.createElement("progress");
  const share = document.createElement("span");
  bar.value = 0;
  row.append(name, bar, share);
  document.getElementById("classes").append(row);
  return { row, name, bar, share };
});

function label(classes) {
  rows.forEach(({ name, bar }, index) => {
    name.textContent = classes[index];
    bar.setAttribute("aria-label", `Probability of ${classes[index]}`);
  });
}

label([..."0123456789"]);
fetch("health").then((response) => response.json()).then(({ classes }) => {
  label(classes);
  if (classes.some((name) => !/^\d/.test(name))) document.querySelector("h1").textContent = "Draw one of these";
});

// ---- drawing

let empty = true;

function stroke(from, to) {
  ink.lineWidth = PEN;
  ink.lineCap = "round";
  ink.beginPath();
  ink.moveTo(from.x, from.y);
  ink.lineTo(to.x, to.y);
  ink.stroke();
  ink.beginPath();
  ink.arc(to.x, to.y, PEN / 2, 0, 2 * Math.PI); // a line from a point to itself draws nothing
  ink.fill();
  empty = false;
  changed();
}

function clear() {
  ink.clearRect(0, 0, drawing.width, drawing.height);
  empty = true;
  lift();
  changed();
}

function lift() {
  down = false;
  pen.classList.remove("down");
}

const strokes = new Map(); // the last position of each pointer that is down

function place(event) {
  const box = drawing.getBoundingClientRect();
  const scale = drawing.width / box.width;
  return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
}

drawing.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  drawing.setPointerCapture(event.pointerId);
  pen.hidden = true;
  strokes.set(event.pointerId, place(event));
  stroke(place(event), place(event));
});
drawing.addEventListener("pointermove", (event) => {
  if (!strokes.has(event.pointerId)) return;
  const between = event.getCoalescedEvents?.() ?? [];
  for (const each of between.length ? between : [event]) {
    stroke(strokes.get(event.pointerId), place(each));
    strokes.set(event.pointerId, place(each));
  }
});
for (const end of ["pointerup", "pointercancel"]) {
  drawing.addEventListener(end, (event) => strokes.delete(event.pointerId));
}
document.getElementById("clear").addEventListener("click", clear);

// ---- drawing with the keyboard

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
let at = { x: 140, y: 60 };
let down = false;

function showPen() {
  pen.hidden = false;
  pen.style.left = `${(100 * at.x) / drawing.width}%`;
  pen.style.top = `${(100 * at.y) / drawing.height}%`;
  pen.classList.toggle("down", down);
}

drawing.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const move = MOVES[event.key];
  if (move) {
    const within = (value) => Math.min(Math.max(value, PEN / 2), drawing.width - PEN / 2);
    const to = { x: within(at.x + STEP * move[0]), y: within(at.y + STEP * move[1]) };
    if (down) stroke(at, to);
    at = to;
  } else if (event.key === " ") {
    if (!event.repeat) down = !down;
    if (down) stroke(at, at);
  } else if (event.key === "Escape") {
    clear();
  } else {
    return;
  }
  event.preventDefault();
  showPen();
});
drawing.addEventListener("focus", () => drawing.matches(":focus-visible") && showPen());
drawing.addEventListener("blur", () => {
  lift();
  pen.hidden = true;
});

// ---- predicting: one request at a time, and another if the drawing has changed meanwhile

let predicting = false;
let version = 0;

function changed() {
  version += 1;
  if (!predicting) predict();
}

async function predict() {
  predicting = true;
  for (let sent = -1; sent !== version; ) {
    sent = version;
    if (empty) {
      show(null);
      continue;
    }
    let pause = PAUSE;
    try {
      const image = await new Promise((resolve) => drawing.toBlob(resolve, "image/png"));
      const response = await fetch(`predict?pixels=true&explain=${inside.open}`, { method: "POST", body: image });
      const result = await response.json();
      if (response.ok) {
        if (!empty) show(result);
      } else if (response.status === 503) {
        answer.textContent = result.error;
        sent = -1; // busy: retry
        pause = 1000;
      } else if (!empty) {
        show(null, result.error);
      }
    } catch {
      answer.textContent = "The server is not responding";
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
  predicting = false;
}

function show(result, otherwise = "Nothing drawn yet") {
  const image = seen.createImageData(28, 28);
  rows.forEach(({ row, bar, share }, digit) => {
    const probability = result?.probabilities[digit] ?? 0;
    row.classList.toggle("best", digit === result?.digit);
    bar.value = probability;
    share.textContent = result ? percent(probability) : "";
  });
  for (let i = 0; i < 784; i += 1) {
    const grey = 255 * (result?.pixels[i] ?? 0);
    image.data.set([grey, grey, grey, 255], 4 * i);
  }
  seen.putImageData(image, 0, 0);
  showOcclusion(image, result?.explanation?.occlusion);
  maps.replaceChildren(...(result?.explanation?.feature_maps ?? []).map(featureMaps));
  answer.textContent = result ? `${result.name ? `This is: ${result.name}` : `This is ${result.digit === 8 ? "an" : "a"} ${result.digit}`} (${percent(result.probabilities[result.digit])})` : otherwise;
}

// ---- how the network arrives at its answer, which is only asked for while it is shown

inside.addEventListener("toggle", () => inside.open && changed());

function showOcclusion(image, effects = []) {
  const strongest = Math.max(CLEAR_EFFECT, ...effects.flat().map(Math.abs));
  for (let i = 0; effects.length && i < 784; i += 1) {
    const effect = effects[Math.floor(i / 56)][Math.floor((i % 28) / 2)] / strongest;
    const color = effect > 0 ? [255, 60, 60] : [70, 120, 255];
    const share = 0.8 * Math.abs(effect);
    for (let channel = 0; channel < 3; channel += 1) {
      image.data[4 * i + channel] = (1 - share) * image.data[4 * i + channel] + share * color[channel];
    }
  }
  occlusion.putImageData(image, 0, 0);
}

function featureMaps({ layer, shape: [channels, height, width], values }) {
  const bytes = Uint8Array.from(atob(values), (character) => character.charCodeAt(0));
  const columns = inside.clientWidth < 500 ? 8 : 16;
  const figure = document.createElement("figure");
  const canvas = document.createElement("canvas");
  const caption = document.createElement("figcaption");
  canvas.width = columns * (width + 1) - 1;
  canvas.height = Math.ceil(channels / columns) * (height + 1) - 1;
  const context = canvas.getContext("2d");
  for (let channel = 0; channel < channels; channel += 1) {
    const image = context.createImageData(width, height);
    for (let i = 0; i < width * height; i += 1) {
      const grey = bytes[channel * width * height + i];
      image.data.set([grey, grey, grey, 255], 4 * i);
    }
    context.putImageData(image, (channel % columns) * (width + 1), Math.floor(channel / columns) * (height + 1));
  }
  caption.textContent = `${layer}: its ${channels} feature maps, ${height}×${width} pixels each, brighter where the activation is stronger`;
  figure.append(canvas, caption);
  return figure;
}

function percent(probability) {
  return `${(100 * probability).toFixed(1)} %`;
}

show(null);
