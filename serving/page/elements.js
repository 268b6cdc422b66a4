// Elements that several parts of the page make.

/** An element with a class, and texts or elements in it. */
export function element(tag, name, ...content) {
  const made = document.createElement(tag);
  made.className = name;
  made.append(...content);
  return made;
}

/** A button; in a form it submits nothing. */
export function button(label, act) {
  const made = element("button", "", label);
  made.type = "button";
  if (act) made.addEventListener("click", act);
  return made;
}

/** A button that copies what a function gives, and says so for a moment. */
export function copyButton(label, content) {
  const made = button(label, async () => {
    await copy(content());
    made.focus();
    made.textContent = "Copied";
    setTimeout(() => (made.textContent = label), 2000);
  });
  return made;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers have no clipboard for pages that came by plain HTTP from another machine.
    const area = element("textarea", "spoken");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}
