// Draws a token. Knows no model: logits in, a token out.

/** The least logit that temperature-scaled filters keep: of top-k, top-p and min-p, in transformers' order. */
export function leastKept(logits, { temperature = 1, top_k = 0, top_p = 1, min_p = 0 }) {
  const sorted = logits.toSorted().reverse();
  const most = sorted[0];
  let least = top_k ? sorted[Math.min(top_k, sorted.length) - 1] : -Infinity; // ties are kept, as transformers does
  const weight = (logit) => (logit < least ? 0 : Math.exp((logit - most) / temperature));
  if (top_p < 1) {
    let rest = top_p * sorted.reduce((sum, logit) => sum + weight(logit), 0);
    least = sorted.find((logit) => (rest -= weight(logit)) <= 0) ?? least;
  }
  if (min_p) least = Math.max(least, most + temperature * Math.log(min_p));
  return Math.min(least, most); // rounding mustn't leave nothing
}

/** A token drawn from logits; `random` gives numbers from 0 to 1. */
export function draw(logits, options, random) {
  const { temperature = 1 } = options;
  const least = leastKept(logits, options);
  const most = logits.reduce((one, other) => Math.max(one, other));
  const weights = logits.map((logit) => (logit < least ? 0 : Math.exp((logit - most) / temperature)));
  let left = random() * weights.reduce((sum, weight) => sum + weight, 0);
  const drawn = weights.findIndex((weight) => (left -= weight) < 0);
  return drawn < 0 ? weights.findLastIndex((weight) => weight > 0) : drawn;
}

/** Natural logarithms of the probabilities of all tokens. */
export function logProbabilities(logits) {
  const most = logits.reduce((one, other) => Math.max(one, other));
  const total = most + Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - most), 0));
  return logits.map((logit) => logit - total);
}
