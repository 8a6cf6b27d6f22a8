// The page itself: search, picks, the request and the three lists. Texts from the service are inserted as text only.

import {
  BASE_NAMES,
  LISTS,
  buildRequest,
  buildRows,
  describeMove,
  describePlaces,
  explain,
  findBase,
  findMissing,
  findRange,
  formatScore,
  listBars,
  listCounts,
  measureBar,
  ordinal,
  readError,
  summarize,
} from "./logic.js";

const FIRST = 10; // rows of a list before "show all"
const SEARCH_DELAY_MS = 150;
const SLOW_MS = 2000;

const find = (id) => document.getElementById(id);
const state = {mode: "new", user: "", count: 20, liked: [], disliked: [], answer: null, selected: null, showsAll: false};
let token = ""; // of a service that demands one; kept here only
let searching = null; // AbortController of the search in progress
let asking = null; // AbortController of the comparison in progress

/** Make an element; strings become text nodes. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** A title, isolated from the direction of the text around it. */
const makeTitle = (item) => make("bdi", {className: "title", title: `id ${item.item_id}`}, item.title || item.item_id);

/** Ask the service; returns its JSON, or throws an error with its message. */
async function askService(path, options = {}) {
  const headers = {...options.headers, ...(token ? {Authorization: `Bearer ${token}`} : {})};
  let answer, text;
  try {
    answer = await fetch(path, {...options, headers});
    text = await answer.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service does not answer. Is it still running?");
  }
  if (answer.status === 401) {
    find("token-form").hidden = false;
    find("docs").hidden = true; // a link sends no token
  }
  if (!answer.ok) throw new Error(readError(answer.status, text));
  try {
    return JSON.parse(text);
  } catch {
    throw new Error("The answer is not JSON; something between this page and the service changed it.");
  }
}

// Search and picks

async function search() {
  searching?.abort();
  const own = (searching = new AbortController());
  const query = find("search").value;
  try {
    const address = `items?${new URLSearchParams({search: query, limit: "12"})}`;
    const answer = await askService(address, {signal: own.signal});
    showFound(answer, query.trim());
  } catch (error) {
    if (error.name === "AbortError") return;
    find("results").replaceChildren();
    find("found").classList.remove("hidden");
    find("found").textContent = error.message;
  }
}

function showFound({items, more}, query) {
  const text = items.length === 0 ? `No title has "${query}".` : `${items.length}${more ? " or more" : ""} titles found`;
  find("found").textContent = text;
  find("found").classList.toggle("hidden", items.length > 0);
  find("results").replaceChildren(...items.map(makeResult));
}

function makeResult(item) {
  const likes = `${item.likes.toLocaleString("en")} ${item.likes === 1 ? "like" : "likes"}`;
  const text = make("span", {className: "text"}, makeTitle(item), make("small", {}, likes));
  const row = make("li", {}, text, makeChoice(item, "liked", "Like"), makeChoice(item, "disliked", "Dislike"));
  row.dataset.id = item.item_id;
  return row;
}

function makeChoice(item, list, name) {
  const button = make("button", {type: "button", className: `choice ${list}`, "aria-label": `${name} ${item.title}`}, name);
  button.setAttribute("aria-pressed", String(isPicked(item, list)));
  button.addEventListener("click", () => pick(item, list));
  return button;
}

const isPicked = (item, list) => state[list].some((other) => other.item_id === item.item_id);

/** Add an item to a list, or remove it if it is there. */
function pick(item, list) {
  const wasThere = isPicked(item, list);
  for (const name of ["liked", "disliked"]) {
    state[name] = state[name].filter((other) => other.item_id !== item.item_id);
  }
  if (!wasThere) state[list].push({item_id: item.item_id, title: item.title});
  showPicks();
}

