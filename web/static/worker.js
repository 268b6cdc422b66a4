// The worker: transformers.js with the model. Takes requests, posts the chunks of their texts.

import {
  AutoModelForCausalLM,
  AutoTokenizer,
  env,
  InterruptableStoppingCriteria,
  LogitsProcessor,
  LogitsProcessorList,
  random,
} from "./runtime/transformers.min.js";
import { complete } from "./options.js";
import { draw } from "./sampling.js";
import { TextStream } from "./text-stream.js";

const HERE = new URL("./", self.location.href);
const WEIGHTS = "onnx/model.onnx_data";
// Below this, a pass is so short that starting the operators on a GPU would take longest.
const LEAST_BYTES_FOR_GPU = 100e6;

let model, tokenizer, facts;
const running = new Map(); // what interrupts a request, by its number

/** Loads everything; posts the bytes that have arrived meanwhile. */
async function load({ device, threads }) {
  facts = await (await fetch(new URL("web.json", HERE))).json();
  facts.device = device === "auto" ? await fastestDevice() : device;
  const { runtime, graph, bytes } = facts.devices[facts.device];
  const fetchCounted = counted(bytes);

  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: HERE.pathname });
  env.useBrowserCache = env.useWasmCache = false; // the service worker keeps files
  env.fetch = fetchCounted;
  const { wasm } = env.backends.onnx;
  wasm.wasmPaths = { mjs: new URL(`runtime/${runtime}.js`, HERE).href };
  wasm.wasmBinary = await (await fetchCounted(new URL(`runtime/${runtime}.wasm`, HERE))).arrayBuffer();
  threads ??= Math.min(4, Math.ceil(navigator.hardwareConcurrency / 2)); // as ONNX Runtime chooses
  wasm.numThreads = self.crossOriginIsolated ? threads : 1;

  tokenizer = await AutoTokenizer.from_pretrained("model");
  model = await AutoModelForCausalLM.from_pretrained("model", {
    device: facts.device,
    dtype: "fp32", // what it computes in; it also means that the file's name has no suffix
    model_file_name: graph,
    use_external_data_format: false,
    session_options: {
      externalData: [{ path: WEIGHTS.split("/").at(-1), data: WEIGHTS }], // of both graphs
      extra: { session: { disable_quant_qdq: "1" } }, // unpacks weights once, as it loads, rather than in each pass
    },
  });
  const { id, dtype, context_length } = facts;
  return { id, dtype, context_length, device: facts.device, threads: wasm.numThreads };
}

async function fastestDevice() {
  if (facts.float_bytes < LEAST_BYTES_FOR_GPU) return "wasm";
  const adapter = await navigator.gpu?.requestAdapter();
  return adapter && !adapter.info?.isFallbackAdapter ? "webgpu" : "wasm";
}

/** A fetch that posts how many bytes of a total have come. */
function counted(total) {
  let loaded = 0;
  return async (...request) => {
    const response = await fetch(...request);
    if (!response.ok || !response.body) return response;
    const count = new TransformStream({
      transform(part, controller) {
        loaded += part.byteLength;
        postMessage({ progress: { loaded, total } });
        controller.enqueue(part);
      },
    });
    return new Response(response.body.pipeThrough(count), response);
  };
}

/** Leaves only the token that it draws. */
class Sampler extends LogitsProcessor {
  constructor(options) {
    super();
    this.options = options;
    this.generator = new random.Random(options.seed);
  }

  _call(_, logits) {
    const token = draw(logits.data, this.options, () => this.generator.random());
    logits.data.fill(-Infinity);
    logits.data[token] = 0;
    return logits;
  }
}

function encoded(text) {
  return tokenizer(text, { add_special_tokens: false });
}

/** Generates a text, and posts each piece of it. */
async function answer(id, { prompt, ...given }) {
  const options = complete(given, model.generation_config ?? {});
  const text = prompt || tokenizer.bos_token || tokenizer.eos_token;
  const { input_ids, attention_mask } = encoded(text);
  const prompt_tokens = input_ids.dims[1];
  const room = facts.context_length + 1 - prompt_tokens; // the last token is in no later pass
  if (room < 1) throw new RangeError(`the prompt has ${prompt_tokens} tokens, the context window ${facts.context_length}`);
  const interrupt = new InterruptableStoppingCriteria();
  running.set(id, interrupt);
  const { do_sample, temperature, top_k, top_p, min_p, stop, seed, logprobs, ...others } = options;
  const max_new_tokens = Math.min(options.max_new_tokens, room);
  const limit = max_new_tokens < options.max_new_tokens ? "context" : "length";
  const endTokens = [model.generation_config?.eos_token_id ?? model.config.eos_token_id].flat();
  const report = (choice) => postMessage({ id, choice });
  const stream = new TextStream(tokenizer, endTokens, { stop, logprobs, limit }, report);
  const processors = new LogitsProcessorList();
  if (do_sample) processors.push(new Sampler(options));
  const request = Object.create(model);
  request.forward = async (inputs) => {
    await nextTurn();
    const outputs = await model.forward(inputs);
    if (logprobs !== undefined) stream.logits = outputs.logits.slice(null, -1, null).data.slice();
    return outputs;
  };
  stream.onStop = () => interrupt.interrupt();
  await request.generate({
    ...others,
    max_new_tokens,
    input_ids,
    attention_mask,
    do_sample: false, // the sampler has drawn
    logits_processor: processors,
    stopping_criteria: interrupt,
    streamer: stream,
  });
  return { prompt_tokens, completion_tokens: stream.ids.length, seed };
}

/** Lets messages and other requests come in between two tokens: a timer would wait for 4 ms. */
function nextTurn() {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

self.onmessage = async ({ data: { id, load: settings, text, request, stop } }) => {
  if (stop) return running.get(id)?.interrupt();
  try {
    if (settings) postMessage({ id, model: await load(settings) });
    else if (text !== undefined) postMessage({ id, count: encoded(text).input_ids.dims[1] });
    else postMessage({ id, usage: await answer(id, request) });
  } catch (error) {
    // WebAssembly throws a number where its memory is full.
    const message = typeof error === "number" ? "this browser has too little memory for the model" : error.message;
    postMessage({ id, error: message });
  }
  running.delete(id);
};
