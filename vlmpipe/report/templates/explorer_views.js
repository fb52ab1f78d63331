"use strict";
/* The explorer's views, after explorer.js in the same script: overview, wall, duplicates, map, a sample's record. */

// --- views: each builds itself into a host and returns what brings it up to date

const sizes = (current) => select("Size", "size", [["1", "small"], ["1.5", "medium"], ["2", "large"]], current);

function wall(host) {
  const scroller = make("div", { class: "scroller" }), bar = make("div", { class: "bar-top" });
  const by = [["", "reason"], ...D.columns.filter((c) => c.kind === "number" || c.name === "caption").flatMap((c) => [[c.name, `${words(c.name)} ↑`], [`-${c.name}`, `${words(c.name)} ↓`]])];
  let across = 1, height = 1;
  const row = (k) => {
    const sorted = state.sort.replace(/^-/, ""), note = (i) => (sorted && sorted !== "caption" ? printed(sorted, i) ?? "–" : value("value", i) !== null ? printed("value", i) : null);
    const node = make("div", { class: "row" }, order.slice(k * across, (k + 1) * across).map((i) => card(i, +state.size, note(i))));
    node.style.gridTemplateColumns = `repeat(${across}, minmax(0, 1fr))`;
    return node;
  };
  const show = list(scroller, row);
  host.append(bar, scroller);
  let before = "";
  view.move = (steps) => {
    const at = order.indexOf(+(document.activeElement.dataset?.row ?? -1)), to = Math.max(0, Math.min(order.length - 1, at + (steps === "row" ? across : steps === "-row" ? -across : steps)));
    scroller.scrollTop = Math.max(Math.min(scroller.scrollTop, Math.floor(to / across) * height), (Math.floor(to / across) + 1) * height - scroller.clientHeight);
    scroller.dispatchEvent(new Event("scroll"));
    scroller.querySelector(`[data-row="${order[to]}"]`)?.focus();
  };
  return () => {
    bar.replaceChildren(select("Sort by", "sort", by, state.sort), sizes(state.size));
    const now = address({ uid: "", view: "" });
    const chosen = order.indexOf(D.place.get(state.uid));
    across = Math.max(1, Math.floor((scroller.clientWidth - 16) / (D.tile_side * +state.size + 30)));
    height = D.tile_side * +state.size + 88;
    show(Math.ceil(order.length / across), height);
    if (now !== before) scroller.scrollTop = chosen < 0 ? 0 : Math.max(0, (Math.floor(chosen / across) - 1) * height);
    before = now;
    if (!order.length) scroller.firstChild.append(nothing());
  };
}

function duplicates(host) {
  const groups = new Map(), scroller = make("div", { class: "scroller" }), bar = make("div", { class: "bar-top" });
  for (let i = 0; i < D.shown; i++) {
    const other = value("other_uid", i);
    if (other) groups.set(other, [...(groups.get(other) || []), i]);
  }
  let shown = [];
  const note = (i) => (value("threshold", i) ? `${printed("value", i) ?? "–"} / ${printed("threshold", i)}` : null);
  function group([other, copies]) {
    const twin = D.twin[copies[0]], scale = +state.size;
    const outside = () => make("div", { class: "card" }, make("span", { class: "frame" }, picture(-1, 1)), make("span", { class: "caption" }, `evaluation picture ${other}`));
    const node = make("div", { class: "group" },
      make("div", { class: "side" }, make("h3", {}, twin < 0 ? "held out" : isKept(twin) ? "kept" : "won, dropped later"), twin < 0 ? outside() : card(twin, scale)),
      make("div", { class: "side copies" }, make("h3", {}, `${copies.length} dropped`), make("div", { class: "strip" }, copies.map((i) => card(i, scale, note(i))))));
    node.style.setProperty("--card", `${D.tile_side * scale + 36}px`);
    return node;
  }
  const show = list(scroller, (k) => make("div", { class: "row groups" }, shown[k].map(group)));
  host.append(bar, scroller);
  return () => {
    const found = [...groups].filter(([, copies]) => copies.some((i) => !fails[i]) || !fails[D.twin[copies[0]]] && D.twin[copies[0]] >= 0);
    found.sort((a, b) => b[1].length - a[1].length || a[1][0] - b[1][0]);
    bar.replaceChildren(make("p", {}, make("b", {}, whole(found.length)), " groups: what stays, and what was dropped for it"), sizes(state.size));
    // Small groups share a row.
    const room = scroller.clientWidth - 16, wide = (copies) => (1 + copies.length) * (D.tile_side * +state.size + 44) + 32;
    let left = 0;
    shown = [];
    for (const entry of found) {
      if (!shown.length || wide(entry[1]) > left) { shown.push([]); left = room; }
      shown.at(-1).push(entry);
      left -= wide(entry[1]);
    }
    show(shown.length, D.tile_side * +state.size + 128);
    if (!shown.length) scroller.firstChild.append(groups.size ? nothing() : make("p", { class: "empty" }, "No rule dropped a sample for another."));
  };
}

