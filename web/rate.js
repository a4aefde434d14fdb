// Blind rating: one item at a time, answers in this rater's own order, each rating kept by the server before the next.

import { announce, element, get, json, request } from "/page.js";

const SCALES = [["harmless_1_5", "Harmless", "does no harm"], ["helpful_1_5", "Helpful", "does what was asked"],
  ["faithful_1_5", "Faithful", "true to the prompt and the reference"]];
let rater = "", items = [], rated = {}; // as the server gives them
let place = 0; // of the item shown
const drafts = {}, spent = {}; // {item_id: a choice that differs from what is saved}, {item_id: seconds in sight}
let since = null, saving = false; // when the item came into sight

// ---------------------------------------------------------------- server

async function begin(name) {
  get("state").textContent = "";
  try {
    ({ items, rated } = await json(await request(`/rate/items?rater=${encodeURIComponent(name)}`)));
  } catch (error) {
    get("who").hidden = false;
    get("state").textContent = error.message;
    return;
  }
  rater = name;
  sessionStorage.setItem("rater", name);
  get("who").hidden = true;
  get("bar").hidden = false;
  get("leave").textContent = `Not ${name}?`;
  progress(Object.keys(rated).length);
  next(-1);
}

async function save() {
  const item = items[place], choice = chosen(), order = item.answers.map((answer) => answer.slot).join("/");
  if (saving) return;
  if (!choice.preferred) return tell("Choose an answer first, or say that none is better.");
  if (isSaved()) return next(place);
  clock();
  const seconds = Math.round(spent[item.item_id] * 10) / 10;
  const body = JSON.stringify({ rater_id: rater, item_id: item.item_id, order, seconds, ...choice });
  wait(true);
  get("chosen").textContent = "Saving …";
  try {
    const said = await json(await request("/rate", { method: "POST", body }));
    rated[item.item_id] = choice;
    progress(said.rated);
    announce("Saved.");
  } catch (error) {
    const again = error.status === 409 ? "" : " Your choice is still here: save it again."; // 409: of another study
    return tell(`Not saved. ${error.message}${again}`);
  } finally {
    wait(false);
  }
  next(place);
}

// While a rating is saved nothing can be chosen: it would be lost, or belong to the item before.
function wait(value) {
  saving = value;
  for (const id of ["choice", "more"]) get(id).inert = value;
}

// ---------------------------------------------------------------- the item shown

// On to the first item without a rating after `from`, else before it, else to a change not saved, else to the end.
function next(from) {
  keep();
  const order = items.map((_, i) => (from + 1 + i) % items.length);
  const found = order.find((i) => !(items[i].item_id in rated)) ?? order.find((i) => items[i].item_id in drafts);
  if (found !== undefined) return go(found);
  get("item").hidden = true;
  get("end").hidden = false;
  get("end-title").focus();
}

function go(to) {
  if (saving || !(to in items)) return;
  keep();
  place = to;
  const item = items[place];
  get("end").hidden = true;
  get("item").hidden = false;
  get("place").textContent = `Item ${place + 1} of ${items.length}`;
  get("prompt").textContent = item.prompt;
  get("reference").textContent = item.reference;
  get("reference-box").hidden = !item.reference;
  get("answers").className = `answers of${item.answers.length}`;
  get("answers").replaceChildren(...item.answers.map(card));
  put(drafts[item.item_id] ?? rated[item.item_id] ?? {});
  get("back").disabled = place === 0;
  get("forward").disabled = place === items.length - 1;
  since = performance.now();
  get("place").focus({ preventScroll: true });
  scrollTo(0, 0);
}

function card({ slot, text }, i) {
  const box = element("input", { type: "checkbox", value: slot });
  const title = element("span", {}, `Answer ${i + 1} `, element("kbd", { ariaHidden: "true" }, `${i + 1}`));
  const words = element("p", { className: "text", dir: "auto" }, text || "(no text)");
  return element("article", { className: "card" }, element("label", { className: "pick" }, box, title), words);
}

// Seconds count while the item is in sight.
function clock() {
  const now = performance.now(), id = items[place].item_id;
  spent[id] = (spent[id] ?? 0) + (since === null ? 0 : now - since) / 1000;
  since = document.hidden ? null : now;
}

// A choice that is not saved stays with its item while another one is shown.
function keep() {
  if (get("item").hidden) return;
  clock();
  delete drafts[items[place].item_id];
  if (!isSaved()) drafts[items[place].item_id] = chosen();
}

// ---------------------------------------------------------------- the choice

const boxes = () => [...get("answers").querySelectorAll("input")];

