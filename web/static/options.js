// The options of a request: their names and ranges are those of `gpt2onnx generate`.

const WHOLE = Number.isInteger;
const REAL = Number.isFinite;
// Each with the test of its values, and their limits.
const OPTIONS = {
  max_new_tokens: [WHOLE, 1, Infinity],
  temperature: [REAL, 0, Infinity],
  top_k: [WHOLE, 0, Infinity],
  top_p: [REAL, 0, 1],
  min_p: [REAL, 0, 1],
  repetition_penalty: [REAL, Number.MIN_VALUE, Infinity],
  no_repeat_ngram_size: [WHOLE, 0, Infinity],
  seed: [WHOLE, 0, 2 ** 53 - 1],
  logprobs: [WHOLE, 0, Infinity],
  do_sample: [(value) => typeof value === "boolean"],
  stop: [(value) => [value].flat().every((each) => typeof each === "string" && each)],
};
const SAMPLING = ["temperature", "top_k", "top_p", "min_p", "seed"];

/**
 * The options of a request, complete.
 *
 * A sampling option turns sampling on, and temperature 0 off, unless do_sample says otherwise.
 * @param {object} given by the caller.
 * @param {object} defaults of the bundle's generation_config.json.
 */
export function complete(given, defaults) {
  const named = Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined));
  for (const [name, value] of Object.entries(named)) {
    const [fits, least, most] = OPTIONS[name] ?? [];
    if (!fits) throw new RangeError(`there is no option ${name}: there are ${Object.keys(OPTIONS).join(", ")}`);
    if (!fits(value) || value < least || value > most) throw new RangeError(`${name}=${value} is out of range`);
  }
  const known = Object.entries(defaults).filter(([name, value]) => name in OPTIONS && value !== null);
  const options = { max_new_tokens: 64, top_k: 50, stop: [], ...Object.fromEntries(known), ...named };
  options.do_sample = named.do_sample ?? (SAMPLING.some((name) => name in named) || Boolean(options.do_sample));
  if (options.temperature === 0) options.do_sample = false;
  options.stop = [options.stop].flat();
  options.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
  return options;
}
