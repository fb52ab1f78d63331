"use strict";
/* The explorer: reads the columns in the page, filters them, shows them. Captions and all other cells are hostile
   text: they only ever become text nodes (`make` appends strings as text), never markup, addresses or style.
   All state is in the address after the #, so that a view can be sent to others. */

// --- what all parts use

const $ = (id) => document.getElementById(id);
const NONE = "(none)", NO_TILE = -1, OFF_MAP = 65535, OTHERS = 11;
const whole = (n) => Math.round(n).toLocaleString("en");
const words = (name) => name.replaceAll("_", " ");

function make(tag, attributes, ...children) {
  const svg = tag.startsWith("svg:");
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child != null));
  return node;
}

function number(value) {
  const size = Math.abs(value);
  if (Number.isInteger(value)) return size < 10000 ? String(value) : whole(value);
  return size >= 10000 ? whole(value) : size && size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));
}

// --- data

let D, columns, texts, fails, failedBy, order = [], state, view = null, recordShown = null;

async function unpack() {
  const packed = atob($("data").textContent), bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  $("data").remove();
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const size = new DataView(buffer).getUint32(0, true), start = 4 + size;
  const kinds = { float32: Float32Array, float64: Float64Array, uint8: Uint8Array, uint16: Uint16Array, int32: Int32Array };
  D = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  const array = ({ type, at, length }) => new kinds[type](buffer, start + at, length);
  columns = new Map(D.columns.map((column) => [column.name, column]));
  for (const column of D.columns) {
    if (column.kind !== "text") column.data = array(D.arrays[column.name]);
    if (column.kind === "facet") column.values.push(NONE);
  }
  for (const name of ["tile", "tile_width", "tile_height", "twin", "weight"]) D[name] = array(D.arrays["#" + name]);
  for (const map of D.maps) map.points = array(D.arrays["#map " + map.name]);
  D.kept = columns.get("reason").values.indexOf("kept");
  D.sampled = D.shown < D.rows;
  D.place = new Map(columns.get("uid").texts.map((uid, i) => [uid, i]));
  // What a rule measured or missed is no column of its own: it is in the column that the rule judges.
  const sources = ["select", "explorer", "annotate", "download"];
  const bySource = (a, b) => sources.indexOf(a.source) - sources.indexOf(b.source);
  D.ranges = D.columns.filter((column) => column.kind === "number" && column.source !== "select" && bins(column));
  D.ranges.sort((a, b) => !!D.thresholds[b.name] - !!D.thresholds[a.name] || bySource(a, b));
  D.facets = D.columns.filter((column) => column.kind === "facet" && column.values.length > 2).sort(bySource);
  fails = new Uint8Array(D.shown); failedBy = new Uint8Array(D.shown);
}

function cell(column, i) {
  if (column.kind === "text") return column.texts[i];
  const value = column.data[i];
  if (column.kind === "facet") return value === column.values.length - 1 ? null : column.values[value];
  return Number.isNaN(value) ? null : value;
}
const value = (name, i) => (columns.has(name) ? cell(columns.get(name), i) : null);
const printed = (name, i) => { const found = value(name, i); return typeof found === "number" ? number(found) : found; };
const isKept = (i) => columns.get("reason").data[i] === D.kept;

// Up to 48 bins over all but the outermost half percents, which go into the bins at the ends; null: there is no range.
function bins(column) {
  if (column.bins !== undefined) return column.bins;
  const sorted = column.data.filter((v) => !Number.isNaN(v)).sort(), last = sorted.length - 1;
  if (last < 1 || sorted[0] === sorted[last]) return (column.bins = null);
  const marks = (D.thresholds[column.name] || []).map((mark) => mark.at);
  let low = Math.min(sorted[Math.floor(last * 0.005)], ...marks), high = Math.max(sorted[Math.ceil(last * 0.995)], ...marks);
  if (low === high) [low, high] = [sorted[0], sorted[last]];
  const steps = column.whole && high - low < 48 ? high - low + 1 : 48;
  if (steps < 48) [low, high] = [low - 0.5, high + 0.5];
  const of = new Uint8Array(D.shown).fill(255), all = new Float64Array(steps);
  column.data.forEach((v, i) => {
    if (Number.isNaN(v)) return;
    of[i] = Math.max(0, Math.min(steps - 1, Math.floor((v - low) / (high - low) * steps)));
    all[of[i]] += D.weight[i];
  });
  return (column.bins = { low, high, steps, of, all, least: sorted[0], most: sorted[last] });
}

