// A model in the browser: its folder in, texts out. The work is done in worker.js.

/** What went wrong, as a sentence. */
export class Failure extends Error {}

/** Loads the model in a folder that `gpt2onnx web` wrote; by default the folder of this file. */
export async function load(url = new URL("./", import.meta.url), { onProgress, device = "auto", threads } = {}) {
  const folder = new URL(`${new URL(url, document.baseURI).href.replace(/\/?$/, "/")}`);
  await keepOffline(folder);
  const calls = new Calls(new Worker(new URL("worker.js", folder), { type: "module" }), onProgress);
  try {
    for await (const { model } of calls.run({ load: { device, threads } })) if (model) return new Model(calls, model);
  } catch (error) {
    calls.close();
    throw error;
  }
}

class Model {
  #calls;

  constructor(calls, { id, dtype, context_length, device, threads }) {
    this.#calls = calls;
    Object.assign(this, { id, dtype, context_length, device, threads });
  }

  /** The text after a prompt, piece by piece. Left early, it ends. */
  async *stream(prompt, options = {}) {
    for await (const { choice } of this.complete({ prompt, ...options })) if (choice?.text) yield choice.text;
  }

  /** The same with tokens and their probabilities: `choice` objects, then `usage`. */
  complete(request) {
    return this.#calls.run({ request });
  }

  /** How many tokens a text has. */
  async countTokens(text) {
    for await (const { count } of this.#calls.run({ text })) return count;
  }

  /** Ends the worker, and frees the memory. */
  close() {
    this.#calls.close();
  }
}

/** Numbered calls of a worker, several at a time. */
class Calls {
  #worker;
  #open = new Map(); // takers of messages, by call
  #last = 0;
  #end; // why there are no more answers

  constructor(worker, onProgress) {
    this.#worker = worker;
    worker.onmessage = ({ data }) => (data.progress ? onProgress?.(data.progress) : this.#open.get(data.id)?.(data));
    worker.onerror = (event) => this.#fail(event.message || "the worker can't be started");
  }

  /** The messages that answer a call, until the one that ends it. */
  async *run(call) {
    if (this.#end) throw new Failure(sentence(this.#end));
    const id = ++this.#last;
    const messages = [];
    let wake = () => {};
    this.#open.set(id, (message) => {
      messages.push(message);
      wake();
    });
    this.#worker.postMessage({ id, ...call });
    let ended = false;
    try {
      while (!ended) {
        if (!messages.length) await new Promise((resolve) => (wake = resolve));
        const { error, ...message } = messages.shift();
        ended = error !== undefined || !message.choice;
        if (error) throw new Failure(sentence(error));
        yield message;
      }
    } finally {
      if (!ended) this.#worker.postMessage({ id, stop: true });
      this.#open.delete(id);
    }
  }

  close() {
    this.#worker.terminate();
    this.#fail("the model was closed");
  }

  #fail(error) {
    this.#end = error;
    for (const take of this.#open.values()) take({ error });
  }
}

/** Installs the service worker, which keeps all files. Where a browser refuses, only the network is needed each time. */
async function keepOffline(folder) {
  try {
    const options = { scope: folder, updateViaCache: "none" }; // version.js, too, tells of a new folder
    const { installing } = await navigator.serviceWorker.register(new URL("service-worker.js", folder), options);
    await new Promise((resolve) => {
      if (!installing) return resolve();
      installing.onstatechange = () => ["activated", "redundant"].includes(installing.state) && resolve();
    });
  } catch (error) {
    console.info("gpt2onnx: not kept for use without a network:", error.message);
  }
}

function sentence(message) {
  return message.charAt(0).toUpperCase() + message.slice(1) + (/[.!?]$/.test(message) ? "" : ".");
}
