// The results so far, newest first, kept in this browser alone.

import { button, element } from "./elements.js";

const NAME = "gpt2onnx.history";
const MOST = 100;
const place = document.getElementById("history");
const when = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

/** Keeps a result: its time, model, settings as they stand in an address, prompt, and texts by strategy. */
export function keep(result) {
  store([result, ...kept()].slice(0, MOST));
}

/** Shows what is kept. */
export function show() {
  const results = kept();
  place.hidden = !results.length;
  place.querySelector("summary span").textContent = results.length;
  place.querySelector("ol").replaceChildren(...results.map(entry));
}

function entry({ time, model, settings, prompt, texts }) {
  const link = element("a", "repeat", prompt || "(no prompt)");
  link.href = `#${settings}`;
  const shown = texts.map(({ strategy, text }) => element("p", "", element("b", "", `${strategy}: `), text));
  return element("li", "", link, element("span", "soft", ` ${when.format(new Date(time))}, ${model}`), ...shown);
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? [];
  } catch {
    return []; // the browser's settings forbid it
  }
}

/** Stores results; where the browser's space is short, the oldest go. */
function store(results) {
  for (; results.length; results.pop()) {
    try {
      localStorage.setItem(NAME, JSON.stringify(results));
      break;
    } catch {
      continue;
    }
  }
  show();
}

function save() {
  const results = kept().map((each) => ({ ...each, settings: Object.fromEntries(new URLSearchParams(each.settings)) }));
  const link = element("a", "");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(results, null, 1)], { type: "application/json" }));
  link.download = "gpt2onnx-history.json";
  link.click();
  URL.revokeObjectURL(link.href);
}

function clear() {
  localStorage.removeItem(NAME);
  show();
}

place.querySelector(".actions").prepend(button("Export as JSON", save), button("Clear", clear));
addEventListener("storage", show); // another tab has changed it
show();