// --- state

const RESERVED = ["view", "q", "sort", "color", "uid", "size", "map"];
const VIEWS = { overview, wall, duplicates, map };
const key = (name) => (RESERVED.includes(name) ? "." + name : name);

function readState() {
  const params = new URLSearchParams(location.hash.slice(1)), filters = new Map();
  for (const column of D.columns) {
    const found = params.getAll(key(column.name));
    if (!found.length) continue;
    if (column.kind === "facet") filters.set(column.name, { values: new Set(found) });
    const range = /^(-?[\d.e+-]*?)\.\.(-?[\d.e+-]*)$/.exec(found[0]);
    if (column.kind === "number" && range) {
      filters.set(column.name, { low: range[1] === "" ? -Infinity : +range[1], high: range[2] === "" ? Infinity : +range[2] });
    }
  }
  const text = (name, fallback) => params.get(name) || fallback;
  const asked = filters.size || params.has("q") || params.has("uid");
  return {
    view: text("view", "") in VIEWS ? params.get("view") : asked ? "wall" : "overview", q: text("q", ""), filters,
    sort: text("sort", ""), uid: text("uid", ""), size: text("size", "1"), map: text("map", ""), color: text("color", "reason"),
  };
}

function address(changed) {
  const next = { ...state, ...changed }, params = new URLSearchParams();
  for (const name of RESERVED) if (next[name] && !(name === "size" && next.size === "1")) params.append(name, next[name]);
  for (const [name, { values, low, high }] of next.filters) {
    if (values) values.forEach((text) => params.append(key(name), text));
    else params.append(key(name), `${low === -Infinity ? "" : low}..${high === Infinity ? "" : high}`);
  }
  return "#" + params;
}

function go(changed, step = "uid" in changed || "view" in changed) {
  history[step ? "pushState" : "replaceState"](null, "", address(changed));
  Object.assign(state, changed);
  render();
}

function filter(name, wanted) {
  const filters = new Map(state.filters);
  if (wanted) filters.set(name, wanted); else filters.delete(name);
  go({ filters });
}

function toggle(name, text) {
  const values = new Set(state.filters.get(name)?.values);
  if (!values.delete(text)) values.add(text);
  filter(name, values.size ? { values } : null);
}

// --- filtering: how many filters each row fails and the last of them, so that a column can count without its own

const SEARCH = 255;
let numbers = new Map();

function search(i) {
  texts ??= D.columns.filter((column) => column.kind === "text").map((column) => column.texts);
  D.haystack ??= Array.from({ length: D.shown }, (_, k) => texts.map((column) => column[k] ?? "").join("\n").toLowerCase());
  return D.haystack[i];
}

function refilter() {
  fails.fill(0); numbers = new Map();
  for (const [name, wanted] of state.filters) {
    const column = columns.get(name), id = numbers.size + 1, { low, high } = wanted;
    const codes = wanted.values && column.values.map((text) => wanted.values.has(text));
    numbers.set(name, id);
    for (let i = 0; i < D.shown; i++) {
      const v = column.data[i];
      if (!(codes ? codes[v] : v >= low && v <= high)) { fails[i]++; failedBy[i] = id; }
    }
  }
  const terms = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  for (let i = 0; terms.length && i < D.shown; i++) {
    if (!terms.every((term) => search(i).includes(term))) { fails[i]++; failedBy[i] = SEARCH; }
  }
  order = [];
  for (let i = 0; i < D.shown; i++) if (!fails[i]) order.push(i);
  const name = state.sort.replace(/^-/, ""), column = columns.get(name), sign = state.sort.startsWith("-") ? -1 : 1;
  if (column) order.sort((a, b) => {
    const [x, y] = [cell(column, a), cell(column, b)];
    return x === null || y === null ? (x === null) - (y === null) : sign * (x < y ? -1 : x > y ? 1 : 0) || a - b;
  });
}
const counted = (i, name) => fails[i] === 0 || (fails[i] === 1 && failedBy[i] === numbers.get(name));

