// A text made of tokens, each shown with its probability, and the alternatives to one of them.

import { button, element } from "./elements.js";

const LEAST_OF_CLASS = [0, 0.05, 0.2, 0.5, 0.8]; // p1 to p5, as the legend says
const BYTES = /^bytes:((?:\\x[0-9a-f]{2})+)$/i; // how the interface writes a token that is no whole character
const WHITE = { " ": "␣", "\n": "↵", "\t": "⇥", "\u00a0": "⍽" };
const percent = new Intl.NumberFormat("en", { style: "percent", maximumSignificantDigits: 2 });

function shown(probability) {
  if (probability < 0.0001) return "<0.01%";
  return probability > 0.995 ? ">99%" : percent.format(probability);
}

/** A token as it can be read: white space as signs, parts of a character as their bytes. */
function readable(piece) {
  const bytes = BYTES.exec(piece);
  if (bytes) return bytes[1].replaceAll("\\x", " ").trim().toUpperCase();
  return piece.replace(/[ \n\t\u00a0]/g, (space) => WHITE[space]);
}

/** A text that grows by the chunks of a completion; the alternatives to a token appear where it is pointed at. */
export class TokenText {
  /** `goOn` takes the text up to an alternative that is picked, and that alternative. */
  constructor(place, id, goOn) {
    this.place = place;
    this.alternatives = element("div", "alternatives");
    this.alternatives.id = id;
    this.clear("");
    place.addEventListener("mouseover", (event) => this.#point(event.target));
    place.addEventListener("focusin", (event) => this.#point(event.target));
    place.addEventListener("mouseleave", () => this.#leave(document.activeElement));
    place.addEventListener("focusout", (event) => this.#leave(event.relatedTarget));
    place.addEventListener("keydown", (event) => this.#walk(event));
    // Else the token would lose its focus, and the alternatives go before the click.
    this.alternatives.addEventListener("mousedown", (event) => event.preventDefault());
    this.alternatives.addEventListener("click", (event) => {
      const picked = event.target.closest("button");
      if (picked) goOn(this.#before(this.spans.indexOf(this.current)) + picked.value);
    });
  }

  /** Begins anew after a prompt, of which the end is shown. */
  clear(prompt) {
    this.prompt = prompt;
    this.tokens = [];
    this.spans = [];
    this.box = element("span", "tokens");
    const end = [...prompt].slice(-100).join("");
    const before = element("span", "prompt", end === prompt ? prompt : `…${end}`);
    this.place.replaceChildren(before, this.box, this.alternatives);
    this.#show(-1);
  }

  /** The text without the prompt. */
  get content() {
    return this.box.textContent;
  }

  /** Adds a choice of a chunk. Its tokens only say where to part its text: no letter of that is lost or added. */
  add({ text, logprobs }) {
    logprobs?.tokens.forEach((piece, index) => {
      const at = text.indexOf(piece); // -1: part of a character, or an end token
      if (at > 0) this.#grow(text.slice(0, at));
      this.#append(piece, Math.exp(logprobs.token_logprobs[index]), logprobs.top_logprobs[index]);
      if (at < 0) return;
      this.#grow(piece);
      text = text.slice(at + piece.length);
    });
    if (text) this.#grow(text);
  }

  #grow(text) {
    (this.spans.at(-1) ?? this.box).append(text);
  }

  #append(piece, probability, top) {
    const span = element("span", `token p${LEAST_OF_CLASS.findLastIndex((least) => probability >= least) + 1}`);
    span.tabIndex = this.spans.length ? -1 : 0;
    span.dataset.piece = readable(piece);
    span.classList.toggle("newline", piece.includes("\n"));
    span.role = "option";
    span.ariaSelected = "false";
    span.ariaLabel = `${piece.trim() && !BYTES.test(piece) ? piece.trim() : readable(piece)}, ${shown(probability)}`;
    span.setAttribute("aria-describedby", this.alternatives.id);
    this.box.role = "listbox"; // only now: one without options is invalid
    this.box.ariaLabel = "Tokens";
    this.box.append(span);
    this.spans.push(span);
    this.tokens.push({ piece, probability, top });
  }

  /** The text before a token, with the prompt. */
  #before(index) {
    const nodes = [...this.box.childNodes];
    const before = nodes.slice(0, nodes.indexOf(this.spans[index]));
    return this.prompt + before.map((node) => node.textContent).join("");
  }

  /** Where the focus stays in the alternatives, so do they. */
  #leave(focused) {
    if (!this.alternatives.contains(focused)) this.#show(this.spans.indexOf(focused));
  }

  #point(target) {
    const index = this.spans.indexOf(target);
    if (index >= 0) this.#show(index);
  }

  #walk(event) {
    const now = this.spans.indexOf(document.activeElement);
    if (event.key === "Escape") {
      if (this.alternatives.contains(document.activeElement)) this.current.focus();
      this.#show(-1);
    }
    if (now < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    const places = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: this.spans.length - 1 };
    const next = this.spans[places[event.key] ?? this.#nextLine(now, { ArrowDown: 1, ArrowUp: -1 }[event.key])];
    if (!next) return;
    event.preventDefault();
    this.spans[now].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  /** The token nearest to one, a line further down (step 1) or up (-1). */
  #nextLine(now, step) {
    if (!step) return undefined;
    const place = (index) => this.spans[index]?.getClientRects()[0];
    const { left, top } = place(now);
    let line, best;
    for (let index = now + step; place(index); index += step) {
      if ((place(index).top - top) * step < 9) continue;
      line ??= place(index).top;
      if (Math.abs(place(index).top - line) > 9) break;
      if (best === undefined || Math.abs(place(index).left - left) < Math.abs(place(best).left - left)) best = index;
    }
    return best;
  }

  /** Shows the alternatives to a token below it, or above where there is more room; to none hides them. */
  #show(index) {
    if (this.current) {
      this.current.classList.remove("current");
      this.current.ariaSelected = "false";
    }
    this.current = this.spans[index];
    this.alternatives.hidden = !this.current;
    if (!this.current) return;
    this.current.classList.add("current");
    this.current.ariaSelected = "true";
    // Within a character that takes several tokens there is no text to go on from.
    const whole = index === 0 || this.spans[index - 1].textContent !== "";
    this.alternatives.replaceChildren(...description(this.tokens[index], index, whole));
    const [frame, at] = [this.place.getBoundingClientRect(), [...this.current.getClientRects()].at(-1)];
    const { offsetWidth, offsetHeight, style } = this.alternatives;
    const above = at.bottom + offsetHeight > innerHeight && at.top > offsetHeight;
    style.left = `${Math.max(0, Math.min(at.left - frame.left, frame.width - offsetWidth))}px`;
    style.top = `${(above ? at.top - offsetHeight - 4 : at.bottom + 4) - frame.top}px`;
  }
}

/** A token and its alternatives, likeliest first, and all other tokens as one. Those that are text can be picked. */
function description({ piece, probability, top }, index, whole) {
  const rows = Object.entries(top).map(([other, logprob]) => [other, Math.exp(logprob)]);
  rows.sort((one, other) => other[1] - one[1]);
  const rest = 1 - rows.reduce((sum, row) => sum + row[1], 0);
  const list = element("ol", "");
  for (const [other, p] of rows) {
    const choice = whole && !BYTES.test(other) ? button("") : element("div", "");
    choice.value = other;
    list.append(row(choice, readable(other), p, other === piece ? "chosen" : ""));
  }
  if (rest > 0.00005) list.append(row(element("div", ""), "all others", rest, "others"));
  const title = element("p", "", `Token ${index + 1}: `, element("b", "piece", readable(piece)), ` ${shown(probability)}`);
  return [title, list, element("p", "soft", "Pick one to go on from it.")];
}

function row(choice, label, probability, name) {
  const bar = element("span", "bar");
  bar.style.width = `${100 * probability}%`;
  choice.append(element("span", "piece", label), element("span", "track", bar), element("span", "share", shown(probability)));
  return element("li", name, choice);
}
