// The page: settings in, two texts out. The settings live in the form, and in the address after the #.

import * as client from "./client.js"; // over HTTP; gpt2onnx web has another
import { element, TokenText } from "./tokens.js";

const ALTERNATIVES = 5;
const HINTS = {
  greedy: "Always takes the likeliest token.",
  sampling: "Draws each token, likelier ones more often.",
  beam: "Pursues several texts, and shows the likeliest at the end.",
  "beam-sampling": "Pursues several drawn texts, and shows the best at the end.",
};
const find = (id) => document.getElementById(id);
const [form, key, link, stop, status] = ["form", "key", "link", "stop", "status"].map(find);
const rounded = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
let model;

/** One of the two strategies: its settings, its text, its figures. */
class Side {
  constructor(name) {
    this.name = `Strategy ${name.toUpperCase()}`;
    this.prefix = `${name}.`;
    this.section = find("side").content.cloneNode(true).firstElementChild;
    this.strategy = this.find("select");
    const title = this.find("h2");
    title.textContent = this.name;
    title.id = `title-${name}`;
    for (const labelled of [this.section, this.strategy]) labelled.setAttribute("aria-labelledby", title.id);
    for (const control of this.section.querySelectorAll("input, select")) {
      control.name = this.prefix + control.name;
      control.setAttribute("form", "form");
    }
    this.tokens = new TokenText(this.find(".text"), `alternatives-${name}`);
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

  /** The request that the settings amount to. */
  request(settings, seed) {
    const options = {};
    for (const [name, text] of settings) {
      if (name.startsWith(this.prefix) && name !== this.strategy.name) options[name.slice(2)] = Number(text);
    }
    if (!options.num_beams) options.logprobs = ALTERNATIVES; // of single texts only
    options.do_sample = this.strategy.value.endsWith("sampling");
    return { model: model?.id, prompt: form.elements.prompt.value, max_tokens: Number(settings.get("max_tokens")), seed, ...options };
  }

  /** Runs a request; returns what a screen reader should say of it. */
  async run(request, signal) {
    const figures = { started: performance.now(), seed: request.do_sample ? String(request.seed) : undefined };
    this.find(".error").textContent = "";
    this.section.ariaBusy = "true";
    this.tokens.clear(request.prompt);
    this.report(figures);
    try {
      await this.receive(request, figures, signal);
      if (request.num_beams && request.prompt && !signal.aborted) await this.colour(request, signal);
    } catch (problem) {
      if (!(problem instanceof client.Failure)) throw problem;
      if (signal.aborted) figures.finish = "you";
      else this.find(".error").textContent = problem.message;
      if (problem.status === 401) askForKey();
    }
    this.section.ariaBusy = "false";
    this.report(figures);
    if (!figures.tokens) return "";
    return `${this.name}: ${figures.tokens} tokens, ${rounded.format(speed(figures))} a second. ${this.tokens.content}`;
  }

  async receive(request, figures, signal) {
    let drawing;
    for await (const { choices, usage } of client.complete(request, key.value, signal)) {
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
  async colour(request, signal) {
    const choice = await client.scored(request.model, request.prompt, this.tokens.content, ALTERNATIVES, key.value, signal);
    this.tokens.clear(request.prompt);
    this.tokens.add(choice);
  }

  report(figures) {
    const { tokens, started, first, seed, finish } = figures;
    const facts = { tokens, "tokens/s": speed(figures), "s to first": first && (first.time - started) / 1000 };
    if (seed) facts.seed = seed;
    if (finish) facts["ended by"] = finish;
    const text = (fact) => (typeof fact === "number" ? rounded.format(fact) : (fact ?? "–"));
    this.find(".facts").replaceChildren(
      ...Object.entries(facts).map(([name, fact]) => element("div", "", element("dt", "", name), element("dd", "", text(fact)))),
    );
  }
}

/** Tokens a second, from the first one on; of a text that came in one piece, from the start. */
function speed({ tokens, started, first, last }) {
  if (!tokens || !first) return undefined;
  const streamed = first.tokens > 0 && tokens > first.tokens;
  return 1000 * (streamed ? (tokens - first.tokens) / (last - first.time) : tokens / (last - started));
}

/** An option's value as it is shown. */
function read(input) {
  if (input.value === input.dataset.off) return "off";
  return input.dataset.unit ? `${input.value} ${input.dataset.unit}` : input.value;
}

function settings() {
  return new URLSearchParams(new FormData(form));
}

/** Makes the page fit the form. */
function adapt() {
  const two = form.elements.compare.checked;
  find("sides").classList.toggle("two", two);
  sides[0].adapt(true);
  sides[1].adapt(two);
  for (const input of document.querySelectorAll("input[type=range]")) {
    input.previousElementSibling.lastElementChild.textContent = input.ariaValueText = read(input);
  }
  link.href = `#${settings()}`;
}

/** Sets the form to what the address says; what it doesn't name gets its default. */
function restore() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const control of form.elements) {
    const wanted = given.get(control.name);
    if (control.type === "checkbox") control.checked = location.hash.length > 1 ? wanted !== null : control.defaultChecked;
    else if (control.options) {
      const named = [...control.options].find(({ value }) => value === wanted);
      (named ?? control.querySelector("[selected]")).selected = true;
    } else if (control.name) control.value = wanted ?? control.defaultValue;
  }
  adapt();
}

async function meetModel() {
  try {
    model = await client.servedModel(key.value);
  } catch (problem) {
    if (problem.status === 401) askForKey();
    return;
  }
  find("model").textContent = `${model.id}, ${model.dtype} on ${model.device}`;
  form.elements.max_tokens.max = model.context_length - 1;
  adapt();
  for (const side of sides) if (side.section.ariaBusy !== "true") side.report({});
}

function askForKey() {
  find("key-field").hidden = false;
  key.focus();
}

let controller = new AbortController(); // of the run that is under way, or the last one
let runs = Promise.resolve();

function generate() {
  controller.abort();
  const { signal } = (controller = new AbortController());
  runs = runs.then(() => signal.aborted || run(signal)); // the one before has just been told to end
}

async function run(signal) {
  const chosen = settings();
  history.replaceState(null, "", `#${chosen}`);
  // Drawn here where none is given, so that it can be shown, and the text repeated.
  const seed = chosen.get("seed") ? Number(chosen.get("seed")) : crypto.getRandomValues(new Uint32Array(1))[0];
  stop.ariaDisabled = "false";
  status.textContent = "Generating.";
  const used = sides.filter((side) => !side.section.hidden);
  const said = await Promise.all(used.map((side) => side.run(side.request(chosen, seed), signal)));
  stop.ariaDisabled = "true";
  status.textContent = said.join(" ");
}

const sides = [new Side("a"), new Side("b")];
find("sides").append(...sides.map((side) => side.section));
sides[0].strategy.options[0].defaultSelected = sides[1].strategy.options[1].defaultSelected = true;
for (const input of document.querySelectorAll("input[type=range]")) {
  const shown = element("b", "value");
  shown.ariaHidden = "true"; // a slider says its value itself
  input.previousElementSibling.append(shown);
}
form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
stop.addEventListener("click", () => controller.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  if (event.key === "Escape") controller.abort();
});
document.addEventListener("input", adapt);
key.addEventListener("change", meetModel);
addEventListener("hashchange", restore);
restore();
meetModel();