function showPicks() {
  for (const list of ["liked", "disliked"]) {
    const box = find(`picks-${list}`);
    box.hidden = state[list].length === 0;
    box.querySelector("ul").replaceChildren(...state[list].map((item) => makeChip(item, list)));
  }
  for (const row of find("results").children) {
    for (const list of ["liked", "disliked"]) {
      const pressed = isPicked({item_id: row.dataset.id}, list);
      row.querySelector(`.${list}`).setAttribute("aria-pressed", String(pressed));
    }
  }
}

function makeChip(item, list) {
  const button = make("button", {type: "button", "aria-label": `Remove ${item.title}`}, "\u00d7");
  button.addEventListener("click", () => {
    pick(item, list);
    const others = find(`picks-${list}`).querySelectorAll("button");
    (others[others.length - 1] ?? find("search")).focus();
  });
  return make("li", {}, makeTitle(item), button);
}

/** Move the focus through the search and its results with the arrow keys. */
function moveFocus(event) {
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  const rows = [...find("results").children];
  const here = rows.findIndex((row) => row.contains(event.target));
  if (event.key === "Escape" && here >= 0) find("search").focus();
  else if (event.key === "Enter" && event.target === find("search")) rows[0]?.querySelector("button").focus();
  else if (step === undefined) return;
  else {
    const name = event.target.classList.contains("disliked") ? ".disliked" : ".liked";
    const next = here + step;
    (next < 0 ? find("search") : rows[Math.min(next, rows.length - 1)]?.querySelector(name))?.focus();
  }
  event.preventDefault();
}

// The comparison

async function compare() {
  const missing = findMissing(state);
  if (missing) {
    showError(missing, false);
    find("user").focus();
    return;
  }
  asking?.abort();
  const own = (asking = new AbortController());
  const end = showWaiting(own);
  try {
    const body = JSON.stringify(buildRequest(state));
    const headers = {"Content-Type": "application/json"};
    const answer = await askService("compare", {method: "POST", headers, body, signal: own.signal});
    Object.assign(state, {answer, selected: null, showsAll: false});
    end();
    showAnswer();
  } catch (error) {
    if (asking !== own) return; // a later request has taken over
    end();
    if (error.name === "AbortError") showState("Cancelled.");
    else showError(error.message, true);
  }
}

/** Show that a request is in progress; returns a function that ends it. */
function showWaiting(controller) {
  find("alert").replaceChildren();
  find("result").setAttribute("aria-busy", "true");
  find("ask").disabled = true;
  find("announce").textContent = "";
  showState("Ranking\u2026");
  const started = performance.now();
  const clock = make("span", {className: "clock", "aria-hidden": "true"});
  const cancel = make("button", {type: "button", className: "plain-button"}, "Cancel");
  cancel.addEventListener("click", () => controller.abort());
  const slow = setTimeout(() => {
    const text = `The language model is reading ${state.count} candidates. On a CPU this takes a while. `;
    find("state").replaceChildren(make("p", {className: "notice"}, text, clock), cancel);
  }, SLOW_MS);
  const ticking = setInterval(() => {
    clock.textContent = `${Math.round((performance.now() - started) / 1000)} s`;
  }, 500);
  return () => {
    clearTimeout(slow);
    clearInterval(ticking);
    if (asking !== controller) return;
    find("result").setAttribute("aria-busy", "false");
    find("ask").disabled = false;
    showState();
  };
}

function showState(...texts) {
  find("state").replaceChildren(...texts.map((text) => make("p", {className: "notice"}, text)));
}

function showError(text, canRetry) {
  const retry = make("button", {type: "button", className: "plain-button"}, "Try again");
  retry.addEventListener("click", compare);
  find("alert").replaceChildren(make("p", {className: "notice error"}, text), ...(canRetry ? [retry] : []));
}

function showAnswer() {
  const {items, warnings} = state.answer;
  showState(...warnings, ...(items.length > 0 ? [] : ["No candidates are left: this user has seen every item that is available."]));
  showAbout();
  showLists();
  find("announce").textContent = `${items.length} items ranked`;
}

