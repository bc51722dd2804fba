"use strict";
// Search, filters, sorting, themes, and keeping a served page current. The page is readable without.
(() => {
  const find = (selector, from = document) => [...from.querySelectorAll(selector)];
  const named = (id) => document.getElementById(id);
  const [search, verdict, field, order, theme] = ["search", "verdict", "field", "order", "theme"].map(named);
  const LABELS = { system: "System", field: "Field", verdict: "Verdict", effect: "Effect", seeds: "Seeds", time: "Time" };
  let sort = { key: "", down: false };
  let rows = [];
  let texts = new Map();

  function fits(row, wanted) {
    const { verdict: said, field: place } = row.dataset;
    return (!verdict.value || said === verdict.value) && (!field.value || place === field.value)
      && wanted.every((word) => texts.get(row).includes(word));
  }

  function filter() {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const seen = new Set();
    let shown = 0;
    let before = null;
    for (const row of find("#board tbody tr")) {
      row.hidden = !fits(row, wanted);
      if (row.hidden) continue;
      shown += 1;
      seen.add(row.dataset.system);
      const name = row.cells[0].textContent;
      row.classList.toggle("again", name === before);
      before = name;
    }
    const parts = find("[data-of]");
    for (const part of parts) part.hidden = !seen.has(part.dataset.of);
    const systems = new Set(rows.map((row) => row.dataset.system)).size;
    named("nothing").hidden = shown > 0;
    named("count").textContent = `${shown} of ${rows.length} rows, ${seen.size} of ${systems} systems`;
  }

  function compare(first, second) {
    const name = sort.key === "verdict" ? "rank" : sort.key;
    const [a, b] = [first, second].map((row) => row.dataset[name] ?? "");
    if (a === "" || b === "") return (a === "") - (b === "");  // what is missing comes last
    const by = sort.key === "system" || sort.key === "field" ? a.localeCompare(b) : a - b;
    return sort.down ? -by : by;
  }

  function arrange() {
    const sorted = sort.key ? rows.toSorted?.(compare) ?? [...rows].sort(compare) : rows;
    const body = document.querySelector("#board tbody");
    body.append(...sorted);
    for (const head of find("#board th[data-key]")) {
      if (head.dataset.key !== sort.key) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", sort.down ? "descending" : "ascending");
    }
    order.value = sort.key;
    filter();
  }

  // A first click sorts, a second turns it round, a third goes back to the order of the catalogue.
  function press(key) {
    if (sort.key !== key) sort = { key, down: false };
    else sort = sort.down ? { key: "", down: false } : { key, down: true };
    arrange();
  }

  function prepare() {
    rows = find("#board tbody tr");
    const words = new Map(find("[data-words]").map((part) => [part.dataset.of, part.dataset.words]));
    texts = new Map(rows.map((row) =>
      [row, `${row.textContent} ${words.get(row.dataset.system) ?? ""}`.toLowerCase()]));
    for (const head of find("#board th[data-key]")) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => press(head.dataset.key));
      head.append(button);
    }
    named("fold").hidden = false;
    named("fold").addEventListener("click", fold);
    arrange();
  }

  function fold() {
    const parts = find(".system:not([hidden]) details");
    const open = parts.some((part) => !part.open);
    for (const part of parts) part.open = open;
    named("fold").textContent = open ? "Close all details" : "Open all details";
  }

  function paint() {
    if (theme.value) document.documentElement.dataset.theme = theme.value;
    else delete document.documentElement.dataset.theme;
  }

  const stored = {  // a browser may forbid a file to store anything
    get() { try { return localStorage.getItem("steelyard-theme") ?? ""; } catch { return ""; } },
    set(value) { try { localStorage.setItem("steelyard-theme", value); } catch { /* not kept */ } },
  };

  search.addEventListener("input", filter);
  for (const choice of [verdict, field]) choice.addEventListener("change", filter);
  order.addEventListener("change", () => { sort = { key: order.value, down: false }; arrange(); });
  for (const [key, label] of Object.entries(LABELS)) order.append(new Option(label, key));
  named("clear").addEventListener("click", () => {
    search.value = verdict.value = field.value = "";
    filter();
    search.focus();
  });
  theme.value = stored.get();
  if (theme.selectedIndex < 0) theme.value = "";
  theme.addEventListener("change", () => { paint(); stored.set(theme.value); });
  paint();
  named("controls").hidden = false;
  prepare();

  // A served page asks now and then; filters, order and what is open stay as they are.
  let tag = "";
  let page = document.documentElement.dataset.page;
  async function parsed(address) {
    const answer = await fetch(address, { cache: "no-cache" });
    if (!answer.ok) throw new Error(answer.statusText);
    return [answer, new DOMParser().parseFromString(await answer.text(), "text/html")];
  }

  async function look() {
    const [answer, fresh] = await parsed("/live");
    if (answer.headers.get("ETag") !== tag) {
      tag = answer.headers.get("ETag");
      named("live").replaceWith(fresh.getElementById("live"));
    }
    if (answer.headers.get("X-Page") === page) return;
    page = answer.headers.get("X-Page");
    const open = new Set(find("main details[open]").map((part) => part.dataset.fold));
    const [, whole] = await parsed("/");
    for (const place of ["summary", "main"]) named(place).replaceWith(whole.getElementById(place));
    for (const part of find("main details")) part.open = open.has(part.dataset.fold);
    prepare();
  }

  async function keep() {
    let said = "";
    try { await look(); } catch { said = "The server does not answer: what is shown may be old."; }
    if (named("lost").textContent !== said) named("lost").textContent = said;
    setTimeout(keep, 2000);
  }
  if (page) keep();
})();
