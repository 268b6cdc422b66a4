// The page: settings in, two texts out. The settings live in the form, and in the address after the #.

import * as client from "./client.js";
import { element } from "./elements.js";
import * as results from "./history.js";
import { read, Side } from "./side.js";

const find = (id) => document.getElementById(id);
const [form, key, link, stop, status] = ["form", "key", "link", "stop", "status"].map(find);
const { prompt } = form.elements;
const PAUSE = 300; // milliseconds without a new letter after which the prompt's tokens are counted
const ESCAPES = { n: "\n", r: "\r", t: "\t", "\\": "\\" };
let model;

function settings() {
  return new URLSearchParams(new FormData(form));
}

/** The request that the settings amount to on one side. */
function request(side, chosen, seed) {
  const lines = chosen.get("stop").split(/\r?\n/).filter(Boolean);
  const strings = lines.map((line) => line.replace(/\\([nrt\\])/g, (_, letter) => ESCAPES[letter]));
  const options = side.options(chosen);
  if (strings.length) options.stop = strings;
  if (options.do_sample && seed !== undefined) options.seed = seed;
  return { model: model?.id, prompt: prompt.value, max_tokens: Number(chosen.get("max_tokens")), ...options };
}

function chosenSeed(chosen) {
  return chosen.get("seed") ? Number(chosen.get("seed")) : undefined;
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
  const chosen = settings();
  link.href = `#${chosen}`;
  if (model) for (const side of sides) side.showCode(request(side, chosen, chosenSeed(chosen)), key.value);
  countTokens();
}

let counting, counted;

/** Says how long the prompt is, once it rests. */
function countTokens() {
  const text = prompt.value;
  if (!model || text === counted) return;
  clearTimeout(counting);
  counting = setTimeout(async () => {
    counted = text;
    const count = await client.countTokens(model.id, text, key.value).catch(() => undefined);
    if (text === prompt.value) find("count").textContent = count === undefined ? "" : `${count} of ${model.context_length} tokens`;
  }, PAUSE);
}

/** Sets the form to what the address says, or other settings; what they don't name gets its default. */
function restore(given = new URLSearchParams(location.hash.slice(1))) {
  for (const control of form.elements) {
    const wanted = given.get(control.name);
    if (control.type === "checkbox") control.checked = `${given}` ? wanted !== null : control.defaultChecked;
    else if (control.options) {
      const named = [...control.options].find(({ value }) => value === wanted);
      (named ?? control.querySelector("[selected]")).selected = true;
    } else if (control.name) control.value = wanted ?? control.defaultValue;
  }
  adapt();
}

/** Gives a side the options of a preset, and their defaults to its others. */
function preset(side, options) {
  const others = [...settings()].filter(([name]) => !name.startsWith(side.prefix));
  restore(new URLSearchParams([...others, ...[...options].map(([name, value]) => [side.prefix + name, value])]));
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
  const seed = chosenSeed(chosen) ?? crypto.getRandomValues(new Uint32Array(1))[0];
  const asked = prompt.value;
  stop.ariaDisabled = "false";
  status.textContent = "Generating.";
  const used = sides.filter((side) => !side.section.hidden);
  const requests = used.map((side) => request(side, chosen, seed));
  chosen.set("seed", seed);
  const said = await Promise.all(used.map((side, index) => side.run(requests[index], `#${chosen}`, key.value, signal)));
  stop.ariaDisabled = "true";
  status.textContent = said.join(" ");
  const texts = used.map((side) => ({ strategy: chosen.get(side.strategy.name), text: side.tokens.content }));
  if (controller.signal !== signal || !texts.some(({ text }) => text)) return; // replaced, or nothing came
  results.keep({ time: new Date(), model: model?.id, settings: `${chosen}`, prompt: asked, texts });
}

/** Takes a text as the prompt, and continues it. */
function goOn(text) {
  // What was picked goes away with the text; the next thing that one may want is to stop.
  if (find("sides").contains(document.activeElement)) stop.focus();
  prompt.value = text;
  adapt();
  generate();
}

/** A result's link fills the form and generates; in a tab of its own it only fills the form. */
function repeat(event) {
  const followed = event.target.closest("a.repeat");
  if (!followed || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  history.replaceState(null, "", followed.hash);
  restore();
  generate();
}

const sides = ["a", "b"].map((name) => new Side(name, { goOn, preset, askForKey }));
find("sides").append(...sides.map((side) => side.section));
sides[0].strategy.options[0].defaultSelected = sides[1].strategy.options[1].defaultSelected = true;
for (const input of document.querySelectorAll("input[type=range]")) {
  const shown = element("b", "value");
  shown.ariaHidden = "true"; // a slider says its value itself
  input.previousElementSibling.append(shown);
}
for (const option of document.querySelectorAll(".option[title]")) {
  const help = option.closest(".options").querySelector(".help");
  option.lastElementChild.title = option.title; // a screen reader reads the control's, not the label's
  option.addEventListener("focusin", () => (help.textContent = option.title));
}
form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
stop.addEventListener("click", () => controller.abort());
document.addEventListener("click", repeat);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  if (event.key === "Escape") controller.abort();
});
document.addEventListener("input", adapt);
key.addEventListener("change", meetModel);
addEventListener("hashchange", () => restore());
restore();
meetModel();