function showAbout() {
  const {items, history, disliked} = state.answer;
  const parts = [];
  const list = (name, values) => {
    if (values.length === 0) return;
    const shown = values.slice(-8).reverse();
    const rest = values.length > shown.length ? ` and ${values.length - shown.length} more` : "";
    const titles = shown.flatMap((item, index) => [index > 0 ? " \u00b7 " : "", makeTitle(item)]);
    parts.push(make("p", {className: "profile"}, make("b", {}, `${name}: `), ...titles, rest));
  };
  list("Likes, the latest first", history);
  list("Dislikes", disliked);
  const summary = summarize(items, FIRST);
  if (summary) parts.push(makeSummary(summary));
  find("about").hidden = parts.length === 0;
  find("about").replaceChildren(...parts);
}

function makeSummary({base, among, kept, up, down}) {
  const text = `Of the first ${among} by ${base}, ${kept} stay among the first ${among} by the language model.`;
  const rows = [...up, ...down].map(({item, from, to}) => {
    const arrow = make("span", {className: from > to ? "move up" : "move down", "aria-hidden": "true"}, from > to ? "\u25b2" : "\u25bc");
    return make("li", {}, arrow, " ", makeTitle(item), make("span", {className: "muted"}, ` ${ordinal(from)} \u2192 ${ordinal(to)}`));
  });
  return make("div", {className: "summary card"}, make("p", {}, text), rows.length > 0 ? make("ul", {}, ...rows) : null);
}

function showLists() {
  const {items} = state.answer;
  find("lists").replaceChildren(...(items.length > 0 ? LISTS.map((list) => makeList(list, items)) : []));
  const all = find("all");
  all.hidden = items.length <= FIRST;
  all.textContent = state.showsAll ? `Show the first ${FIRST}` : `Show all ${items.length}`;
}

function makeList({key, name, unit, missing}, items) {
  const rows = buildRows(key, items);
  const title = `list-${key}`;
  const head = make("header", {}, make("h3", {id: title}, name), make("p", {className: "muted"}, unit));
  const section = make("section", {className: "list card", "aria-labelledby": title}, head);
  if (rows === null) {
    section.append(make("p", {className: "notice"}, missing));
    return section;
  }
  const base = findBase(key, items);
  if (key === "language_model" && items[0].anchor) head.append(makeLegend());
  if (base) head.append(make("p", {className: "muted"}, `\u25b2\u25bc against ${BASE_NAMES[base]}`));
  const range = findRange(rows.flatMap((row) => listBars(key, row.item).map((bar) => bar.value)));
  const shown = state.showsAll ? rows : rows.slice(0, FIRST);
  section.append(make("ol", {}, ...shown.map((row) => makeRow(key, row, base, range, items))));
  return section;
}

const makeLegend = () =>
  make(
    "p",
    {className: "legend"},
    make("i", {className: "swatch anchor", "aria-hidden": "true"}),
    "anchor ",
    make("i", {className: "swatch llm", "aria-hidden": "true"}),
    "language model",
  );

function makeRow(key, {item, rank, score, move}, base, range, items) {
  const moved = describeMove(move);
  const button = make(
    "button",
    {type: "button", className: "row"},
    make("span", {className: "rank"}, `${rank}`),
    makeTitle(item),
    makeMove(move, base, moved),
    make("span", {className: "score"}, formatScore(key, score)),
    makeBars(key, item, range),
  );
  const isSelected = state.selected?.id === item.item_id;
  const isOpen = isSelected && state.selected.key === key;
  button.setAttribute("aria-expanded", String(isOpen));
  button.addEventListener("click", () => select(key, item));
  const row = make("li", {className: isSelected ? "selected" : ""}, button);
  row.dataset.id = item.item_id;
  if (isOpen) {
    const sentences = explain(item, items).map((sentence) => make("p", {}, sentence));
    row.append(make("div", {className: "why"}, make("p", {className: "muted"}, describePlaces(item)), ...sentences));
  }
  return row;
}

