// What the page says: requests, lists, moves, shares and sentences. No access to the document, so that any engine runs it.

export const LISTS = [
  {key: "popularity", name: "Popularity", unit: "likes in the log", missing: ""},
  {
    key: "collaborative",
    name: "Collaborative model",
    unit: "who liked what; logit of a like",
    missing: "This run has no collaborative model that orders items.",
  },
  {key: "language_model", name: "Language model", unit: "titles and who liked what; logit of a like", missing: ""},
];

/** Return the body of POST compare. */
export function buildRequest(state) {
  const body = {num_retrieved: state.count};
  if (state.mode === "known") return {...body, user: state.user.trim()};
  return {...body, history: state.liked.map((item) => item.item_id), disliked: state.disliked.map((item) => item.item_id)};
}

/** Return what is missing for a request, or "". */
export function findMissing(state) {
  return state.mode === "known" && !state.user.trim() ? "Give the id of a user of the log." : "";
}

/** Return the ranking that a list is compared with: the anchor or the nearest simpler ranking; null for the simplest. */
export function findBase(key, items) {
  const simpler = {popularity: [], collaborative: ["popularity"], language_model: ["anchor", "collaborative", "popularity"]};
  return simpler[key].find((base) => items.length > 0 && items[0][base]) ?? null;
}

export const BASE_NAMES = {anchor: "the anchor", collaborative: "the collaborative model", popularity: "popularity"};

/** Return the rows of a list, best first; null if the run has no such ranking. */
export function buildRows(key, items) {
  if (items.length > 0 && !items[0][key]) return null;
  const base = findBase(key, items);
  return items
    .map((item) => ({item, ...item[key], move: base ? item[base].rank - item[key].rank : 0}))
    .sort((one, other) => one.rank - other.rank);
}

/** Return the interval that bars of some values share; it contains 0. */
export function findRange(values) {
  const low = Math.min(0, ...values);
  const high = Math.max(0, ...values);
  return {low, width: high - low || 1};
}

/** Return start and length of a bar from 0 to a value, in percent of the range. */
export function measureBar(value, range) {
  const start = (100 * (Math.min(0, value) - range.low)) / range.width;
  return {start, length: (100 * Math.abs(value)) / range.width};
}

/** Return the bars of an item in a list: name and value of each. */
export function listBars(key, item) {
  if (key !== "language_model") return [{name: key, value: item[key].score}];
  if (!item.anchor) return [{name: "llm", value: item.llm}];
  return [{name: "anchor", value: item.anchor.score}, {name: "llm", value: item.llm}];
}

export function formatScore(key, value) {
  return key === "popularity" ? value.toLocaleString("en") : formatLogit(value);
}

/** Return a logit with its sign, with three decimals, or more digits if it is small. */
export function formatLogit(value) {
  const size = Math.abs(value);
  const digits = size === 0 || size >= 0.0005 ? size.toFixed(3) : size.toExponential(1);
  return (value < 0 ? "\u2212" : "+") + digits;
}

export function describeMove(move) {
  if (move === 0) return "";
  return `${move > 0 ? "up" : "down"} ${Math.abs(move)} ${Math.abs(move) === 1 ? "place" : "places"}`;
}

export function ordinal(number) {
  const ending = {1: "st", 2: "nd", 3: "rd"}[number % 10];
  return number + (ending && ![11, 12, 13].includes(number % 100) ? ending : "th");
}

/** Return the sentences that explain an item's place in the language model's ranking. */
export function explain(item, items) {
  const total = items.length;
  const place = item.language_model.rank;
  const base = findBase("language_model", items);
  const move = item[base].rank - place;
  const sentences = [];
  if (item.anchor) {
    sentences.push(
      `${formatLogit(item.language_model.score)} = anchor ${formatLogit(item.anchor.score)}, ` +
        `language model ${formatLogit(item.llm)}, bias ${formatLogit(item.bias)} (the same for all).`,
    );
    const share = 1 + items.filter((other) => other.llm > item.llm).length;
    sentences.push(`The language model's share is the ${ordinal(share)} largest of ${total}.`);
  } else {
    sentences.push(`${formatLogit(item.language_model.score)}, by the language model alone: the run has no anchor.`);
  }
  const change = move === 0 ? "the same place as by" : `${describeMove(move)} from`;
  sentences.push(
    `${ordinal(place)} of ${total}, ${change} ${BASE_NAMES[base]}${move === 0 ? "" : ` (${ordinal(item[base].rank)})`}.`,
  );
  return sentences;
}

/** Return where an item stands in every ranking, in words. */
export function describePlaces(item) {
  const names = {popularity: "popularity", collaborative: "collaborative", anchor: "anchor", language_model: "language model"};
  return Object.entries(names)
    .filter(([key]) => item[key])
    .map(([key, name]) => `${name} ${ordinal(item[key].rank)}`)
    .join(" · ");
}

/** Return the largest moves by the language model among its and the base's first places. */
export function summarize(items, first) {
  const base = findBase("language_model", items);
  if (!base || items.length < 2) return null;
  const among = Math.min(first, items.length);
  const moves = items
    .filter((item) => item.language_model.rank <= among || item[base].rank <= among)
    .map((item) => ({item, from: item[base].rank, to: item.language_model.rank}));
  const kept = moves.filter((move) => move.from <= among && move.to <= among).length;
  const size = (move) => move.from - move.to;
  const up = moves.filter((move) => size(move) > 0).sort((one, other) => size(other) - size(one));
  const down = moves.filter((move) => size(move) < 0).sort((one, other) => size(one) - size(other));
  return {base: BASE_NAMES[base], among, kept, up: up.slice(0, 3), down: down.slice(0, 3)};
}

/** Return the message of a failed answer: the service's own, if it has one. */
export function readError(status, text) {
  try {
    const detail = JSON.parse(text).detail;
    if (typeof detail === "string" && detail) return detail;
  } catch {
    // not JSON: a proxy, or Ray Serve itself
  }
  if (status === 503) return "The service is starting, stopping or overloaded.";
  if (status === 404) return "The service does not know this address; it may be starting or stopping.";
  return `The service answered with status ${status}.`;
}

/** Return the choices for the number of candidates, up to the service's limit. */
export function listCounts(limit) {
  const counts = [10, 20, 40, 100, 200].filter((count) => count <= limit);
  return counts.length > 0 ? counts : [limit];
}
