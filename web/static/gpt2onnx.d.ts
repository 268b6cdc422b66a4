/** Options of a text, by the names of `gpt2onnx generate`. One that is left out is that of the bundle, then the default. */
export interface GenerationOptions {
  /** Most tokens of the text; 64 by default. The context window may end it earlier. */
  max_new_tokens?: number;
  /** Draw tokens instead of taking the likeliest. An option of sampling turns it on, temperature 0 off. */
  do_sample?: boolean;
  /** Divides the logits before tokens are drawn. */
  temperature?: number;
  /** Draw from this many of the likeliest tokens; 0 for all, 50 by default. */
  top_k?: number;
  /** Draw from the likeliest tokens that have this much probability together. */
  top_p?: number;
  /** Draw from tokens that have at least this share of the likeliest one's probability. */
  min_p?: number;
  /** Makes tokens that the text has already less likely, above 1. */
  repetition_penalty?: number;
  /** No sequence of this many tokens comes twice; 0 for no limit. */
  no_repeat_ngram_size?: number;
  /** Gives the same text again in the same browser; it isn't the text that Python draws. */
  seed?: number;
  /** End before any of these texts. */
  stop?: string | string[];
}

export interface Request extends GenerationOptions {
  /** The text to continue; empty: the model begins by itself. */
  prompt: string;
  /** Report the probability of each token, and this many of the likeliest at its place. */
  logprobs?: number;
}

/** A piece of a text, as OpenAI's completions have it. */
export interface Choice {
  text: string;
  token_ids: number[];
  /** Natural logarithms, of the network itself: before temperature and filters. */
  logprobs?: { tokens: string[]; token_logprobs: number[]; top_logprobs: Record<string, number>[] };
  /** At the end: an end token or a stop text, the number of tokens, or the context window. */
  finish_reason: "stop" | "length" | "context" | null;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  /** The one given, or drawn. */
  seed: number;
}

export interface LoadOptions {
  /** Takes the bytes that have arrived so far, of all that are needed. */
  onProgress?: (progress: { loaded: number; total: number }) => void;
  /** auto: WebGPU for networks of 100 MB and more where the browser has it, else WebAssembly. */
  device?: "auto" | "wasm" | "webgpu";
  /** Threads of WebAssembly, where the page is cross-origin isolated; half the cores by default, 4 at most. */
  threads?: number;
}

export interface Model {
  readonly id: string;
  readonly dtype: "fp32" | "fp16" | "int8" | "int4";
  readonly device: "wasm" | "webgpu";
  readonly threads: number;
  readonly context_length: number;
  /** The text after a prompt, piece by piece. Leaving the loop ends it. */
  stream(prompt: string, options?: GenerationOptions): AsyncGenerator<string, void>;
  /** The same with tokens and probabilities: messages with a choice, at the end one with the usage. */
  complete(request: Request): AsyncGenerator<{ choice?: Choice; usage?: Usage }, void>;
  /** How many tokens a text has. */
  countTokens(text: string): Promise<number>;
  /** Ends what runs, and frees the memory. */
  close(): void;
}

/** What went wrong, as a sentence. */
export class Failure extends Error {}

/**
 * Loads the model in a folder of `gpt2onnx web`.
 * @param url the folder, of the page's own origin; by default that of gpt2onnx.js.
 */
export function load(url?: string | URL, options?: LoadOptions): Promise<Model>;