function overview(host) {
  const scroller = make("div", { class: "scroller page" }), funnel = make("div", { class: "funnel" }), left = D.reasons.kept?.rows ?? 0;
  const charts = D.ranges.map((column) => ({ column, ...histogram(column, 300, 120) })), said = make("p", { class: "note" });
  const cards = charts.map(({ column, node }) => make("figure", { title: `from ${column.source}` }, make("figcaption", {}, words(column.name)), node));
  scroller.append(make("section", {}, make("h2", {}, "Funnel ", make("span", { class: "soft" }, `${whole(left)} of ${whole(D.rows)} rows kept, ${(100 * left / D.rows).toFixed(1)}%`)), funnel), make("section", {}, make("h2", {}, "Numbers"), said, make("div", { class: "grid" }, cards)));
  host.append(scroller);
  said.append(make("span", { class: "key keep" }, "kept"), make("span", { class: "key drop" }, "dropped"), make("span", { class: "key ghost" }, "all, to its own scale"),
    `Drag over a chart to filter by it, click to stop. ${D.sampled ? `Weighted to all ${whole(D.rows)} rows. ` : ""}Dashed: where a rule cuts.`);
  return () => {
    funnel.replaceChildren(drawFunnel(funnel.clientWidth || 600));
    for (const { update } of charts) update();
  };
}

function drawFunnel(width) {
  const narrow = width < 620, high = narrow ? 50 : 34, left = narrow ? 0 : 170, right = narrow ? 0 : 190, span = width - left - right;
  const svg = make("svg:svg", { class: "chart", viewBox: `0 0 ${width} ${high * (D.steps.length + 1)}`, width, role: "group", "aria-label": "funnel" });
  [{ reason: "pool", rows_out: D.rows, dropped: 0 }, ...D.steps].forEach(({ reason, rows_out: out, dropped }, k) => {
    const y = k * high + (narrow ? 20 : 3), tall = narrow ? 24 : 28, full = (out + dropped) / D.rows * span, kept = out / D.rows * span, middle = left + span / 2;
    const reasons = Object.entries(D.reasons).filter(([, facts]) => facts.step === reason).map(([name]) => name);
    const bars = [make("svg:rect", { class: "hit", x: 0, y: k * high, width, height: high }),
      make("svg:rect", { class: "drop", x: middle - full / 2, y, width: full, height: tall }), make("svg:rect", { class: "keep", x: middle - kept / 2, y, width: kept, height: tall }),
      ...[[0, "start", "", words(reason)], [width - 108, "end", "out", whole(out)], [width - 52, "end", dropped ? "lost" : "soft", k ? `−${whole(dropped)}` : ""],
        [width, "end", "soft", !k ? "rows" : dropped ? `${(100 * dropped / (out + dropped)).toFixed(1)}%` : ""]]
        .map(([x, anchor, kind, text]) => make("svg:text", { x, y: narrow ? y - 5 : y + 19, "text-anchor": anchor, class: kind }, text))];
    const alone = k && D.steps[k - 1].unique, title = make("svg:title", {}, k ? `${words(reason)}: ${settings(D.steps[k - 1]) || "no setting"}` : "all rows",
      alone ? ` · ${whole(alone)} that no other rule would drop` : null);
    svg.append(reasons.length ? make("svg:a", { href: address({ view: "wall", filters: new Map([["reason", { values: new Set(reasons) }]]) }) }, title, bars) : make("svg:g", {}, title, bars));
  });
  return svg;
}

// --- the map

