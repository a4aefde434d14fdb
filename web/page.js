// Shared by both pages: the token, requests whose failures are words, the wait for the model, announcements.

export const get = (id) => document.getElementById(id);

// A new element. Text goes in as text, never as markup: what models write is hostile.
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Screen readers say it once; it leaves before anybody can come across it.
export function announce(text) {
  const line = element("p", {}, text);
  get("announcements").append(line);
  setTimeout(() => line.remove(), 10000);
}

// A token in the address (#token=...) moves to the tab's storage, so that no bookmark or screenshot holds it.
function takeToken() {
  const found = /^#token=(.+)$/.exec(location.hash);
  if (!found) return;
  try {
    sessionStorage.setItem("token", decodeURIComponent(found[1]));
  } catch {} // a stray %: the form will ask
  history.replaceState(null, "", location.pathname + location.search);
}
takeToken();
addEventListener("hashchange", takeToken);

let asked = null; // one form, however many requests wait for it
function askToken(refused) {
  asked ??= new Promise((resolve) => {
    const words = refused ? "The server refused the token. Type the right one:" : "This server asks for its token:";
    const field = element("input", { type: "password", required: true, autocomplete: "off", pattern: "[!-~]+" });
    const button = element("button", { className: "main" }, "Continue");
    const form = element("form", { className: "card ask" }, element("label", {}, words, field), button);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem("token", field.value);
      form.remove();
      resolve((asked = null));
    });
    document.querySelector("main").prepend(form);
    field.focus();
  });
  return asked;
}

// fetch with the token, asked for as long as it is refused. No answer is an Error, after 15 s if no signal is given.
export async function request(path, { signal, ...options } = {}) {
  for (;;) {
    const token = sessionStorage.getItem("token"), headers = { "Content-Type": "application/json" };
    if (token) headers.Authorization = `Bearer ${token}`;
    const most = signal ?? AbortSignal.timeout(15000);
    const response = await fetch(path, { ...options, headers, signal: most, cache: "no-store" }).catch((error) => {
      throw new Error(error.name === "TimeoutError" ? "The server took too long." : "The server does not answer.");
    });
    if (response.status !== 401) return response;
    const stopped = new Promise((_, reject) => signal?.addEventListener("abort", () => reject(new Error("Stopped."))));
    await Promise.race([askToken(token !== null), stopped]);
  }
}

// The JSON of a good response; a refusal is an Error in the server's words, with the time to wait where it names one,
// and with its `status`.
export async function json(response) {
  const said = await response.json().catch(() => null), wait = response.headers.get("Retry-After");
  if (response.ok && said) return said;
  const words = said?.error?.message ?? `The server answered with status ${response.status}`;
  const error = new Error(words.replace(/[.\s]*$/, ".") + (wait ? ` Try again in ${wait} s.` : ""));
  throw Object.assign(error, { status: response.status });
}

// Resolves when the model is there; until then show(words) says what is missing.
export async function whenReady(show) {
  const words = { ok: "", loading: "The model is loading …", failed: "The model cannot be loaded: see its log." };
  const status = await request("/health").then((found) => found.json()).then((said) => said.status, () => null);
  show(words[status] ?? "The server does not answer.");
  if (status === "ok") return;
  await new Promise((resolve) => setTimeout(resolve, 1000));
  await whenReady(show);
}
