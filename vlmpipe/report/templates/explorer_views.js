"use strict";
/* The explorer's views, after explorer.js in the same script: overview, wall, duplicates, a sample's record. */

// --- views: each builds itself into a host and returns what brings it up to date

const sizes = (current) => select("Size", "size", [["1", "small"], ["1.5", "medium"], ["2", "large"]], current);

function wall(host) {
  const scroller = make("div", { class: "scroller" }), bar = make("div", { class: "bar-top" });
  const sortable = D.columns.filter((column) => column.kind === "number" || column.name === "caption");
  const both = ({ name }) => [[name, `${words(name)} ↑`], [`-${name}`, `${words(name)} ↓`]];
  const by = [["", "reason"], ...sortable.flatMap(both)];
  let across = 1, height = 1;
  const note = (i) => {
    const sorted = state.sort.replace(/^-/, "");
    return sorted && sorted !== "caption" ? printed(sorted, i) ?? "–" : printed("value", i);
  };
  const row = (k) => {
    const here = order.slice(k * across, (k + 1) * across);
    const node = make("div", { class: "row" }, here.map((i) => card(i, +state.size, note(i))));
    node.style.gridTemplateColumns = `repeat(${across}, minmax(0, 1fr))`;
    return node;
  };
  const show = list(scroller, row);
  host.append(bar, scroller);
  let before = "";
  view.move = (steps) => {
    const at = order.indexOf(+(document.activeElement.dataset?.row ?? -1));
    const by = { row: across, "-row": -across }[steps] ?? steps, to = Math.max(0, Math.min(order.length - 1, at + by));
    const top = Math.floor(to / across) * height, lowest = top + height - scroller.clientHeight;
    scroller.scrollTop = Math.max(Math.min(scroller.scrollTop, top), lowest);
    scroller.dispatchEvent(new Event("scroll"));
    scroller.querySelector(`[data-row="${order[to]}"]`)?.focus();
  };
  return () => {
    bar.replaceChildren(select("Sort by", "sort", by, state.sort), sizes(state.size));
    const now = address({ uid: "", view: "" });
    const chosen = order.indexOf(D.place.get(state.uid));
    across = Math.max(1, Math.floor((scroller.clientWidth - 16) / (D.tile_side * +state.size + 30)));
    height = D.tile_side * +state.size + 88;
    show(Math.ceil(order.length / across), height, nothing);
    if (now !== before) scroller.scrollTop = chosen < 0 ? 0 : Math.max(0, (Math.floor(chosen / across) - 1) * height);
    before = now;
  };
}

function duplicates(host) {
  const groups = new Map(), scroller = make("div", { class: "scroller" }), bar = make("div", { class: "bar-top" });
  for (let i = 0; i < D.shown; i++) {
    const other = value("other_uid", i);
    if (!other) continue;
    if (!groups.has(other)) groups.set(other, []);
    groups.get(other).push(i);
  }
  let shown = [], fresh = true;
  const note = (i) => (value("threshold", i) ? `${printed("value", i) ?? "–"} / ${printed("threshold", i)}` : null);
  function group([other, copies]) {
    const twin = D.twin[copies[0]], scale = +state.size;
    const outside = () => make("div", { class: "card" }, make("span", { class: "frame" }, picture(-1, 1)),
      make("span", { class: "caption" }, `evaluation picture ${other}`));
    const title = twin < 0 ? "held out" : isKept(twin) ? "kept" : "won, dropped later";
    const strip = make("div", { class: "strip" }, copies.map((i) => card(i, scale, note(i))));
    const node = make("div", { class: "group" },
      make("div", { class: "side" }, make("h3", {}, title), twin < 0 ? outside() : card(twin, scale)),
      make("div", { class: "side copies" }, make("h3", {}, `${copies.length} dropped`), strip));
    node.style.setProperty("--card", `${D.tile_side * scale + 36}px`);
    return node;
  }
  const show = list(scroller, (k) => make("div", { class: "row groups" }, shown[k].map(group)));
  host.append(bar, scroller);
  return () => {
    const passes = ([, copies]) => [...copies, D.twin[copies[0]]].some((i) => fails[i] === 0);
    const found = [...groups].filter(passes).sort((a, b) => b[1].length - a[1].length || a[1][0] - b[1][0]);
    const said = make("p", {}, make("b", {}, whole(found.length)), " groups: what stays, and what was dropped for it");
    bar.replaceChildren(said, sizes(state.size));
    shown = packed(found, scroller.clientWidth - 16);
    const none = () => make("p", { class: "empty" }, "No rule dropped a sample for another.");
    const height = D.tile_side * +state.size + 128, chosen = D.place.get(state.uid);
    show(shown.length, height, groups.size ? nothing : none);
    const holds = ([, copies]) => copies.includes(chosen) || D.twin[copies[0]] === chosen;
    if (fresh && chosen !== undefined) scroller.scrollTop = shown.findIndex((row) => row.some(holds)) * height;
    fresh = false;
  };
}