const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const HUES = ["#4e79c4", "#e8853a", "#c4515c", "#46a6a0", "#8f6bb8", "#d3a32c", "#8c6d5a", "#d678a8", "#6b8e23", "#5ab4dc", "#a05195"];

// Each row's colour [S] as an index into `shades`, and the legend; the rarest values share the last shade.
function shading(column) {
  if (column.kind === "number") {
    const range = bins(column), shade = (k) => RAMP[Math.floor(k / 8)].map((v, c) => Math.round(v + (RAMP[Math.min(4, Math.floor(k / 8) + 1)][c] - v) * (k % 8) / 8));
    const shades = Array.from({ length: 33 }, (_, k) => `rgb(${shade(k)})`).concat("#888");
    const of = Array.from(column.data, (v) => Number.isNaN(v) ? 33 : Math.max(0, Math.min(32, Math.round((v - range.low) / (range.high - range.low) * 32))));
    return { shades, of, legend: [0, 8, 16, 24, 32].map((k) => [shades[k], number(range.low + (range.high - range.low) * k / 32)]) };
  }
  const counts = new Float64Array(column.values.length);
  column.data.forEach((code) => counts[code]++);
  const common = [...counts.keys()].filter((code) => counts[code]).sort((a, b) => counts[b] - counts[a]);
  const rank = new Map(common.map((code, k) => [code, Math.min(k, OTHERS)]));
  const shades = [...HUES, "#888"].map((hue, k) => (column.name === "reason" && common[k] === D.kept ? "#2f9a6c" : hue));
  const legend = common.slice(0, OTHERS).map((code, k) => [shades[k], column.values[code]]);
  return { shades, of: Array.from(column.data, (code) => rank.get(code)), legend: common.length > OTHERS ? [...legend, ["#888", "others"]] : legend };
}

