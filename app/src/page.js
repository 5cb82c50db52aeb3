// The page: takes a photograph, asks the worker what it is, and says so.

import { preferred, WORDS } from "./words.js";

const MOST_MEGAPIXELS = 100; // decoded, 400 MB: above, a telephone ends the page without a word
const SURE = 0.5; // below this probability, it says that it is not sure
const NEAREST = 3;
const { labels, names, calibrated, thresholds, measured, trained_on: trainedOn, pixels, backbone } = self.model;

const element = (id) => document.getElementById(id);
const state = { language: preferred(), photograph: null, outcome: null };

// What the page says

const words = () => WORDS[state.language];
const number = (value, options) => new Intl.NumberFormat(state.language, options).format(value);

function percent(value, digits = 0) {
  return number(value, { style: "percent", maximumFractionDigits: digits });
}

/** A probability in words: never "100 %" nor "0 %", for it is never that sure. */
function chance(value) {
  if (value > 0.99) return words().nearly(percent(0.99));
  return value < 0.01 ? words().hardly(percent(0.01)) : percent(value);
}

/** The name of a label as it was given, apart from the text around it whichever way it is written. */
function nameOf(label) {
  return make("bdi", { textContent: names[label]?.[state.language] ?? label });
}

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function show() {
  document.documentElement.lang = state.language;
  document.title = words().title;
  for (const each of document.querySelectorAll("[data-words]")) each.textContent = words()[each.dataset.words];
  element("language").textContent = words().other;
  element("language").lang = state.language === "en" ? "fr" : "en";
  element("advice").replaceChildren(...words().advice.map((line) => make("li", { textContent: line })));
  element("quality").textContent = quality();
  element("network").textContent = words().network({ name: backbone.name, width: pixels.width, height: pixels.height });
  showPhotograph();
  showOutcome();
  showKnown();
}

function quality() {
  if (!calibrated) return words().unmeasured;
  const { right, kept, accuracy, top_3: top3 } = measured;
  const figures = {
    images: number(measured.images),
    labels: number(measured.labels),
    named: percent(right ?? accuracy),
    also: right === undefined ? words().amongThree(percent(top3)) : words().refused(percent(1 - kept)),
  };
  const said = [words().measured(figures), words().trained({ images: number(trainedOn.images) })];
  if (measured.unknown) said.push(words().strangers({ share: percent(measured.unknown.accepted) }));
  return said.join(" ");
}

function showPhotograph() {
  const image = element("photograph");
  image.hidden = !state.photograph;
  image.alt = words().yours;
  if (!state.photograph) image.removeAttribute("src");
  else if (image.src !== state.photograph) image.src = state.photograph;
}

/** One photograph of each label: what it can know. */
function showKnown() {
  element("known").querySelector("summary").textContent = words().known({ labels: number(labels.length) });
  if (!element("known").open || !self.photographs) return;
  const first = labels.map((label) => self.photographs.find((known) => known.label === label) ?? { label });
  element("known").querySelector("ul").replaceChildren(...first.map(figure));
}

/** Say what has been found, or why not. An outcome is {kind, ...}; null before the first photograph. */
function showOutcome() {
  const { kind, best = [], near = [], ...figures } = state.outcome ?? { kind: "none" };
  const unsure = () => (best[0].probability < SURE ? words().unsure : "");
  const lines = {
    none: () => [],
    waiting: () => [figures.ready ? words().looking : words().starting],
    known: () => ["", calibrated ? unsure() : words().uncalibrated],
    unknown: () => [words().unknown, words().unknownWhy],
    strange: () => [words().strange, words().strangeWhy],
    tooLarge: () => [words().tooLarge({ megapixels: number(figures.megapixels), most: number(MOST_MEGAPIXELS) })],
    failed: () => [words().failed(figures)],
  };
  const [headline = "", detail = ""] = lines[kind]?.() ?? [words()[kind]];
  document.body.dataset.outcome = kind;
  element("headline").textContent = headline;
  element("detail").textContent = detail;
  element("bars").replaceChildren(...best.map(bar));
  element("nearest").hidden = !near.length;
  element("nearest").querySelector("ul").replaceChildren(...near.map(figure));
}

function bar({ label, probability }) {
  const filled = make("span", { className: "filled" });
  filled.style.inlineSize = `${100 * probability}%`;
  const figures = make("span", { className: "figure", textContent: calibrated ? chance(probability) : "" });
  const name = make("span", { className: "name" }, nameOf(label));
  return make("li", {}, name, " ", figures, make("span", { className: "bar" }, filled));
}

function figure({ label, picture }) {
  const image = picture ? [make("img", { src: picture, alt: "" })] : []; // its name stands below
  return make("li", {}, make("figure", {}, ...image, make("figcaption", {}, nameOf(label))));
}

// What it finds

/** Load one of the page's own scripts. A page that was opened from a disk may read a file in no other way. */
function load(source) {
  return new Promise((resolve, reject) => {
    const failed = () => reject(new Refusal("notLoaded"));
    document.head.append(make("script", { src: source, onload: resolve, onerror: failed }));
  });
}

class Refusal extends Error {
  constructor(kind, figures = {}) {
    super(kind);
    Object.assign(this, { kind, figures });
  }
}