// --- filters at the side

let updates = [];

function buildFilters() {
  const box = make("input", { type: "search", id: "search", placeholder: "Search captions and text", "aria-label": "Search text",
    oninput: () => go({ q: box.value }) });
  const status = make("p", { id: "status", role: "status" });
  const clear = make("button", { class: "plain", onclick: () => go({ filters: new Map(), q: "" }) }, "Clear all");
  updates = [() => {
    if (box.value !== state.q) box.value = state.q;
    status.replaceChildren(make("b", {}, whole(order.length)), ` of ${whole(D.shown)}`);
    clear.hidden = !state.filters.size && !state.q;
  }];
  $("filters").replaceChildren(make("div", { class: "top" }, box, make("div", { class: "line" }, status, clear)),
    ...D.facets.map(facet), make("h2", {}, "Ranges"), ...D.ranges.map(range));
}

function facet(column) {
  const shownFirst = 8, buttons = column.values.map((text, code) => {
    const counter = make("span", { class: "n" }), bar = make("span", { class: "bar" });
    const button = make("button", { class: "value", onclick: () => toggle(column.name, text) }, bar,
      make("span", { class: "name" }, text), counter);
    return { text, code, button, counter, bar };
  });
  const list = make("div", { class: "values" }), flip = () => { list.classList.toggle("all"); update(); };
  const more = make("button", { class: "plain more", onclick: flip });
  function update() {
    const counts = new Float64Array(column.values.length), wanted = state.filters.get(column.name)?.values;
    for (let i = 0; i < D.shown; i++) if (counted(i, column.name)) counts[column.data[i]]++;
    const top = Math.max(1, ...counts), isNone = (code) => code === column.values.length - 1;
    const present = buttons.filter(({ code, text }) => !isNone(code) || counts[code] || wanted?.has(text));
    for (const { code, button, counter, bar, text } of buttons) {
      counter.textContent = whole(counts[code]);
      bar.style.width = `${100 * counts[code] / top}%`;
      button.setAttribute("aria-pressed", String(!!wanted?.has(text)));
      button.classList.toggle("zero", !counts[code]);
      if (column.name === "reason") button.classList.toggle("keep", code === D.kept);
    }
    const all = list.classList.contains("all");
    more.hidden = present.length <= shownFirst;
    more.textContent = all ? "fewer" : `${present.length - shownFirst} more`;
    const held = list.contains(document.activeElement) && document.activeElement;
    const listed = present.filter(({ text }, k) => all || k < shownFirst || wanted?.has(text));
    list.replaceChildren(...listed.map(({ button }) => button));
    if (held) held.focus();
  }
  updates.push(update);
  return make("details", { open: ["reason", "language"].includes(column.name) || column.source === "explorer" },
    make("summary", {}, words(column.name)), list, more);
}