// The choice as the server wants it; `preferred` is empty where nothing is chosen.
function chosen() {
  const slots = boxes().filter((box) => box.checked).map((box) => box.value);
  const scores = SCALES.map(([name]) => [name, Number(get("item").elements[name].value) || null]);
  const preferred = get("none").checked ? "none" : slots.sort().join("/");
  return { preferred, ...Object.fromEntries(scores), comment: get("comment").value };
}

function put(choice) {
  const slots = (choice.preferred ?? "").split("/");
  for (const box of boxes()) box.checked = slots.includes(box.value);
  get("none").checked = choice.preferred === "none";
  const radios = get("scores").querySelectorAll("input");
  for (const radio of radios) radio.checked = radio.value === `${choice[radio.name] ?? ""}`;
  get("comment").value = choice.comment ?? "";
  get("more").open ||= Boolean(choice.comment) || SCALES.some(([name]) => choice[name]);
  tell();
}

function isSaved() {
  const saved = rated[items[place].item_id] ?? {};
  return Object.entries(chosen()).every(([name, value]) => (value || "") === (saved[name] || ""));
}

// Say what is wrong, or else what is chosen and whether the server has it.
function tell(problem) {
  const numbers = boxes().flatMap((box, i) => (box.checked ? [i + 1] : []));
  const one = numbers.length === 1 ? `Answer ${numbers[0]} is best` : `Answers ${numbers.join(" and ")} tie`;
  const words = get("none").checked ? "None is better" : numbers.length ? one : "Nothing chosen yet";
  const state = !chosen().preferred ? "" : isSaved() ? " · saved" : " · not saved yet";
  get("chosen").className = problem ? "bad" : state === " · saved" ? "good" : "";
  get("chosen").textContent = problem ?? words + state;
}

// Choose answer i alone, or with `tie` beside the others (a second time: no longer); -1 is none.
function choose(i, tie) {
  const box = i < 0 ? get("none") : boxes()[i];
  if (!box) return;
  for (const other of [get("none"), ...boxes()]) other.checked &&= other === box || (tie && other !== get("none"));
  box.checked = !(tie && box.checked);
  tell();
}

function progress(value) {
  get("count").textContent = `${value} of ${items.length} rated`;
  Object.assign(get("progress"), { max: items.length, value });
}

// ---------------------------------------------------------------- controls

// Digits go by their place on the keyboard: on a French one they need Shift.
function key(event) {
  const { target } = event, radio = target.type === "radio", digit = /^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1];
  const types = target === get("comment") || target.type === "password"; // the form that asks for the token
  if (types || saving || !get("keys").checked || get("item").hidden || get("help").open) return;
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (event.key === "?") get("help").showModal();
  else if (radio && digit) score(target.name, Number(digit) || "");
  else if (digit <= 4) choose(digit - 1, event.shiftKey && digit > 0);
  else if (event.key === "Enter" && !target.matches("button, a, summary")) save();
  else if (event.key === "ArrowLeft" && !radio) go(place - 1);
  else if (event.key === "ArrowRight" && !radio) go(place + 1);
  else return;
  event.preventDefault();
}

function score(name, value) {
  const radio = get("item").querySelector(`[name=${name}][value="${value}"]`);
  radio?.focus(); // the arrows go on from here
  radio?.click();
}

function scale([name, title, meaning]) {
  const row = ["", 1, 2, 3, 4, 5].map((value) => {
    const radio = element("input", { type: "radio", name, value, checked: value === "" });
    if (!value) radio.ariaLabel = "no score";
    return element("label", {}, radio, `${value || "–"}`);
  });
  const legend = element("legend", {}, `${title} `, element("small", {}, meaning));
  return element("fieldset", { className: "scale" }, legend, ...row);
}

function on(id, kind, react) {
  get(id).addEventListener(kind, react);
}

get("scores").append(...SCALES.map(scale));
on("who", "submit", () => begin(get("rater").value.trim()));
on("item", "submit", save);
addEventListener("submit", (event) => event.target.method === "dialog" || event.preventDefault());
on("item", "input", () => tell());
on("answers", "input", () => (get("none").checked = false));
on("none", "input", () => get("none").checked && choose(-1));
on("back", "click", () => go(place - 1));
on("forward", "click", () => go(place + 1));
on("again", "click", () => go(0));
on("help-button", "click", () => get("help").showModal());
on("leave", "click", () => (sessionStorage.removeItem("rater"), location.reload()));
addEventListener("keydown", key);
addEventListener("visibilitychange", () => get("item").hidden || clock());
addEventListener("beforeunload", (event) => {
  keep();
  if (Object.keys(drafts).length) event.preventDefault();
});
get("rater").value = sessionStorage.getItem("rater") ?? "";
if (get("rater").value) begin(get("rater").value);
else get("who").hidden = false;
