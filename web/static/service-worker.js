// Keeps the folder's files in the browser: after the first visit everything works without a network.

importScripts("version.js"); // VERSION and SHELL; other bytes there make browsers fetch all of it anew

const NAME = `gpt2onnx ${registration.scope} ${VERSION}`;

self.addEventListener("install", (event) => event.waitUntil(keepShell()));
self.addEventListener("activate", (event) => event.waitUntil(dropOthers().then(() => clients.claim())));
self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && request.url.startsWith(registration.scope)) event.respondWith(answer(event));
});

/** What a page has fetched before this worker could see it. */
async function keepShell() {
  const cache = await caches.open(NAME);
  await cache.addAll(SHELL.map((name) => new Request(new URL(name, registration.scope), { cache: "no-cache" })));
}

async function dropOthers() {
  const ours = `gpt2onnx ${registration.scope} `;
  const names = (await caches.keys()).filter((name) => name.startsWith(ours) && name !== NAME);
  await Promise.all(names.map((name) => caches.delete(name)));
}

async function answer(event) {
  const url = new URL(event.request.url);
  url.hash = url.search = "";
  if (url.href === registration.scope) url.pathname += "index.html";
  const cache = await caches.open(NAME);
  const kept = await cache.match(url);
  if (kept) return isolated(kept);
  // Not from the browser's own cache, which may hold a file of an earlier version.
  const response = await fetch(event.request, { cache: "no-cache" });
  // A full disk only means that the network is needed next time, too.
  if (response.status === 200) event.waitUntil(cache.put(url, response.clone()).catch(() => {}));
  return isolated(response);
}

/** The response with the headers that browsers want for threads, which not every server can send. */
function isolated(response) {
  if (!response.ok) return response;
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(response.body, { status: response.status, headers });
}
