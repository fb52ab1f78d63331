"use strict";
/* The explorer's map of embeddings, in the same script as explorer.js. */

const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const HUES = ["#4e79c4", "#e8853a", "#c4515c", "#46a6a0", "#8f6bb8", "#d3a32c", "#8c6d5a", "#d678a8", "#6b8e23", "#5ab4dc", "#a05195"];

// Each row's colour [S] as an index into `shades`, and the legend; the rarest values share the last shade.
function shading(column) {
  if (column.kind === "number") {
    const { low, high } = bins(column), between = (a, b, share) => a.map((v, c) => Math.round(v + (b[c] - v) * share));
    const shade = (k) => between(RAMP[k >> 3], RAMP[Math.min(4, (k >> 3) + 1)], (k % 8) / 8);
    const shades = Array.from({ length: 33 }, (_, k) => `rgb(${shade(k)})`).concat("#888");
    const step = (v) => Math.max(0, Math.min(32, Math.round((v - low) / (high - low) * 32)));
    const legend = [0, 8, 16, 24, 32].map((k) => [shades[k], number(low + (high - low) * k / 32)]);
    return { shades, of: Array.from(column.data, (v) => (Number.isNaN(v) ? 33 : step(v))), legend };
  }
  const counts = new Float64Array(column.values.length);
  column.data.forEach((code) => counts[code]++);
  const common = [...counts.keys()].filter((code) => counts[code]).sort((a, b) => counts[b] - counts[a]);
  const rank = new Map(common.map((code, k) => [code, Math.min(k, OTHERS)]));
  const shades = [...HUES, "#888"].map((hue, k) => (column.name === "reason" && common[k] === D.kept ? "#2f9a6c" : hue));
  const legend = common.slice(0, OTHERS).map((code, k) => [shades[k], column.values[code]]);
  if (common.length > OTHERS) legend.push(["#888", "others"]);
  return { shades, of: Array.from(column.data, (code) => rank.get(code)), legend };
}

// The plane is [0, 1] x [0, 1]; a point is on the canvas at (point - corner) * scale.
function map(host) {
  const bar = make("div", { class: "bar-top" }), legend = make("ul", { class: "legend" }), note = make("p", { class: "note" });
  const canvas = make("canvas", { tabindex: 0, "aria-label": "map of embeddings; arrows move, plus and minus zoom" });
  const frame = make("div", { class: "plane" }, canvas, legend, note), pointers = new Map();
  if (!D.maps.length) {
    host.append(make("p", { class: "empty" }, "No embeddings among the annotations: nothing to lay out."));
    return () => {};
  }
  host.append(bar, frame);
  let plane, colours, camera = null, moved = 0;
  const here = (i) => plane.points[2 * i] !== OFF_MAP;
  const where = (i) => [(plane.points[2 * i] / OFF_MAP - camera.x) * camera.scale,
    (1 - plane.points[2 * i + 1] / OFF_MAP - camera.y) * camera.scale];

  function fit() {
    const scale = Math.min(canvas.clientWidth, canvas.clientHeight) * 0.94;
    camera = { scale, x: 0.5 - canvas.clientWidth / 2 / scale, y: 0.5 - canvas.clientHeight / 2 / scale };
  }

  function draw() {
    const density = devicePixelRatio || 1, context = canvas.getContext("2d"), style = getComputedStyle(canvas);
    [canvas.width, canvas.height] = [canvas.clientWidth * density, canvas.clientHeight * density];
    context.scale(density, density);
    const dot = Math.max(1.5, Math.min(6, camera.scale / 6 / Math.sqrt(D.shown)));
    const layers = colours.shades.map(() => []), faint = [];
    for (let i = 0; i < D.shown; i++) if (here(i)) (fails[i] ? faint : layers[colours.of[i]]).push(i);
    [[faint, style.getPropertyValue("--line")], ...layers.map((rows, k) => [rows, colours.shades[k]])].forEach(([rows, shade], k) => {
      context.fillStyle = shade;
      context.globalAlpha = k ? 0.8 : 1;
      context.beginPath();
      for (const i of rows) { const [x, y] = where(i); context.moveTo(x + dot, y); context.arc(x, y, dot, 0, 7); }
      context.fill();
    });
    const chosen = D.place.get(state.uid);
    if (chosen === undefined || !here(chosen)) return;
    const [x, y] = where(chosen);
    context.globalAlpha = 1; context.lineWidth = 2.5;
    context.strokeStyle = style.getPropertyValue("--ink");
    context.beginPath(); context.arc(x, y, dot + 5, 0, 7); context.stroke();
  }

  function nearest(event) {
    const box = canvas.getBoundingClientRect(), [px, py] = [event.clientX - box.left, event.clientY - box.top];
    let best = -1, least = 14 * 14;
    for (const i of order) {
      if (!here(i)) continue;
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
    const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY];
    const other = [...pointers.values()].find((pointer) => pointer !== before);
    moved += Math.abs(dx) + Math.abs(dy);
    if (other) {
      const apart = (p) => Math.hypot(p.clientX - other.clientX, p.clientY - other.clientY);
      const box = canvas.getBoundingClientRect();
      zoom(apart(event) / Math.max(1, apart(before)), other.clientX - box.left, other.clientY - box.top);
    } else pan(dx, dy);
    pointers.set(event.pointerId, event);
  }

  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(2 ** (-event.deltaY / 300), event.offsetX, event.offsetY);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    if (!pointers.size) moved = 0;
    pointers.set(event.pointerId, event);
    canvas.setPointerCapture(event.pointerId);
    tip(-1);
  });
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
    const named = (items) => items.map(({ name }) => [name, words(name)]);
    bar.replaceChildren(select("Colour", "color", named(paintable), column.name), select("Map", "map", named(D.maps), plane.name),
      plain("−", "zoom out", () => zoom(1 / 1.4)), plain("+", "zoom in", () => zoom(1.4)),
      plain("reset", "show all", () => { fit(); draw(); }));
    const shares = plane.shares.map((share) => `${Math.round(100 * share)}%`).join(" and ");
    note.replaceChildren(`2 of ${plane.width} principal components: ${shares} of the variance`);
    legend.replaceChildren(...colours.legend.map(([shade, text]) => {
      const swatch = make("i");
      swatch.style.background = shade;
      return make("li", {}, swatch, make("span", {}, text));
    }));
    if (!camera) fit();
    draw();
  };
}

function tip(i, event) {
  const box = $("tip");
  box.hidden = !(i >= 0);
  if (box.hidden) return;
  const coloured = state.color === "reason" ? null : printed(state.color, i);
  box.replaceChildren(picture(i, 1), make("span", { class: "caption" }, value("caption", i) || "no caption"),
    make("span", { class: "soft" }, value("reason", i), coloured === null ? null : ` · ${words(state.color)} ${coloured}`));
  box.style.left = `${Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8)}px`;
  box.style.top = `${Math.max(8, Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8))}px`;
}