// Groups in rows of a width: small ones share a row.
function packed(groups, width) {
  const rows = [];
  let left = 0;
  for (const entry of groups) {
    const wide = (1 + entry[1].length) * (D.tile_side * +state.size + 44) + 32;
    if (!rows.length || wide > left) { rows.push([]); left = width; }
    rows.at(-1).push(entry);
    left -= wide;
  }
  return rows;
}

function overview(host) {
  const scroller = make("div", { class: "scroller page" }), funnel = make("div", { class: "funnel" });
  const charts = D.ranges.map((column) => ({ column, ...histogram(column, 300, 120) }));
  const figure = ({ column, node }) =>
    make("figure", { title: `from ${column.source}` }, make("figcaption", {}, words(column.name)), node);
  const kept = D.reasons.kept?.rows ?? 0, share = (100 * kept / D.rows).toFixed(1);
  const title = make("h2", {}, "Funnel ",
    make("span", { class: "soft" }, `${whole(kept)} of ${whole(D.rows)} rows kept, ${share}%`));
  const key = (kind, text) => make("span", { class: `key ${kind}` }, text);
  const said = make("p", { class: "note" }, key("keep", "kept"), key("drop", "dropped"), key("ghost", "all, to its own scale"),
    `Drag over a chart to filter by it, click to stop. ${D.sampled ? `Weighted to all ${whole(D.rows)} rows. ` : ""}`,
    "Dashed: where a rule cuts.");
  scroller.append(make("section", {}, title, funnel),
    make("section", {}, make("h2", {}, "Numbers"), said, make("div", { class: "grid" }, charts.map(figure))));
  host.append(scroller);
  return () => {
    funnel.replaceChildren(drawFunnel(funnel.clientWidth || 600));
    for (const { update } of charts) update();
  };
}

// A bar a rule, as wide as what came in, in the colours of what stays and what goes; narrow: labels above the bars.
function drawFunnel(width) {
  const narrow = width < 620, high = narrow ? 50 : 34, left = narrow ? 0 : 170, span = width - left - (narrow ? 0 : 190);
  const steps = [{ reason: "pool", rows_out: D.rows, dropped: 0 }, ...D.steps], middle = left + span / 2;
  const svg = make("svg:svg", { class: "chart", viewBox: `0 0 ${width} ${high * steps.length}`, width, role: "group",
    "aria-label": "funnel" });
  steps.forEach((step, k) => {
    const { reason, rows_out: out, dropped } = step, y = k * high + (narrow ? 20 : 3), line = narrow ? y - 5 : y + 19;
    const bar = (kind, rows) => make("svg:rect", { class: kind, x: middle - rows / D.rows * span / 2, y,
      width: rows / D.rows * span, height: narrow ? 24 : 28 });
    const text = (x, kind, said, anchor = "end") =>
      make("svg:text", { x, y: line, "text-anchor": anchor, class: kind }, said);
    const share = dropped ? `${(100 * dropped / (out + dropped)).toFixed(1)}%` : "";
    const parts = [make("svg:title", {}, k ? about(step) : "all rows"),
      make("svg:rect", { class: "hit", x: 0, y: k * high, width, height: high }), bar("drop", out + dropped), bar("keep", out),
      text(0, "", words(reason), "start"), text(width - 108, "out", whole(out)),
      text(width - 52, dropped ? "lost" : "soft", k ? `−${whole(dropped)}` : ""), text(width, "soft", k ? share : "rows")];
    const reasons = Object.keys(D.reasons).filter((name) => D.reasons[name].step === reason);
    const filters = new Map([["reason", { values: new Set(reasons) }]]);
    svg.append(reasons.length ? make("svg:a", { href: address({ view: "wall", filters }) }, parts) : make("svg:g", {}, parts));
  });
  return svg;
}

function about(step) {
  const alone = step.unique ? ` · ${whole(step.unique)} that no other rule would drop` : "";
  return `${words(step.reason)}: ${settings(step) || "no setting"}${alone}`;
}

// --- one sample

function settings(step) {
  const said = (v) => (Array.isArray(v) ? v.join(", ") : typeof v === "object" ? JSON.stringify(v) : v);
  return Object.entries(step.config).map(([name, v]) => `${words(name)} ${said(v)}`).join(" · ");
}

function verdict(i) {
  const reason = value("reason", i), step = D.steps.find((found) => found.reason === D.reasons[reason]?.step);
  if (isKept(i)) return [make("p", { class: "verdict keep" }, make("b", {}, "Kept"), ` by all ${D.steps.length} rules`)];
  const config = step && settings(step);
  const against = value("threshold", i) === null ? "" : `, against ${printed("threshold", i)}`;
  const measured = value("value", i) === null ? "" : `: ${printed("value", i)}${against}`;
  return [make("p", { class: "verdict drop" }, make("b", {}, "Dropped"), " by ", make("b", {}, words(reason)), measured),
    config ? make("p", { class: "note" }, `Rule ${words(step.reason)}: ${config}`) : null];
}

