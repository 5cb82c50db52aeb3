// The worker that recognises: it gets the model once, then photographs, and answers each message in turn.

import { setWasmPaths } from "@tensorflow/tfjs-backend-wasm";
import wasm from "@tensorflow/tfjs-backend-wasm/wasm-out/tfjs-backend-wasm-simd.wasm";
import { loadGraphModel } from "@tensorflow/tfjs-converter";
import * as tf from "@tensorflow/tfjs-core";
import { decode } from "./pixels.js";

const OUTPUTS = ["probabilities", "similarities", "strangeness", "embedding"];
let model, width, height;

self.onmessage = async ({ data: { id, call, ...options } }) => {
  try {
    self.postMessage({ id, result: await { start, recognise }[call](options) });
  } catch (error) {
    self.postMessage({ id, error: { name: error.name, message: error.message } });
  }
};

/** Load the model, and run it once so that the first photograph need not wait for what happens on a first run. */
async function start({ pixels, graph, weights }) {
  ({ width, height } = pixels);
  if (!WebAssembly.validate(wasm)) throw new DOMException("no WebAssembly with SIMD", "NotSupportedError");
  // The module is in this file, for a page may not fetch anything: neither from a file nor, by its policy, from a network.
  tf.env().platform.fetch = async () => new Response(wasm);
  setWasmPaths("", true);
  tf.env().set("WASM_HAS_MULTITHREAD_SUPPORT", false); // even where a server's headers would allow it: that is another module
  await tf.setBackend("wasm");
  const { modelTopology, signature, weightsManifest, format } = JSON.parse(graph);
  const text = atob(weights);
  const weightData = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) weightData[i] = text.charCodeAt(i);
  const weightSpecs = weightsManifest[0].weights;
  model = await loadGraphModel({ load: async () => ({ modelTopology, signature, format, weightSpecs, weightData: weightData.buffer }) });
  run(new Uint8Array(width * height * 3));
}

/** What the model says of a photograph; null where the file is no picture that this browser can decode. */
async function recognise({ file }) {
  let pixels;
  try {
    pixels = await decode(file, width, height);
  } catch (error) {
    if (error.name === "InvalidStateError") return null;
    throw error;
  }
  return run(pixels);
}

function run(pixels) {
  return tf.tidy(() => {
    const outputs = model.execute({ pixels: tf.tensor(Float32Array.from(pixels), [1, height, width, 3]) }, OUTPUTS);
    return Object.fromEntries(OUTPUTS.map((name, i) => [name, outputs[i].dataSync()]));
  });
}