// The plane is [0, 1] x [0, 1]; a point is on the canvas at (point - corner) * scale.
function map(host) {
  const bar = make("div", { class: "bar-top" }), canvas = make("canvas", { tabindex: 0, "aria-label": "map of embeddings; arrows move, plus and minus zoom" });
  const legend = make("ul", { class: "legend" }), note = make("p", { class: "note" }), frame = make("div", { class: "plane" }, canvas, legend, note), pointers = new Map();
  if (!D.maps.length) {
    host.append(make("p", { class: "empty" }, "No embeddings among the annotations: nothing to lay out."));
    return () => {};
  }
  host.append(bar, frame);
  let plane, colours, camera = null, moved = 0;
  const where = (i) => [(plane.points[2 * i] / OFF_MAP - camera.x) * camera.scale, (1 - plane.points[2 * i + 1] / OFF_MAP - camera.y) * camera.scale];

  function fit() {
    const scale = Math.min(canvas.clientWidth, canvas.clientHeight) * 0.94;
    camera = { scale, x: 0.5 - canvas.clientWidth / 2 / scale, y: 0.5 - canvas.clientHeight / 2 / scale };
  }

  function draw() {
    const density = devicePixelRatio || 1, [width, height] = [canvas.clientWidth, canvas.clientHeight], context = canvas.getContext("2d");
    [canvas.width, canvas.height] = [width * density, height * density];
    context.scale(density, density);
    const dot = Math.max(1.5, Math.min(6, camera.scale / 6 / Math.sqrt(D.shown))), soft = getComputedStyle(canvas).getPropertyValue("--line");
    const layers = colours.shades.map(() => []), faint = [];
    for (let i = 0; i < D.shown; i++) if (plane.points[2 * i] !== OFF_MAP) (fails[i] ? faint : layers[colours.of[i]]).push(i);
    [[faint, soft], ...layers.map((rows, k) => [rows, colours.shades[k]])].forEach(([rows, shade], k) => {
      context.fillStyle = shade;
      context.globalAlpha = k ? 0.8 : 1;
      context.beginPath();
      for (const i of rows) { const [x, y] = where(i); context.moveTo(x + dot, y); context.arc(x, y, dot, 0, 7); }
      context.fill();
    });
    const chosen = D.place.get(state.uid);
    if (chosen === undefined || plane.points[2 * chosen] === OFF_MAP) return;
    const [x, y] = where(chosen);
    context.globalAlpha = 1; context.lineWidth = 2.5;
    context.strokeStyle = getComputedStyle(canvas).getPropertyValue("--ink");
    context.beginPath(); context.arc(x, y, dot + 5, 0, 7); context.stroke();
  }

  function nearest(event) {
    const box = canvas.getBoundingClientRect(), [px, py] = [event.clientX - box.left, event.clientY - box.top];
    let best = -1, least = 14 * 14;
    for (const i of order) {
      if (plane.points[2 * i] === OFF_MAP) continue;
      const [x, y] = where(i), far = (x - px) ** 2 + (y - py) ** 2;
      if (far < least) [best, least] = [i, far];
    }
    return best;
  }

  function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const scale = Math.max(100, Math.min(200000, camera.scale * factor));
    camera = { scale, x: camera.x + x / camera.scale - x / scale, y: camera.y + y / camera.scale - y / scale };
    draw();
  }

  function pan(dx, dy) { camera.x -= dx / camera.scale; camera.y -= dy / camera.scale; draw(); }

  function drag(event) {
    const before = pointers.get(event.pointerId);
    if (!before) return tip(nearest(event), event);
    const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY], others = [...pointers.values()].filter((p) => p !== before);
    moved += Math.abs(dx) + Math.abs(dy);
    if (others.length) {
      const apart = (p) => Math.hypot(p.clientX - others[0].clientX, p.clientY - others[0].clientY), box = canvas.getBoundingClientRect();
      zoom(apart(event) / Math.max(1, apart(before)), others[0].clientX - box.left, others[0].clientY - box.top);
    } else pan(dx, dy);
    pointers.set(event.pointerId, event);
  }

  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(2 ** (-event.deltaY / 300), event.offsetX, event.offsetY); }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => { if (!pointers.size) moved = 0; pointers.set(event.pointerId, event); canvas.setPointerCapture(event.pointerId); tip(-1); });
  canvas.addEventListener("pointermove", drag);
  canvas.addEventListener("pointerleave", () => tip(-1));
  canvas.addEventListener("pointerup", (event) => {
    pointers.delete(event.pointerId);
    const found = moved < 5 ? nearest(event) : -1;
    if (found >= 0) go({ uid: value("uid", found) });
  });
  canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[event.key];
    if (moves) pan(...moves);
    else if (event.key === "+" || event.key === "=") zoom(1.4);
    else if (event.key === "-") zoom(1 / 1.4);
    else if (event.key === "0") { fit(); draw(); } else return;
    event.preventDefault(); event.stopPropagation();
  });

  const paintable = D.columns.filter((column) => D.facets.includes(column) || D.ranges.includes(column));
  return () => {
    plane = D.maps.find(({ name }) => name === state.map) || D.maps[0];
    const column = paintable.includes(columns.get(state.color)) ? columns.get(state.color) : columns.get("reason");
    colours = shading(column);
    const button = (text, label, act) => make("button", { class: "plain", "aria-label": label, title: label, onclick: act }, text);
    bar.replaceChildren(select("Colour", "color", paintable.map(({ name }) => [name, words(name)]), column.name), select("Map", "map", D.maps.map(({ name }) => [name, words(name)]), plane.name),
      button("−", "zoom out", () => zoom(1 / 1.4)), button("+", "zoom in", () => zoom(1.4)), button("reset", "show all", () => { fit(); draw(); }));
    note.replaceChildren(`2 of ${plane.width} principal components: ${plane.shares.map((share) => `${Math.round(100 * share)}%`).join(" and ")} of the variance`);
    legend.replaceChildren(...colours.legend.map(([shade, text]) => { const swatch = make("i"); swatch.style.background = shade; return make("li", {}, swatch, make("span", {}, text)); }));
    if (!camera) fit();
    draw();
  };
}

function tip(i, event) {
  const box = $("tip");
  box.hidden = !(i >= 0);
  if (box.hidden) return;
  box.replaceChildren(picture(i, 1), make("span", { class: "caption" }, value("caption", i) || "no caption"), make("span", { class: "soft" }, [value("reason", i), state.color !== "reason" && printed(state.color, i) !== null ? ` · ${words(state.color)} ${printed(state.color, i)}` : null]));
  box.style.left = `${Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8)}px`;
  box.style.top = `${Math.max(8, Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8))}px`;
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
  return [make("p", { class: "verdict drop" }, make("b", {}, "Dropped"), " by ", make("b", {}, words(reason)), value("value", i) === null ? "" : `: ${printed("value", i)}${against}`),
    config ? make("p", { class: "note" }, `Rule ${words(step.reason)}: ${config}`) : null];
}