// Who was dropped for it, or for whom it was dropped.
function twins(i) {
  const twin = D.twin[i], other = value("other_uid", i), copies = [];
  if (twin < 0 && other) return make("p", { class: "note" }, `Too near to ${other}, which is not in these pools.`);
  D.twin.forEach((t, k) => { if (t === i) copies.push(k); });
  if (twin < 0 && !copies.length) return null;
  const small = (k) => make("button", { class: `card ${isKept(k) ? "kept" : "dropped"}`,
    onclick: () => go({ uid: value("uid", k) }) },
  make("span", { class: "frame" }, picture(k, 1)), make("span", { class: "foot" }, value("reason", k)));
  const title = twin >= 0 ? "Its twin" : `${whole(copies.length)} dropped for it`;
  return [make("h3", {}, title), make("div", { class: "strip" }, (twin >= 0 ? [twin] : copies.slice(0, 24)).map(small))];
}

function cells(i, source, title) {
  const here = (column) => column.source === source && column.name !== "caption" && cell(column, i) !== null;
  const rows = D.columns.filter(here).map(({ name, kind }) =>
    [make("dt", {}, words(name)), make("dd", { class: kind }, printed(name, i))]);
  return rows.length ? [make("h3", {}, title), make("dl", {}, rows)] : null;
}

function showRecord() {
  const panel = $("record"), i = D.place.get(state.uid), at = order.indexOf(i), before = recordShown;
  panel.hidden = i === undefined;
  recordShown = state.uid;
  if (panel.hidden) return;
  const move = (text, label, by) => {
    const button = plain(text, label, () => go({ uid: value("uid", order[at + by]) }));
    button.disabled = at < 0 || !(at + by in order);
    return button;
  };
  const close = plain("✕", "close", () => go({ uid: "" }));
  close.classList.add("close");
  const place = at < 0 ? "outside the filters" : `${whole(at + 1)} of ${whole(order.length)}`;
  const empty = D.columns.filter((column) => cell(column, i) === null).map(({ name }) => words(name)).join(", ");
  panel.replaceChildren(
    make("div", { class: "line bar-top" }, move("←", "previous sample", -1), move("→", "next sample", 1),
      make("span", { class: "soft" }, place), close),
    make("div", { class: "body" }, make("div", { class: "big" }, picture(i, 2)),
      make("p", { class: "said" }, value("caption", i) || "no caption"), [verdict(i), twins(i)].flat(),
      cells(i, "select", "Selection"), cells(i, "annotate", "Annotations"), cells(i, "download", "Download"),
      cells(i, "explorer", "Computed here"), empty ? make("p", { class: "note" }, `Empty: ${empty}`) : null,
      make("p", { class: "note" }, "On a terminal: ", make("code", {}, `python -m vlmpipe explain ${state.uid}`))));
  if (before !== state.uid) panel.scrollTop = 0;
}

// --- all of it

function render() {
  refilter();
  for (const update of updates) update();
  for (const tab of $("tabs").children) tab.setAttribute("aria-current", String(tab.dataset.view === state.view && "page"));
  tip(-1);
  showRecord();
  if (view?.name !== state.view) {
    $("main").replaceChildren();
    view = { name: state.view };
    view.update = VIEWS[state.view]($("main"));
  }
  view.update();
}

function keys(event) {
  const typing = event.target.matches("input, select, textarea"), tab = Object.keys(VIEWS)[+event.key - 1];
  if (event.key === "Escape") {
    if (typing) event.target.blur();
    else if (state.uid) go({ uid: "" });
    drawer(false);
  } else if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  else if (event.key === "/") { drawer(true); $("search").focus(); } else if (tab) go({ view: tab });
  else if (state.uid && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
    const to = order.indexOf(D.place.get(state.uid)) + (event.key === "ArrowLeft" ? -1 : 1);
    if (to in order) go({ uid: value("uid", order[to]) });
  } else {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: "-row", ArrowDown: "row" }[event.key];
    if (!steps || !view.move) return;
    view.move(steps);
  }
  event.preventDefault();
}

function drawer(open) {
  document.body.classList.toggle("drawer", open);
  $("toggle").setAttribute("aria-expanded", String(open));
}

async function start() {
  await unpack();
  state = readState();
  const tab = (name, k) => make("button", { "data-view": name, title: `key ${k + 1}`, onclick: () => go({ view: name }) },
    name[0].toUpperCase() + name.slice(1));
  $("tabs").append(...Object.keys(VIEWS).map(tab));
  const share = (100 * D.shown / D.rows).toPrecision(2);
  $("profile").textContent = `${D.profile}: ` + (D.sampled ?
    `${whole(D.shown)} of ${whole(D.rows)} rows (${+share}%), some of every reason` : `all ${whole(D.rows)} rows`);
  $("toggle").addEventListener("click", () => drawer(!document.body.classList.contains("drawer")));
  buildFilters();
  const follow = () => { state = readState(); render(); };
  addEventListener("popstate", follow);
  addEventListener("hashchange", follow);
  addEventListener("keydown", keys);
  new ResizeObserver(() => view?.update()).observe($("main"));
  render();
  document.body.dataset.ready = "yes";
}

start().catch((error) => { $("main").textContent = `The page could not be read: ${error.message}`; throw error; });