/** Start the worker; the promise is of a function that calls it. */
async function start() {
  if (!(self.Worker && self.OffscreenCanvas && self.createImageBitmap && self.WebAssembly)) throw new Refusal("tooOld");
  await Promise.all(["recogniser.js", "weights.js", "photographs.js"].map(load));
  // From a disk, a worker's code may come from no other file: it comes from memory.
  const source = URL.createObjectURL(new Blob([self.recogniser], { type: "text/javascript" }));
  const worker = new Worker(source);
  const calls = new Map();
  worker.onmessage = ({ data: { id, result, error } }) => {
    const { resolve, reject } = calls.get(id);
    calls.delete(id);
    if (error) reject(error);
    else resolve(result);
  };
  worker.onerror = (event) => calls.forEach(({ reject }) => reject(event));
  const call = (name, options) =>
    new Promise((resolve, reject) => {
      const id = crypto.getRandomValues(new Uint32Array(1))[0];
      calls.set(id, { resolve, reject });
      worker.postMessage({ id, call: name, ...options });
    });
  await call("start", { pixels, ...self.weights });
  self.recogniser = self.weights = null; // the worker has its own
  return call;
}

/** Decide, in this order: no such photograph, an unknown fruit, or the labels by their probability. */
function decide({ probabilities, similarities, strangeness, embedding }) {
  const near = nearest(embedding);
  const { max_strangeness: maxStrangeness, min_similarity: minSimilarity } = thresholds;
  if (maxStrangeness !== null && strangeness[0] > maxStrangeness) return { kind: "strange", near };
  if (minSimilarity !== null && Math.max(...similarities) < minSimilarity) return { kind: "unknown", near };
  const ranked = labels.map((label, i) => ({ label, probability: probabilities[i] }));
  ranked.sort((one, other) => other.probability - one.probability);
  return { kind: "known", best: ranked.slice(0, 3), near };
}

function nearest(embedding) {
  const similarity = (known) => known.embedding.reduce((sum, value, i) => sum + value * embedding[i], 0);
  const ranked = self.photographs.map((known) => ({ ...known, similarity: similarity(known) }));
  return ranked.sort((one, other) => other.similarity - one.similarity).slice(0, NEAREST);
}

const started = start();
let ready = false;
started.then(
  () => {
    ready = true;
    showKnown();
  },
  (refusal) => state.photograph || tell(outcomeOf(refusal)),
);

function outcomeOf(error) {
  if (error instanceof Refusal) return { kind: error.kind, ...error.figures };
  const kind = { RangeError: "noMemory", NotSupportedError: "tooOld" }[error.name] ?? "failed";
  return { kind, message: error.message };
}

function tell(outcome) {
  state.outcome = outcome;
  showOutcome();
}

/** Put the photograph on the page, and fail where it is too large; whether it is one, the worker finds. */
async function present(file) {
  if (state.photograph) URL.revokeObjectURL(state.photograph);
  state.photograph = URL.createObjectURL(file);
  showPhotograph();
  const image = element("photograph");
  await new Promise((resolve) => (image.onload = image.onerror = resolve));
  image.style.setProperty("--proportions", image.naturalWidth / image.naturalHeight);
  const megapixels = (image.naturalWidth * image.naturalHeight) / 1e6;
  if (megapixels > MOST_MEGAPIXELS) throw new Refusal("tooLarge", { megapixels: Math.round(megapixels) });
}

let turn = 0;

async function recognise(file) {
  const mine = ++turn;
  let outcome;
  try {
    tell({ kind: "waiting", ready });
    scrollTo(0, 0); // where the answer will be
    await present(file);
    const call = await started;
    if (mine === turn) tell({ kind: "waiting", ready });
    const result = await call("recognise", { file });
    if (!result) throw new Refusal("noPicture");
    outcome = { ...decide(result), result };
  } catch (error) {
    outcome = outcomeOf(error);
  }
  if (mine !== turn) return; // another photograph has been chosen since
  if (!("result" in outcome)) {
    state.photograph = null;
    showPhotograph();
  }
  tell(outcome);
  document.dispatchEvent(new CustomEvent("recognised", { detail: outcome }));
}

// What the user does

for (const input of [element("camera"), element("file")]) {
  input.addEventListener("change", () => {
    const [file] = input.files;
    if (file) recognise(file);
    input.value = ""; // so that the same file can be chosen again
  });
}

document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file) recognise(file);
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) recognise(file);
});

element("known").addEventListener("toggle", showKnown);

element("language").addEventListener("click", () => {
  state.language = state.language === "en" ? "fr" : "en";
  show();
});

show();

if (location.protocol.startsWith("http")) {
  // Neither a manifest nor a service worker can belong to a file.
  document.head.append(make("link", { rel: "manifest", href: "manifest.webmanifest" }));
  const before = navigator.serviceWorker?.controller; // null on the first visit
  navigator.serviceWorker?.addEventListener("controllerchange", () => {
    // There is another build. An answer stays; it has all it needs, once the worker is ready.
    if (before && !(ready && state.photograph)) location.reload();
  });
  navigator.serviceWorker?.register("service-worker.js");
  navigator.serviceWorker?.ready.then(() => (element("offline").hidden = false));
}
