"use strict";
// Draws what the report's data holds: a heat map of all edges, and the circuit of those that changed
// most. Text goes into the page as text only, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const FEW = 30;
const page = Object.fromEntries(
  ["cell", "colour", "count", "counted", "heatmap", "circuit", "edge", "which", "shares", "along", "step", "stepped"].map(
    (name) => [name, document.getElementById(name)]));
const state = { cell: data.first, chosen: 0, colour: "change", count: 40 };

function element(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function floats(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

// The edges of a cell, target by target: each target reads the first so many sources.
function edgesOf(cell) {
  if (cell.edges) return cell.edges;
  const graph = data.graphs[cell.graph];
  const before = floats(cell.before), after = floats(cell.after);
  cell.edges = [];
  graph.reads.forEach((count, target) => {
    for (let source = 0; source < count; source++) {
      const place = cell.edges.length;
      cell.edges.push({ place, source, target, before: before[place], after: after[place] });
    }
  });
  const ordered = (size) => [...cell.edges].sort((a, b) => size(b) - size(a) || a.place - b.place);
  const total = (side) => cell.edges.reduce((sum, edge) => sum + edge[side], 0) || 1;
  const all = { before: total("before"), after: total("after") };
  for (const edge of cell.edges) {
    edge.difference = edge.after - edge.before;
    edge.gained = edge.after / all.after - edge.before / all.before;
  }
  cell.ranked = ordered((edge) => Math.abs(edge.difference));
  cell.moved = ordered((edge) => Math.abs(edge.gained));
  cell.ranked.forEach((edge, rank) => { edge.rank = rank; });
  for (const side of ["before", "after"]) {
    ordered((edge) => edge[side]).forEach((edge, rank) => { edge["rank-" + side] = rank + 1; });
  }
  return cell.edges;
}

function number(value) {
  return value === 0 ? "0" : value.toExponential(2).replace("e+", "e");
}

function percent(change) {
  const value = 100 * change;
  return (value < 0 ? "" : "+") + value.toFixed(Math.abs(value) < 1000 ? 1 : 0) + " %";
}

// What is coloured: doublings for a change, powers of ten for a strength.
function scale(cell) {
  const edges = cell.edges;
  const value = {
    change: (edge) => Math.log2(edge.after / edge.before),
    rank: (edge) => edge["rank-before"] - edge["rank-after"],
    before: (edge) => Math.log10(edge.before),
    after: (edge) => Math.log10(edge.after),
  }[state.colour];
  const sorted = (list) => list.filter(Number.isFinite).sort((a, b) => a - b);
  let low, high, ticks;
  if (state.colour === "change") {
    // The median edge has the middle colour: where everything falls, what fell more still shows.
    const known = sorted(edges.map(value)), half = known.length >> 1;
    const centre = known.length % 2 ? known[half] : known.length ? (known[half - 1] + known[half]) / 2 : 0;
    const sizes = sorted(edges.map((edge) => Math.abs(value(edge) - centre)));
    const needed = sizes[Math.floor(0.95 * (sizes.length - 1))] || 1;
    const limit = data.limits.find((end) => end >= needed) || data.limits[data.limits.length - 1];
    low = centre - limit;
    high = centre + limit;
    ticks = [-1, -0.5, 0, 0.5, 1].map((part) => {
      const place = centre + part * limit, share = 2 ** place - 1;
      return [place, share ? (share > 0 ? "+" : "") + +(100 * share).toPrecision(3) + " %" : "0"];
    });
  } else if (state.colour === "rank") {
    const sizes = sorted(edges.map((edge) => Math.abs(value(edge))));
    high = Math.max(1, sizes[Math.floor(0.95 * (sizes.length - 1))] || 1);
    low = -high;
    ticks = [-1, -0.5, 0, 0.5, 1].map((part) => [part * high,
      (part > 0 ? "up " : part < 0 ? "down " : "") + Math.abs(Math.round(part * high))]);
  } else {
    const both = sorted(edges.flatMap((edge) => [Math.log10(edge.before), Math.log10(edge.after)]));
    high = Math.ceil(both.length ? both[both.length - 1] : 0);
    low = Math.min(high - 1, Math.floor(both.length ? both[Math.floor(0.05 * both.length)] : -1));
    ticks = [];
    for (let power = low; power <= high; power++) ticks.push([power, "1e" + power]);
  }
  const share = (edge) => Math.min(1, Math.max(0, (value(edge) - low) / (high - low)));
  return { share, low, high, ticks, defined: (edge) => !Number.isNaN(value(edge)) };
}

function colour(share) {
  const stops = data.colours, place = share * (stops.length - 1);
  const left = Math.min(stops.length - 2, Math.floor(place)), part = place - left;
  const mixed = stops[left].map((one, i) => Math.round(one + part * (stops[left + 1][i] - one)));
  return `rgb(${mixed.join(",")})`;
}

function labels(nodes, layers) {
  if (nodes.length <= FEW) return nodes.map((node, place) => [place, node]);
  const step = Math.ceil(layers / 10), blocks = nodes.map((node) => node.split(".")[0]);
  const found = [];
  for (let layer = 0; layer < layers; layer += step) {
    found.push([blocks.indexOf("a" + layer), "a" + layer]);
  }
  if (nodes[nodes.length - 1] === "logits") found.push([nodes.length - 1, "logits"]);
  return found;
}

function drawHeatmap(cell) {
  const svg = page.heatmap, graph = data.graphs[cell.graph];
  const { sources, targets, reads } = graph;
  const few = targets.length <= FEW, unit = few ? 34 : Math.max(6, 900 / targets.length);
  const left = 46, top = 8, bar = 34, under = few ? 54 : 34;
  const width = unit * targets.length, height = unit * sources.length;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${left + width + 100} ${top + height + under + 16}`);
  svg.style.fontSize = few ? "12px" : "14px";
  svg.dataset.unit = unit; svg.dataset.left = left; svg.dataset.top = top;
  const shown = scale(cell), gap = few ? 1 : 0;
  const at = (source) => top + height - unit * (source + 1);
  for (const edge of cell.edges) {
    if (!shown.defined(edge)) continue;
    element(svg, "rect", {
      class: "edge", x: left + unit * edge.target + gap / 2, y: at(edge.source) + gap / 2,
      width: unit - gap, height: unit - gap, fill: colour(shown.share(edge)),
    });
  }
  let outline = `M${left} ${top + height}`;
  reads.forEach((count, target) => {
    const y = top + height - unit * count;
    outline += `L${left + unit * target} ${y}H${left + unit * (target + 1)}`;
  });
  element(svg, "path", { class: "outline", d: `${outline}V${top + height}Z` });
  for (const [place, text] of labels(sources, graph.layers)) {
    element(svg, "text", {
      x: left - 5, y: at(place) + unit / 2, "text-anchor": "end", "dominant-baseline": "central",
    }, text);
  }
  for (const [place, text] of labels(targets, graph.layers)) {
    const x = left + unit * (place + 0.5), y = top + height + 12;
    element(svg, "text", few
      ? { x, y: y - 4, "text-anchor": "end", "dominant-baseline": "central", transform: `rotate(-90 ${x} ${y - 4})` }
      : { x, y, "text-anchor": "middle" }, text);
  }
  element(svg, "text", {
    x: left + width / 2, y: top + height + under + 6, "text-anchor": "middle",
  }, "target: the branch that reads");
  element(svg, "text", {
    x: left + 6, y: top + 12,
  }, "rows: source, the output that is read");
  const side = left + width + 18, tall = Math.min(height, 240);
  const gradient = element(element(svg, "defs", {}), "linearGradient", { id: "colours", x1: 0, y1: 1, x2: 0, y2: 0 });
  data.colours.forEach((_, place, all) => {
    const share = place / (all.length - 1);
    element(gradient, "stop", { offset: share, "stop-color": colour(share) });
  });
  element(svg, "rect", { x: side, y: top, width: 11, height: tall, fill: "url(#colours)" });
  for (const [value, text] of shown.ticks) {
    const y = top + tall * (1 - (value - shown.low) / (shown.high - shown.low));
    element(svg, "text", { x: side + 16, y, "dominant-baseline": "central" }, text);
  }
  element(svg, "rect", { id: "chosen-halo" });
  element(svg, "rect", { id: "chosen" });
}

function drawCircuit(cell) {
  const svg = page.circuit, graph = data.graphs[cell.graph];
  const nodes = [...graph.sources, "logits"], step = Math.min(40, Math.max(15, 420 / nodes.length));
  const width = 560, half = 34, middle = width / 2, height = step * nodes.length;
  const port = { q: -0.27, k: -0.09, v: 0.09 };
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height + 24}`);
  svg.style.fontSize = "14px";
  const y = (place) => height - step * (place + 0.5);
  const first = (list, size) => list.slice(0, state.count).filter((edge) => edge[size]);
  let size = "difference", drawn = first(cell.ranked, size);
  const rising = drawn.filter((edge) => edge.difference > 0).length;
  // Where nearly all go one way, what they have of the whole tells them apart.
  const one = 10 * Math.min(rising, drawn.length - rising) < drawn.length;
  if (one) drawn = first(cell.moved, size = "gained");
  const largest = drawn.length ? Math.abs(drawn[0][size]) : 1;
  const arcs = element(svg, "g", {}), hits = element(svg, "g", {});
  let stronger = 0;
  for (const edge of [...drawn].reverse()) {
    const side = edge[size] > 0 ? 1 : -1;
    stronger += side > 0;
    const [target, branch] = graph.targets[edge.target].split(".");
    const from = edge.source + 0.27;
    const to = nodes.indexOf(target) + (branch ? port[branch] : -0.2);
    const reach = half + 22 + 292 * ((to - from) / nodes.length) ** 0.7;
    const x = middle + side * half, out = middle + side * reach;
    const d = `M${x} ${y(from)}C${out} ${y(from)} ${out} ${y(to)} ${x} ${y(to)}`;
    const thick = 0.7 + 4.3 * Math.abs(edge[size]) / largest;
    element(arcs, "path", {
      d, class: "arc " + (side > 0 ? "stronger" : "weaker"), "data-place": edge.place,
      "stroke-width": thick.toFixed(2),
      "stroke-dasharray": side > 0 ? "none" : `${3 + 3 * thick} ${2 + thick}`,
    });
    element(hits, "path", { d, class: "hit", "data-place": edge.place });
  }
  nodes.forEach((node, place) => {
    element(svg, "rect", {
      x: middle - half, y: y(place) - 0.38 * step, width: 2 * half, height: 0.76 * step,
      class: node[0] === "a" ? "node" : "node ffn",
    });
    element(svg, "text", {
      x: middle, y: y(place), "text-anchor": "middle", "dominant-baseline": "central",
      "font-size": Math.min(14, 0.66 * step),
    }, node);
    if (node[0] !== "a" || step < 30) return;
    for (const [letter, up] of Object.entries(port)) {
      for (const side of [-1, 1]) {
        element(svg, "text", {
          x: middle + side * (half - 6), y: y(place + up), class: "port", "text-anchor": "middle",
          "dominant-baseline": "central", "font-size": 0.2 * step,
        }, letter);
      }
    }
  });
  const base = height + 18;
  const [less, more] = one ? ["smaller share", "larger share"] : ["weaker", "stronger"];
  element(svg, "text", { x: 8, y: base }, `${less} (dashed): ${drawn.length - stronger}`);
  element(svg, "text", { x: width - 8, y: base, "text-anchor": "end" }, `${more} (solid): ${stronger}`);
  page.shares.hidden = !one;
  page.counted.textContent = String(drawn.length);
}

function choose(place) {
  const cell = data.cells[state.cell], edge = cell.edges[place];
  if (!edge) return;
  state.chosen = place;
  const graph = data.graphs[cell.graph], svg = page.heatmap;
  const unit = Number(svg.dataset.unit);
  for (const name of ["chosen-halo", "chosen"]) {
    const box = document.getElementById(name);
    box.setAttribute("x", Number(svg.dataset.left) + unit * edge.target);
    box.setAttribute("y", Number(svg.dataset.top) + unit * (graph.sources.length - 1 - edge.source));
    box.setAttribute("width", unit);
    box.setAttribute("height", unit);
  }
  for (const arc of page.circuit.querySelectorAll(".arc")) {
    arc.classList.toggle("chosen", Number(arc.dataset.place) === place);
  }
  const change = edge.before ? percent((edge.after - edge.before) / edge.before) : "not defined";
  const values = {
    source: graph.sources[edge.source], target: graph.targets[edge.target],
    before: number(edge.before) + " nats", after: number(edge.after) + " nats", change,
    rank: `${edge.rank + 1} of ${cell.edges.length} by size of the difference; by strength ` +
      `${edge["rank-before"]} before, ${edge["rank-after"]} after`,
  };
  for (const [name, value] of Object.entries(values)) {
    page.edge.querySelector(`[data-value=${name}]`).textContent = value;
  }
}

// The training that a cell is a checkpoint of.
function training() {
  return (data.trainings || []).find((one) => one.cells.includes(state.cell));
}

function draw(chosen) {
  const cell = data.cells[state.cell], along = training();
  page.along.hidden = !along;
  if (along) {
    page.step.max = along.cells.length - 1;
    page.step.value = along.cells.indexOf(state.cell);
    page.stepped.textContent = String(along.steps[page.step.value]);
  }
  edgesOf(cell);
  page.which.textContent = cell.title;
  drawHeatmap(cell);
  drawCircuit(cell);
  choose(chosen === undefined ? cell.ranked[0].place : chosen);
}

// The edge at a source and a target, if there is one.
function edgeAt(source, target) {
  const cell = data.cells[state.cell], reads = data.graphs[cell.graph].reads;
  if (source < 0 || target < 0 || target >= reads.length || source >= reads[target]) return null;
  return reads.slice(0, target).reduce((sum, count) => sum + count, 0) + source;
}

page.heatmap.addEventListener("pointermove", (event) => {
  const svg = page.heatmap, point = new DOMPoint(event.clientX, event.clientY)
    .matrixTransform(svg.getScreenCTM().inverse());
  const unit = Number(svg.dataset.unit), cell = data.cells[state.cell];
  const target = Math.floor((point.x - Number(svg.dataset.left)) / unit);
  const row = Math.floor((point.y - Number(svg.dataset.top)) / unit);
  const place = edgeAt(data.graphs[cell.graph].sources.length - 1 - row, target);
  if (place !== null) choose(place);
});
page.heatmap.addEventListener("keydown", (event) => {
  const step = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const edge = data.cells[state.cell].edges[state.chosen];
  const place = edgeAt(edge.source + step[0], edge.target + step[1]);
  if (place !== null) choose(place);
});
page.circuit.addEventListener("pointermove", (event) => {
  const place = event.target.dataset && event.target.dataset.place;
  if (place !== undefined) choose(Number(place));
});
page.step.addEventListener("input", () => {
  state.cell = training().cells[Number(page.step.value)];
  page.cell.value = state.cell;
  draw(state.chosen);
});
page.cell.addEventListener("change", () => { state.cell = Number(page.cell.value); draw(); });
page.colour.addEventListener("change", () => { state.colour = page.colour.value; draw(state.chosen); });
page.count.addEventListener("input", () => { state.count = Number(page.count.value); draw(state.chosen); });
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});

data.cells.forEach((cell, place) => {
  const option = document.createElement("option");
  option.value = place;
  option.textContent = cell.title;
  page.cell.append(option);
});
page.cell.value = state.cell;
draw();
