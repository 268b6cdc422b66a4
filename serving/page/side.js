// One of the two strategies: its settings, its text, its figures.

import * as client from "./client.js"; // over HTTP; gpt2onnx web has another
import * as code from "./code.js";
import { button, copyButton, element } from "./elements.js";
import { TokenText } from "./tokens.js";

const ALTERNATIVES = 5;
const HINTS = {
  greedy: "Always takes the likeliest token.",
  sampling: "Draws each token, likelier ones more often.",
  beam: "Pursues several texts, and shows the likeliest at the end.",
  "beam-sampling": "Pursues several drawn texts, and shows the best at the end.",
};
const rounded = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

export class Side {
  /**
   * @param name a letter.
   * @param goOn continues a text; `preset` takes the options of a preset, `askForKey` is called where the server wants one.
   */
  constructor(name, { goOn, preset, askForKey }) {
    this.name = `Strategy ${name.toUpperCase()}`;
    this.prefix = `${name}.`;
    this.askForKey = askForKey;
    this.section = document.getElementById("side").content.cloneNode(true).firstElementChild;
    this.strategy = this.find("select");
    const title = this.find("h2");
    title.textContent = this.name;
    title.id = `title-${name}`;
    for (const labelled of [this.section, this.strategy]) labelled.setAttribute("aria-labelledby", title.id);
    for (const control of this.section.querySelectorAll("input, select")) {
      control.name = this.prefix + control.name;
      control.setAttribute("form", "form");
    }
    for (const choice of this.section.querySelectorAll(".presets button")) {
      choice.addEventListener("click", () => preset(this, new URLSearchParams(choice.value)));
    }
    this.tokens = new TokenText(this.find(".text"), `alternatives-${name}`, goOn);
    const whole = () => this.tokens.prompt + this.tokens.content;
    this.find(".after").append(button("Go on from here", () => goOn(whole())), copyButton("Copy text", whole));
    for (const block of this.section.querySelectorAll("[data-code]")) {
      block.firstElementChild.after(copyButton("Copy", () => block.lastElementChild.textContent));
    }
    this.report({});
  }

  find(selector) {
    return this.section.querySelector(selector);
  }

  /** Shows the options that the strategy has; the others are disabled, and so no part of the form's data. */
  adapt(used) {
    this.section.hidden = this.strategy.disabled = !used;
    const said = [];
    for (const option of this.section.querySelectorAll(".option")) {
      const [title, input] = option.children;
      option.hidden = !this.strategy.value.includes(option.dataset.for ?? "");
      input.disabled = !used || option.hidden;
      if (!option.hidden && read(input) !== "off") said.push(`${title.firstChild.data.toLowerCase()} ${read(input)}`);
    }
    this.find(".strategy p").textContent = HINTS[this.strategy.value];
    this.find("summary span").textContent = said.join(", ");
  }

  /** The options that the settings amount to. */
  options(settings) {
    const options = { do_sample: this.strategy.value.endsWith("sampling") };
    for (const [name, text] of settings) {
      if (name.startsWith(this.prefix) && name !== this.strategy.name) options[name.slice(2)] = Number(text);
    }
    if (!options.num_beams) options.logprobs = ALTERNATIVES; // of single texts only
    return options;
  }

  showCode(request, key) {
    const address = new URL("v1/completions", document.baseURI).href;
    for (const block of this.section.querySelectorAll("[data-code]")) {
      block.lastElementChild.textContent = code[block.dataset.code](request, address, Boolean(key));
    }
  }

  /** Runs a request; `repeat` is the address that repeats it. Returns what a screen reader should say of the result. */
  async run(request, repeat, key, signal) {
    const figures = { started: performance.now(), seed: request.seed, repeat };
    this.find(".error").textContent = "";
    this.section.ariaBusy = "true";
    this.tokens.clear(request.prompt);
    this.report(figures);
    try {
      await this.receive(request, figures, key, signal);
      if (request.num_beams && request.prompt && !signal.aborted) await this.colour(request, key, signal);
    } catch (problem) {
      if (!(problem instanceof client.Failure)) throw problem;
      if (signal.aborted) figures.finish = "you";
      else this.find(".error").textContent = problem.message;
      if (problem.status === 401) this.askForKey();
    }
    this.section.ariaBusy = "false";
    this.report(figures);
    if (!figures.tokens) return "";
    return `${this.name}: ${figures.tokens} tokens, ${rounded.format(speed(figures))} a second. ${this.tokens.content}`;
  }

  async receive(request, figures, key, signal) {
    let drawing;
    for await (const { choices, usage } of client.complete(request, key, signal)) {
      if (usage) figures.tokens = usage.completion_tokens;
      for (const choice of choices) {
        this.tokens.add(choice);
        figures.tokens = this.tokens.spans.length;
        figures.last = performance.now();
        figures.first ??= { time: figures.last, tokens: figures.tokens };
        figures.finish = choice.finish_reason ?? figures.finish;
      }
      drawing ??= requestAnimationFrame(() => {
        drawing = undefined;
        this.report(figures);
      });
    }
    cancelAnimationFrame(drawing);
  }

  /** Beams come without probabilities, so those of the finished text are asked for. */
  async colour(request, key, signal) {
    const choice = await client.scored(request.model, request.prompt, this.tokens.content, ALTERNATIVES, key, signal);
    this.tokens.clear(request.prompt);
    this.tokens.add(choice);
  }

  report(figures) {
    const { tokens, started, first, seed, repeat, finish } = figures;
    const facts = { tokens, "tokens/s": speed(figures), "s to first": first && (first.time - started) / 1000 };
    if (seed !== undefined) {
      facts.seed = element("a", "repeat", String(seed));
      facts.seed.href = repeat;
      facts.seed.title = "Repeat this result";
    }
    if (finish) facts["ended by"] = finish;
    const text = (fact) => (typeof fact === "number" ? rounded.format(fact) : (fact ?? "–"));
    this.find(".facts").replaceChildren(
      ...Object.entries(facts).map(([name, fact]) => element("div", "", element("dt", "", name), element("dd", "", text(fact)))),
    );
    this.find(".after").hidden = this.section.ariaBusy === "true" || !this.tokens.content;
  }
}

/** Tokens a second, from the first one on; of a text that came in one piece, from the start. */
function speed({ tokens, started, first, last }) {
  if (!tokens || !first) return undefined;
  const streamed = first.tokens > 0 && tokens > first.tokens;
  return 1000 * (streamed ? (tokens - first.tokens) / (last - first.time) : tokens / (last - started));
}

/** An option's value as it is shown. */
export function read(input) {
  if (input.value === input.dataset.off) return "off";
  return input.dataset.unit ? `${input.value} ${input.dataset.unit}` : input.value;
}
