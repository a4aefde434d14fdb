// The chat: one prompt to one model or two, answers as they are made, a history of its own for each model.

import { announce, element, get, json, request, whenReady } from "/page.js";

const turns = []; // {prompt, answers: {model: answer}, node}; an answer is {text, kept, and what shows it}
let running = null; // the AbortController of the answers being made

// ---------------------------------------------------------------- asking

// What `model` is sent for `turn`: the earlier turns that it answered itself, then the prompt.
function messages(turn, model) {
  const earlier = turns.slice(0, turns.indexOf(turn)).filter((one) => one.answers[model]?.kept);
  const said = earlier.flatMap((one) => [
    { role: "user", content: one.prompt },
    { role: "assistant", content: one.answers[model].text },
  ]);
  return [...said, { role: "user", content: turn.prompt }];
}

function settings() {
  const values = ["max_tokens", "temperature", "top_p", "seed"].map((name) => [name, get(name).valueAsNumber]);
  return Object.fromEntries(values.filter(([, value]) => !Number.isNaN(value)));
}

// The JSON of each `data:` line of a stream of server-sent events, up to [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection broke before the answer was complete.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((one) => one.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Stream the answer of `model` to `turn` into its place; the finish reason.
async function stream(turn, model, signal) {
  const answer = turn.answers[model];
  const body = JSON.stringify({ model, messages: messages(turn, model), ...settings(), stream: true });
  const response = await request("/v1/chat/completions", { method: "POST", body, signal });
  if (!response.ok) await json(response); // throws what was refused
  let reason = null;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0] ?? {};
    reason = choice.finish_reason ?? reason;
    if (choice.delta?.content) show(answer, choice.delta.content);
  }
  return reason;
}

// Let `models` answer `turn`, at the same time. Whatever goes wrong stands in words where the answer would.
async function run(turn, models) {
  running = new AbortController();
  busy(true);
  await Promise.all(models.map(async (model) => {
    const answer = turn.answers[model], started = performance.now(), { signal } = running;
    begin(answer);
    try {
      const reason = await stream(turn, model, signal);
      const took = `${((performance.now() - started) / 1000).toFixed(1)} s`;
      finish(answer, reason === "length" ? `Cut at the longest answer allowed · ${took}` : took);
      announce(`${model} answered: ${answer.text || "nothing"}`);
    } catch (error) {
      if (signal.aborted) finish(answer, "Stopped");
      else fail(answer, error.constructor === Error ? error.message : "The connection broke."); // ours are plain
    }
  }));
  running = null;
  busy(false);
  if (lost(turn)) get("prompt").value ||= turn.prompt;
}

// Nobody answered it: its prompt goes back to where it was typed, and the next one takes its place.
const lost = (turn) => Object.values(turn.answers).every((answer) => answer.failed);

// ---------------------------------------------------------------- showing

// A turn at the end of the conversation: the prompt, and a place for the answer of each model.
function addTurn(prompt, models) {
  const turn = { prompt, answers: {} }, places = element("div", { className: "answers" });
  for (const model of models) {
    const answer = { text: "", kept: false, shown: document.createTextNode("") };
    answer.note = element("p", { className: "note" });
    answer.again = element("button", { type: "button", hidden: true }, "Try again");
    answer.again.addEventListener("click", () => {
      if (get("prompt").value === prompt) get("prompt").value = ""; // it had come back, to be sent again
      run(turn, [model]);
    });
    const text = element("p", { className: "text", dir: "auto" }, answer.shown);
    const title = element("h3", {}, model);
    answer.node = element("article", { className: "card" }, title, text, answer.note, answer.again);
    turn.answers[model] = answer;
    places.append(answer.node);
  }
  const said = element("p", { className: "text prompt", dir: "auto" }, prompt);
  turn.node = element("li", {}, element("h2", { className: "hidden" }, "You"), said, places);
  turns.push(turn);
  get("turns").append(turn.node);
  get("intro").hidden = true;
  return turn;
}

function begin(answer) {
  Object.assign(answer, { text: "", kept: false, failed: false });
  answer.shown.data = answer.note.textContent = "";
  answer.note.classList.remove("bad");
  answer.again.hidden = true;
  answer.node.ariaBusy = "true";
}

function show(answer, piece) {
  answer.text += piece;
  follow(() => answer.shown.appendData(piece));
}

function finish(answer, note) {
  answer.node.ariaBusy = "false";
  answer.kept = answer.text.trim() !== ""; // the server takes no empty turn
  follow(() => (answer.note.textContent = answer.kept ? note : `No text · ${note}`));
}

function fail(answer, words) {
  answer.node.ariaBusy = "false";
  answer.failed = true;
  answer.note.classList.add("bad");
  follow(() => {
    answer.note.textContent = words;
    answer.again.hidden = false;
  });
  announce(words);
}

// Make a change, and keep the end of the page in sight unless the reader has scrolled away from it.
function follow(change) {
  const page = document.documentElement, near = page.scrollHeight - page.clientHeight - page.scrollTop < 60;
  change();
  if (near) page.scrollTop = page.scrollHeight;
}

function busy(yes) {
  get("stop").hidden = !yes;
  get("send").hidden = yes;
  for (const turn of turns) for (const answer of Object.values(turn.answers)) answer.again.disabled = yes;
  if (yes) get("prompt").focus();
}

// ---------------------------------------------------------------- controls

function send() {
  const prompt = get("prompt").value, models = [get("model").value, get("second").value].filter(Boolean);
  if (running || get("send").disabled || !prompt.trim()) return;
  if (!get("settings").checkValidity()) {
    get("settings").querySelector("details").open = true; // a closed one hides what is wrong
    get("settings").reportValidity();
    return;
  }
  for (const turn of turns.filter(lost)) {
    turn.node.remove();
    turns.splice(turns.indexOf(turn), 1);
  }
  get("prompt").value = get("state").textContent = "";
  const turn = addTurn(prompt, models);
  scrollTo(0, document.documentElement.scrollHeight);
  run(turn, models);
}

function newChat() {
  running?.abort();
  turns.length = 0;
  get("turns").replaceChildren();
  get("intro").hidden = false;
  pick();
  get("prompt").focus();
}

// The same model cannot stand on both sides; one that is new to a chat under way starts without it, and that is said.
function pick() {
  const model = get("model").value;
  for (const option of get("second").options) option.disabled = option.value === model;
  if (get("second").value === model) get("second").value = "";
  const fresh = [model, get("second").value].filter((name) => name && !turns.some((turn) => turn.answers[name]));
  const words = `${fresh.join(" and ")}: starts at your next prompt, without the turns above.`;
  get("state").textContent = turns.length && fresh.length ? words : "";
}

async function start() {
  const say = (words) => (get("state").textContent = words);
  await whenReady(say);
  const models = await request("/v1/models").then(json).catch((error) => say(error.message) && null);
  if (!models) return setTimeout(start, 3000);
  for (const { id } of models.data) {
    for (const list of ["model", "second"]) get(list).append(element("option", { value: id }, id));
  }
  get("second").disabled = models.data.length < 2;
  get("send").disabled = false;
  pick();
}

get("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
get("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
get("prompt").addEventListener("input", () => follow(() => null)); // a line more lifts the end of the page
get("settings").addEventListener("submit", (event) => event.preventDefault());
get("stop").addEventListener("click", () => running?.abort());
get("new").addEventListener("click", newChat);
get("model").addEventListener("change", pick);
get("second").addEventListener("change", pick);
start();
