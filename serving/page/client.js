// The server's interface as the page uses it. Knows no elements.

const COMPLETIONS = "v1/completions";

/** What went wrong, as a sentence; `status` is the response's, 0 where there was none. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The model that is served, as /v1/models describes it. */
export async function servedModel(key) {
  const response = await ask("v1/models", { headers: headers(key) });
  return (await response.json()).data[0];
}

/** The chunks of a streamed completion. Aborted, it ends with a failure. */
export async function* complete(request, key, signal) {
  const { body } = await post(COMPLETIONS, { ...request, stream: true, stream_options: { include_usage: true } }, key, signal);
  try {
    for await (const data of events(body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure(sentence(chunk.error.message));
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Failure) throw error;
  }
  throw new Failure("The connection broke off before the end.");
}

/** The text after a prompt as a choice with the probabilities of its tokens. */
export async function scored(model, prompt, text, alternatives, key, signal) {
  const request = { model, prompt: prompt + text, max_tokens: 0, echo: true, logprobs: alternatives };
  const { logprobs } = (await (await post(COMPLETIONS, request, key, signal)).json()).choices[0];
  const first = logprobs.text_offset.findIndex((offset) => offset >= [...prompt].length); // it counts whole characters
  for (const name in logprobs) logprobs[name].splice(0, first);
  return { text, logprobs };
}

/** How many tokens a text has. */
export async function countTokens(model, prompt, key) {
  const response = await post("tokenize", { model, prompt }, key);
  return (await response.json()).count;
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function post(path, body, key, signal) {
  return ask(path, { method: "POST", headers: headers(key), body: JSON.stringify(body), signal });
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Failure("The server can't be reached: is it still running?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const { status } = response;
  let message;
  try {
    message = (await response.json()).error.message;
  } catch {
    message = `The server answered with status ${status}`;
  }
  const wait = Number(response.headers.get("Retry-After"));
  if (status === 401) message = "The server asks for its API key: enter it above";
  if (status === 429) message = "The server has as many requests as it takes";
  if (wait) message = `${message.replace(/[.:].*/, "")}: try again in ${wait} ${wait === 1 ? "second" : "seconds"}`;
  return new Failure(sentence(message), status);
}

function sentence(message) {
  const text = String(message).trim();
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

/** The data of server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
