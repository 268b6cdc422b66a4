// A text that grows by tokens: whole characters only, up to a stop string, with the probabilities of its tokens.

import { BaseStreamer } from "./runtime/transformers.min.js";
import { logProbabilities } from "./sampling.js";

const INCOMPLETE = "\ufffd"; // what a part of a character is decoded to

export class TextStream extends BaseStreamer {
  /**
   * @param tokenizer of transformers.js.
   * @param endTokens the numbers of the tokens that end a text.
   * @param options stop: strings that end the text; logprobs: how many alternatives to a token are wanted; limit: what
   *   ends it otherwise, "length" or "context".
   * @param report takes a choice of OpenAI's completions: text, token_ids, logprobs, finish_reason.
   */
  constructor(tokenizer, endTokens, { stop, logprobs, limit }, report) {
    super();
    Object.assign(this, { tokenizer, endTokens, stop, logprobs, limit, report });
    this.sent = 0;
    this.begin();
  }

  /** The logits of the next token, before any option changes them; set where probabilities are wanted. */
  logits;

  begin() {
    this.new = { token_ids: [], tokens: [], token_logprobs: [], top_logprobs: [] };
  }

  put([tokens]) {
    if (!this.ids) {
      this.ids = []; // the first call brings the prompt
      return;
    }
    for (const token of tokens.map(Number)) {
      this.ids.push(token);
      this.new.token_ids.push(token);
      if (this.logits) this.weigh(token);
    }
    const text = this.decode(this.ids);
    const ends = this.stop.map((each) => text.indexOf(each)).filter((at) => at >= 0);
    if (ends.length) {
      this.finish = "stop";
      this.send(text.slice(0, Math.min(...ends)));
      this.onStop();
    } else if (!this.ended) {
      this.send(text.slice(0, this.safe(text)), { hold: true });
    }
  }

  end() {
    if (this.finish) this.report({ text: "", token_ids: [], finish_reason: this.finish });
    else this.send(this.decode(this.ids), { finish: this.ended ? "stop" : this.limit });
  }

  get ended() {
    return this.endTokens.includes(this.ids.at(-1));
  }

  /** Reports what isn't sent yet; with `hold`, only if there is new text. */
  send(text, { hold = false, finish = null } = {}) {
    const piece = text.slice(this.sent);
    if (hold && !piece) return;
    this.sent = text.length;
    const { token_ids, ...logprobs } = this.new;
    this.begin();
    this.report({ text: piece, token_ids, logprobs: this.logits && logprobs, finish_reason: finish });
  }

  /** The length of a text that later tokens can't change: without half a character, or what may begin a stop string. */
  safe(text) {
    let end = text.length;
    while (text[end - 1] === INCOMPLETE) end--;
    for (const stop of this.stop) {
      for (let length = Math.min(stop.length - 1, end); length > 0; length--) {
        if (text.slice(0, end).endsWith(stop.slice(0, length))) {
          end -= length;
          break;
        }
      }
    }
    return Math.max(end, this.sent);
  }

  weigh(token) {
    const all = logProbabilities(this.logits);
    const least = all.toSorted().at(-Math.min(Math.max(this.logprobs, 1), all.length));
    const top = [...all.keys()].filter((other) => all[other] >= least).sort((one, other) => all[other] - all[one]);
    const shown = new Set([...top.slice(0, this.logprobs), token]);
    this.new.tokens.push(this.piece(token));
    this.new.token_logprobs.push(all[token]);
    this.new.top_logprobs.push(Object.fromEntries([...shown].map((other) => [this.piece(other), all[other]])));
  }

  /** A token as text; parts of a character as their bytes, written as the server does. */
  piece(token) {
    const text = this.tokenizer.decode([token], { clean_up_tokenization_spaces: false });
    if (!text.includes(INCOMPLETE)) return text;
    const bytes = [...this.tokenizer._tokenizer.id_to_token(token)].map((letter) => BYTES.indexOf(letter));
    return `bytes:${bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("")}`;
  }

  decode(ids) {
    return this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }
}

/** The letters that GPT-2's vocabulary writes the bytes 0 to 255 with: printable ones stand for themselves. */
const BYTES = (() => {
  let others = 256;
  const printable = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(printable(byte) ? byte : others++));
})();