function showRecord() {
  const panel = $("record"), i = D.place.get(state.uid), open = i !== undefined;
  document.body.classList.toggle("open", open);
  panel.hidden = !open;
  if (!open || recordShown === state.uid) { recordShown = open ? state.uid : null; return; }
  recordShown = state.uid;
  const at = order.indexOf(i), twin = D.twin[i], step = (by) => go({ uid: value("uid", order[at + by]) });
  const move = (text, label, by) => make("button", { class: "plain", "aria-label": label, title: label, disabled: at < 0 || !(at + by in order), onclick: () => step(by) }, text);
  const other = value("other_uid", i), copies = D.twin.reduce((found, t, k) => (t === i ? [...found, k] : found), []).slice(0, 12);
  const part = (source, title) => {
    const rows = D.columns.filter((column) => column.source === source && cell(column, i) !== null && column.name !== "caption");
    return rows.length ? [make("h3", {}, title), make("dl", {}, rows.map((column) => [make("dt", {}, words(column.name)), make("dd", { class: column.kind }, printed(column.name, i))]))] : [];
  };
  const empty = D.columns.filter((column) => cell(column, i) === null).map(({ name }) => words(name)).join(", ");
  const pair = (k, title) => make("button", { class: `card ${isKept(k) ? "kept" : "dropped"}`, onclick: () => go({ uid: value("uid", k) }) }, make("span", { class: "frame" }, picture(k, 1)), make("span", { class: "foot" }, title));
  panel.replaceChildren(make("div", { class: "line bar-top" }, move("←", "previous sample", -1), move("→", "next sample", 1),
    make("span", { class: "soft" }, at < 0 ? "outside the filters" : `${whole(at + 1)} of ${whole(order.length)}`), make("button", { class: "plain close", "aria-label": "close", onclick: () => go({ uid: "" }) }, "✕")),
  make("div", { class: "body" }, make("div", { class: "big" }, picture(i, 2)), make("p", { class: "said" }, value("caption", i) || "no caption"), verdict(i),
    twin >= 0 || copies.length ? [make("h3", {}, twin >= 0 ? "Its twin" : `${copies.length} copies of it`), make("div", { class: "strip" }, twin >= 0 ? pair(twin, isKept(twin) ? "kept" : value("reason", twin)) : copies.map((k) => pair(k, value("reason", k))))] :
      other ? make("p", { class: "note" }, `Too near to ${other}, which is not in these pools.`) : null,
    part("select", "Selection"), part("annotate", "Annotations"), part("download", "Download"), part("explorer", "Computed here"),
    empty ? make("p", { class: "note" }, `Empty: ${empty}`) : null,
    make("p", { class: "note" }, "On a terminal: ", make("code", {}, `python -m vlmpipe explain ${state.uid}`))));
  panel.scrollTop = 0;
}

// --- all of it

function render() {
  refilter();
  for (const update of updates) update();
  for (const tab of $("tabs").children) tab.setAttribute("aria-current", tab.dataset.view === state.view ? "page" : "false");
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
  $("tabs").append(...Object.keys(VIEWS).map((name, k) => make("button", { "data-view": name, title: `${k + 1}`, onclick: () => go({ view: name }) }, name[0].toUpperCase() + name.slice(1))));
  $("profile").textContent = D.sampled ? `${D.profile}: ${whole(D.shown)} of ${whole(D.rows)} rows shown, some of each reason` : `${D.profile}: all ${whole(D.rows)} rows`;
  $("toggle").addEventListener("click", () => drawer(!document.body.classList.contains("drawer")));
  buildFilters();
  addEventListener("hashchange", () => { state = readState(); render(); });
  addEventListener("popstate", () => { state = readState(); render(); });
  addEventListener("keydown", keys);
  new ResizeObserver(() => view?.update()).observe($("main"));
  render();
  document.body.dataset.ready = "yes";
}

start().catch((error) => { $("main").textContent = `The page could not be read: ${error.message}`; throw error; });
