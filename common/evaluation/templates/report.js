// Which items are shown, and in which order: a text they hold, and the score of one system.
const list = document.getElementById("items"), items = [...list.children];
const text = document.getElementById("text"), order = document.getElementById("order");
function score(item, system) {
  const value = JSON.parse(item.dataset.scores)[system];
  return value === null ? NaN : value;
}
function show() {
  const wanted = text.value.toLowerCase(), sorted = [...items];
  if (order.value) {
    const [system, sign] = order.value.split(" ").map(Number);
    const place = item => Number.isNaN(score(item, system)) ? Infinity : sign * score(item, system);
    sorted.sort((a, b) => place(a) < place(b) ? -1 : place(a) > place(b) ? 1 : 0);
  }
  for (const item of sorted) item.hidden = !item.textContent.toLowerCase().includes(wanted);
  list.append(...sorted);
  document.getElementById("count").textContent = items.filter(item => !item.hidden).length + " items";
}
text.addEventListener("input", show);
order.addEventListener("change", show);