function makeMove(move, base, words) {
  if (!base) return null;
  const sign = move > 0 ? "\u25b2" : "\u25bc";
  const symbol = make("span", {"aria-hidden": "true"}, move === 0 ? "\u00b7" : `${sign}${Math.abs(move)}`);
  const kind = move > 0 ? "up" : move < 0 ? "down" : "same";
  return make("span", {className: `move ${kind}`}, symbol, make("span", {className: "hidden"}, words));
}

function makeBars(key, item, range) {
  const bars = listBars(key, item).map(({name, value}) => {
    const {start, length} = measureBar(value, range);
    const bar = make("span", {className: `bar ${name}`});
    bar.style.marginInlineStart = `${start}%`;
    bar.style.width = `${length}%`;
    return bar;
  });
  return make("span", {className: "bars", "aria-hidden": "true"}, ...bars);
}

/** Mark an item in all lists and explain it below the row that was chosen; chosen again, close it. */
function select(key, item) {
  const isOpen = state.selected?.id === item.item_id && state.selected.key === key;
  state.selected = isOpen ? null : {key, id: item.item_id};
  showLists();
  const rows = document.querySelectorAll(`[aria-labelledby="list-${key}"] li`);
  [...rows].find((row) => row.dataset.id === item.item_id)?.querySelector("button").focus({preventScroll: true});
}

// The start

async function showRun() {
  try {
    const health = await askService("healthz");
    const facts = `${health.stage} \u00b7 ${health.items.toLocaleString("en")} items \u00b7 ${health.users.toLocaleString("en")} users`;
    find("run").replaceChildren(make("b", {}, health.run), ` ${facts} \u00b7 model ${health.model}`);
  } catch (error) {
    showError(error.message, false);
  }
}

/** Take limits and an example from the service's description. */
async function readLimits() {
  let limit = 40;
  try {
    const {CompareBody: body} = (await askService("openapi.json")).components.schemas;
    limit = body.properties.num_retrieved.maximum ?? limit;
    const example = body.examples.find((one) => one.user !== undefined);
    if (example) find("user").placeholder = `for example ${example.user}`;
  } catch {
    // the page works without them
  }
  const counts = listCounts(limit);
  find("count").replaceChildren(...counts.map((count) => make("option", {value: `${count}`}, `${count}`)));
  state.count = counts.includes(20) ? 20 : counts[counts.length - 1];
  find("count").value = `${state.count}`;
}

function setMode(mode) {
  state.mode = mode;
  find("new-user").hidden = mode !== "new";
  find("known-user").hidden = mode !== "known";
}

function start() {
  let delay;
  find("search").addEventListener("input", () => {
    clearTimeout(delay);
    delay = setTimeout(search, SEARCH_DELAY_MS);
  });
  for (const id of ["search", "results"]) find(id).addEventListener("keydown", moveFocus);
  for (const radio of document.querySelectorAll("[name=mode]")) {
    radio.addEventListener("change", () => setMode(radio.value));
    if (radio.checked) setMode(radio.value); // a browser may restore it
  }
  find("user").addEventListener("input", (event) => (state.user = event.target.value));
  find("count").addEventListener("change", (event) => (state.count = Number(event.target.value)));
  find("all").addEventListener("click", () => {
    state.showsAll = !state.showsAll;
    showLists();
  });
  find("who").addEventListener("submit", (event) => {
    event.preventDefault();
    compare();
  });
  find("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    token = find("token").value.trim();
    find("token-form").hidden = true;
    find("alert").replaceChildren();
    load();
    find("search").focus();
  });
  showRun();
  load();
}

/** Load what needs a token, if the service demands one. */
function load() {
  readLimits();
  search();
}

start();
