// A request as code for elsewhere. Each option is named, so that no default of a bundle changes the text.

/** The request to the server's address, as a command of curl; the API key is left to a variable of the shell. */
export function curl({ logprobs, ...request }, address, hasKey) {
  const key = hasKey ? ' -H "Authorization: Bearer $API_KEY"' : "";
  return `curl ${quoted(address)} -H 'Content-Type: application/json'${key} \\\n  -d ${quoted(JSON.stringify(request))}`;
}

/** The same text by the Python package. */
export function python(request) {
  const named = Object.entries(generation(request)).map(([name, value]) => `    ${name}=${literal(value)},\n`);
  const load = `import gpt2onnx\n\nmodel = gpt2onnx.load(${literal(request.model)})\n`;
  return `${load}result = model.generate(\n    ${literal(request.prompt)},\n${named.join("")})\nprint(result.full_text)`;
}

/** The same text by the command line. */
export function command(request) {
  const options = Object.entries(generation(request)).flatMap(([name, value]) => {
    const option = name.replaceAll("_", "-");
    if (typeof value === "boolean") return value ? `--${option}` : `--no-${option}`;
    return [value].flat().map((each) => `--${option} ${quoted(each)}`);
  });
  return [`gpt2onnx generate -m ${quoted(request.model)}`, ...options, `-- ${quoted(request.prompt)}`].join(" \\\n  ");
}

/** The options by the names of the package. */
function generation({ model, prompt, max_tokens, logprobs, ...options }) {
  return { max_new_tokens: max_tokens, ...options };
}

/** A value in Python, which writes strings, numbers and lists as JSON does. */
function literal(value) {
  if (typeof value === "boolean") return value ? "True" : "False";
  return JSON.stringify(value);
}

/** A word for a Unix shell. */
function quoted(value) {
  const word = String(value);
  return /^[\w./:-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}