function range(column) {
  const chart = histogram(column, 248, 74), { least, most } = bins(column);
  const typed = () => setRange(column, low.value === "" ? -Infinity : +low.value, high.value === "" ? Infinity : +high.value);
  const input = (side, edge) => make("input", { type: "number", step: "any", placeholder: number(edge), onchange: typed,
    "aria-label": `${side} ${words(column.name)}` });
  const low = input("least", least), high = input("most", most), said = make("span", { class: "n" });
  const box = make("details", { ontoggle: () => chart.update() }, make("summary", {}, words(column.name), said), chart.node,
    make("div", { class: "line" }, low, make("span", {}, "to"), high));
  updates.push(() => {
    const wanted = state.filters.get(column.name), end = (edge) => (Number.isFinite(edge) ? number(edge) : "");
    said.textContent = wanted ? `${end(wanted.low)} … ${end(wanted.high)}` : "";
    low.value = wanted && Number.isFinite(wanted.low) ? wanted.low : "";
    high.value = wanted && Number.isFinite(wanted.high) ? wanted.high : "";
    if (wanted) box.open = true;
    if (box.open) chart.update();
  });
  return box;
}

function setRange(column, low, high) {
  filter(column.name, low === -Infinity && high === Infinity ? null : { low, high });
}

// --- histograms: kept and dropped rows that match, to their own scale before that of all rows; drag to filter, click to stop

function histogram(column, width, height) {
  const { low, high, steps, of, all, least, most } = bins(column), base = height - 16, step = width / steps;
  const x = (v) => Math.max(0, Math.min(width, (v - low) / (high - low) * width));
  const [ghost, keep, drop] = ["ghost", "keep", "drop"].map((kind) => make("svg:path", { class: kind }));
  const brush = make("svg:rect", { class: "brush", y: 0, height: base, width: 0 });
  const svg = make("svg:svg", { class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `histogram of ${words(column.name)}` },
    ghost, drop, keep, make("svg:line", { class: "axis", x1: 0, x2: width, y1: base, y2: base }), brush);
  const ends = [[0, "start", (least < low ? "≤ " : "") + number(column.whole && steps < 48 ? low + 0.5 : low)],
    [width, "end", (most > high ? "≥ " : "") + number(column.whole && steps < 48 ? high - 0.5 : high)]];
  for (const [at, anchor, text] of ends) svg.append(make("svg:text", { x: at, y: height - 3, "text-anchor": anchor }, text));
  (D.thresholds[column.name] || []).forEach(({ rule, at }, k) => {
    const left = x(at) > width / 2, y = 10 + 12 * k;
    svg.append(make("svg:line", { class: "threshold", x1: x(at), x2: x(at), y1: 0, y2: base }),
      make("svg:text", { class: "threshold", x: x(at) + (left ? -4 : 4), y, "text-anchor": left ? "end" : "start" },
        `${words(rule)} ${number(at)}`));
  });
  const path = (heights, floors, top) => Array.from(heights, (h, b) => {
    if (!h) return "";
    const y = base - (floors ? floors[b] : 0) / top * (base - 4), tall = Math.max(1, h / top * (base - 4));
    const [left, up, across] = [b * step + 0.5, tall, Math.max(0.5, step - 1)].map((v) => v.toFixed(2));
    return `M${left} ${y.toFixed(2)}v-${up}h${across}v${up}z`;
  }).join("");
  ghost.setAttribute("d", path(all, null, Math.max(...all)));
  let from = null;
  const at = (event) => {
    const box = svg.getBoundingClientRect();
    return Math.max(0, Math.min(1, (event.clientX - box.left) / box.width)) * (high - low) + low;
  };
  const tidy = (v) => (column.whole ? Math.round(v) : +v.toPrecision(4));
  svg.addEventListener("pointerdown", (event) => { from = at(event); svg.setPointerCapture(event.pointerId); });
  svg.addEventListener("pointermove", (event) => {
    if (from === null) return;
    const edges = [from, at(event)].sort((a, b) => a - b);
    brush.setAttribute("x", x(edges[0])); brush.setAttribute("width", x(edges[1]) - x(edges[0]));
  });
  svg.addEventListener("pointercancel", () => { from = null; update(); });
  svg.addEventListener("pointerup", (event) => {
    const edges = [from ?? low, at(event)].sort((a, b) => a - b);
    from = null;
    if (x(edges[1]) - x(edges[0]) < 3) filter(column.name, null);
    else setRange(column, x(edges[0]) <= 0 ? -Infinity : tidy(edges[0]), x(edges[1]) >= width ? Infinity : tidy(edges[1]));
  });
  function update() {
    const kept = new Float64Array(steps), dropped = new Float64Array(steps), wanted = state.filters.get(column.name);
    for (let i = 0; i < D.shown; i++) {
      if (of[i] !== 255 && counted(i, column.name)) (isKept(i) ? kept : dropped)[of[i]] += D.weight[i];
    }
    const top = Math.max(...kept.map((h, b) => h + dropped[b])) || 1;
    keep.setAttribute("d", path(kept, null, top)); drop.setAttribute("d", path(dropped, kept, top));
    brush.setAttribute("x", wanted ? x(wanted.low) : 0);
    brush.setAttribute("width", wanted ? Math.max(1, x(wanted.high) - x(wanted.low)) : 0);
  }
  return { node: svg, update };
}

