// The model in this browser as the page uses it, in place of serving/page/client.js, which asks a server.

import { Failure, load } from "./gpt2onnx.js";

export { Failure };

const about = document.getElementById("model");
const progress = document.createElement("progress");
progress.ariaLabel = "Loading the model";
const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
const loading = load(undefined, { onProgress: show });
removeWhatOnlyServersDo();

/** The model, once it is loaded. */
export async function servedModel() {
  try {
    const { id, dtype, context_length, device, threads } = await loading;
    const place = device === "wasm" ? `WebAssembly, ${threads} thread${threads === 1 ? "" : "s"}` : "WebGPU";
    return { id, dtype, context_length, device: place };
  } catch (error) {
    about.textContent = error.message;
    throw error;
  } finally {
    progress.remove();
  }
}

/** The chunks of a streamed completion. Aborted, it ends with a failure. */
export async function* complete({ model: _, max_tokens: max_new_tokens, ...request }, key, signal) {
  const model = await loading;
  for await (const { choice, usage } of model.complete({ max_new_tokens, ...request })) {
    if (signal.aborted) throw new Failure("Stopped.");
    yield { choices: choice ? [choice] : [], usage };
  }
}

/** How many tokens a text has. */
export async function countTokens(_, text) {
  return (await loading).countTokens(text);
}

function show({ loaded, total }) {
  about.textContent = `Loading the model: ${megabytes(loaded)} of ${megabytes(total)} MB`;
  if (!progress.parentElement) about.after(progress);
  progress.max = total;
  progress.value = loaded;
}

function removeWhatOnlyServersDo() {
  for (const place of [document, document.getElementById("side").content]) {
    for (const element of place.querySelectorAll("[data-server]")) element.remove();
  }
}