// --- cards, and lists of which only the rows in sight exist

function picture(i, scale) {
  if (i < 0) return make("span", { class: "thumb none" }, "not in these pools");
  if (D.tile[i] === NO_TILE) return make("span", { class: "thumb none" }, "no picture");
  const node = make("span", { class: "thumb", role: "img", "aria-label": "picture" });
  const sheet = D.tile[i] >> 8, place = D.tile[i] & 255, px = (v) => `${v * scale}px`, side = D.tile_side;
  node.style.width = px(D.tile_width[i]); node.style.height = px(D.tile_height[i]);
  node.style.backgroundImage = `url("${D.pictures}/${String(sheet).padStart(4, "0")}.jpg")`;
  node.style.backgroundPosition = `${px(-(place % 16) * side)} ${px(-(place >> 4) * side)}`;
  node.style.backgroundSize = `${px(16 * side)} auto`;
  return node;
}

function card(i, scale, note) {
  const frame = make("span", { class: "frame" }, picture(i, scale));
  frame.style.height = `${D.tile_side * scale}px`;
  const uid = value("uid", i), open = () => go({ uid }), chosen = String(uid === state.uid);
  return make("button", { class: `card ${isKept(i) ? "kept" : "dropped"}`, "data-row": i, "aria-current": chosen, onclick: open },
    frame, make("span", { class: "caption" }, value("caption", i) || "no caption"),
    make("span", { class: "foot" }, make("span", { class: "why" }, value("reason", i)), note));
}

function list(host, draw) {
  const sizer = make("div", { class: "sizer" }), rows = new Map();
  let total = 0, tall = 1;
  function paint() {
    const first = Math.max(0, Math.floor(host.scrollTop / tall) - 2);
    const last = Math.min(total, Math.ceil((host.scrollTop + host.clientHeight) / tall) + 2);
    for (const [k, node] of rows) if (k < first || k >= last) { node.remove(); rows.delete(k); }
    for (let k = last - 1; k >= first; k--) {
      if (rows.has(k)) continue;
      const node = draw(k);
      node.style.transform = `translateY(${k * tall}px)`;
      sizer.insertBefore(node, rows.get(k + 1) || null);
      rows.set(k, node);
    }
  }
  host.append(sizer);
  host.addEventListener("scroll", paint);
  return (count, height, empty) => {
    [total, tall] = [count, height];
    sizer.style.height = `${count * height}px`;
    rows.clear();
    sizer.replaceChildren(...(count ? [] : [empty()]));
    paint();
  };
}

function select(label, name, options, current) {
  const option = ([id, text]) => make("option", { value: id, selected: id === current }, text);
  const box = make("select", { onchange: () => go({ [name]: box.value }) }, options.map(option));
  return make("label", {}, label, box);
}

const plain = (text, label, act) => make("button", { class: "plain", "aria-label": label, title: label, onclick: act }, text);
const nothing = () => make("div", { class: "empty" }, make("p", {}, "No sample matches these filters."),
  make("button", { class: "plain", onclick: () => go({ filters: new Map(), q: "" }) }, "Clear all"));
