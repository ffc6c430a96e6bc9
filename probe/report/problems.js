"use strict";
// The panel of problems: a list to search, and one of them with both answers, what differs, and its
// edges. Text goes into the page as text only, never as markup.
{
const found = JSON.parse(document.getElementById("problem-data").textContent);
const MOST = 200;
const part = (name) => document.getElementById("problem" + (name ? "-" + name : ""));
const state = { pair: 0, solved: "", search: "", chosen: null };

function add(parent, name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  parent.append(made);
  return made;
}

const words = (text) => text.match(/\\?[\p{L}\p{N}_]+|\s+|[^\p{L}\p{N}_\s]/gu) || [];

// Which pieces of two texts are the same, by the longest common subsequence; long ones are compared
// from both ends only.
function same(before, after) {
  const kept = [new Uint8Array(before.length), new Uint8Array(after.length)];
  let start = 0, ends = [before.length, after.length];
  while (start < Math.min(...ends) && before[start] === after[start]) {
    kept[0][start] = kept[1][start] = 1;
    start++;
  }
  while (Math.min(...ends) > start && before[ends[0] - 1] === after[ends[1] - 1]) {
    kept[0][--ends[0]] = kept[1][--ends[1]] = 1;
  }
  const rows = ends[0] - start, columns = ends[1] - start;
  if (rows * columns > 4e6) return kept;
  const width = columns + 1, longest = new Uint16Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i--) {
    for (let j = columns - 1; j >= 0; j--) {
      longest[i * width + j] = before[start + i] === after[start + j]
        ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  for (let i = 0, j = 0; i < rows && j < columns;) {
    if (before[start + i] === after[start + j]) {
      kept[0][start + i++] = kept[1][start + j++] = 1;
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  return kept;
}

function answer(parent, row, side, pieces, kept) {
  const box = add(parent, "div", undefined, "answer");
  const name = ["before", "after"][side];
  const right = row.solved === 3 || row.solved === (side ? 0 : 1);
  add(box, "h4", name + ": " + (right ? "✓ right" : "✗ wrong"), right ? "good" : "bad");
  const loss = row.loss ? ", loss " + row.loss[side] + " nats a token" : "";
  add(box, "p", "answer " + (row.answer[side] ?? "-") + " (" + row.tokens[side] + " tokens" + loss + ")",
    "note");
  const text = add(box, "pre");
  for (let place = 0; place < pieces.length;) {
    let end = place + 1;
    while (end < pieces.length && kept[end] === kept[place]) end++;
    const run = pieces.slice(place, end).join("");
    if (kept[place]) text.append(run);
    else add(text, "mark", run);
    place = end;
  }
}

function table(parent, title, columns, rows) {
  const box = add(parent, "div");
  add(box, "h4", title);
  const made = add(box, "table");
  const head = add(add(made, "thead"), "tr");
  for (const column of columns) add(head, "th", column);
  const body = add(made, "tbody");
  for (const row of rows) {
    const line = add(body, "tr");
    for (const text of row) add(line, "td", text);
  }
}

// A pixel an edge, sources down and targets across; dark is strong, and what is no edge is left out.
function matrix(parent, graph, packed, name) {
  const levels = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const figure = add(parent, "figure");
  const canvas = add(figure, "canvas");
  canvas.width = graph.targets.length;
  canvas.height = graph.sources.length;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Edge matrix " + name);
  const draw = canvas.getContext("2d");
  const image = draw.createImageData(canvas.width, canvas.height);
  let place = 0;
  graph.reads.forEach((count, target) => {
    for (let source = 0; source < count; source++) {
      const at = 4 * (source * canvas.width + target);
      const level = levels[place++];
      image.data.set([245 - 0.9 * level, 245 - 0.62 * level, 250 - 0.3 * level, 255], at);
    }
  });
  draw.putImageData(image, 0, 0);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const source = Math.floor((event.clientY - box.top) / box.height * canvas.height);
    const target = Math.floor((event.clientX - box.left) / box.width * canvas.width);
    const is = source >= 0 && target >= 0 && source < graph.reads[target];
    caption.textContent = name + (is ? ": " + graph.sources[source] + " → " + graph.targets[target] : "");
  });
  const caption = add(figure, "figcaption", name);
}

// The tokens of one model's text, each as strongly coloured as its share.
function carried(parent, row, side) {
  const levels = Uint8Array.from(atob(row.levels[side]), (letter) => letter.charCodeAt(0));
  const figure = add(parent, "figure");
  const text = add(figure, "pre", undefined, "tokens");
  row.pieces[side].forEach((piece, place) => {
    const part = add(text, "span", piece);
    part.style.setProperty("--share", (50 * levels[place] / 255).toFixed(0) + "%");
    part.title = (100 * row.largest * levels[place] / 255).toFixed(1) + " % at token " + (place + 1);
  });
  add(figure, "figcaption", ["before", "after"][side]);
}

function open(pair, row) {
  const box = part("");
  box.replaceChildren();
  state.chosen = row;
  for (const line of part("list").querySelectorAll("tr")) {
    line.classList.toggle("chosen", line.dataset.place === String(pair.rows.indexOf(row)));
  }
  add(box, "h3", "question " + row.id + ": " + found.words[row.solved]);
  if (found.texts[row.text[0]]) add(box, "pre", found.texts[row.text[0]]);
  else add(box, "p", found.lost, "note");
  add(box, "p", "right answer: " + row.gold);
  const pieces = [1, 2].map((side) => words(found.texts[row.text[side]]));
  const kept = same(...pieces);
  const answers = add(box, "div", undefined, "answers");
  for (const side of [0, 1]) answer(answers, row, side, pieces[side], kept[side]);
  if (!row.edges) {
    add(box, "p", "Its edges were not scored: only questions that both models solve at a usual " +
      "length are.", "note");
    return;
  }
  const tables = add(box, "div", undefined, "answers");
  table(tables, "Edges that changed most, alpha " + pair.alpha, ["edge", "before", "after"],
    row.edges.map(([source, target, before, after]) =>
      [pair.graph.sources[source] + " → " + pair.graph.targets[target], before, after]));
  table(tables, "Its share of each change", ["metric", "share"],
    row.shares.map(([name, share]) => [name, (100 * share).toFixed(1) + " %"]));
  if (row.pieces) {
    add(box, "h4", "Which tokens carry the scores");
    const texts = add(box, "div", undefined, "answers");
    row.pieces.forEach((_, side) => carried(texts, row, side));
    add(box, "p", "Strong colour is a large share of the sum of |score| over all edges and tokens; the strongest has "
      + (100 * row.largest).toFixed(1) + " %. Point at a token for its own.", "note");
  }
  if (row.tokens_elsewhere) add(box, "p", "Its tokens' shares are too much for this page; probe problems "
    + "RUN " + row.id + " shows them.", "note");
  if (!row.matrices) return;
  add(box, "h4", "Its edges, source down and target across");
  const both = add(box, "div", undefined, "matrices");
  row.matrices.forEach((packed, side) => matrix(both, pair.graph, packed, ["before", "after"][side]));
  add(box, "p", "Dark is strong, over " + found.decades + " powers of ten below the largest.", "note");
}

function list() {
  const pair = found.pairs[state.pair];
  const wanted = state.search.trim().toLowerCase();
  const has = (row) => !wanted || [row.id, row.gold, ...row.answer, ...row.text.map((t) => found.texts[t])]
    .some((text) => text !== null && text.toLowerCase().includes(wanted));
  const rows = pair.rows.filter((row) => (state.solved === "" || row.solved === +state.solved) && has(row));
  const box = part("list");
  box.replaceChildren();
  const made = add(box, "table");
  const head = add(add(made, "thead"), "tr");
  for (const name of ["id", "solved", "right", "before", "after", "question"]) add(head, "th", name);
  const body = add(made, "tbody");
  for (const row of rows.slice(0, MOST)) {
    const line = add(body, "tr");
    line.dataset.place = pair.rows.indexOf(row);
    const button = add(add(line, "td"), "button", row.id);
    button.type = "button";
    const start = (text) => { const line = (text ?? "-").replace(/\s+/g, " "); return line.length > 40 ? line.slice(0, 39) + "…" : line; };
    for (const text of [found.words[row.solved].replace("solved ", ""), row.gold, ...row.answer,
      found.texts[row.text[0]] || "(not here)"]) add(line, "td", start(text));
    line.addEventListener("click", () => open(pair, row));
  }
  const more = rows.length > MOST ? ", the first " + MOST + " shown" : "";
  part("count").textContent = rows.length + " of " + pair.rows.length + more;
  if (rows.length && !rows.includes(state.chosen)) open(pair, rows[0]);
}

function choices() {
  const pair = found.pairs[state.pair];
  const select = part("solved");
  select.replaceChildren();
  add(select, "option", "all: " + pair.rows.length).value = "";
  found.words.forEach((name, place) => {
    const count = pair.rows.filter((row) => row.solved === place).length;
    add(select, "option", name.replace("solved ", "") + ": " + count).value = place;
  });
  select.value = state.solved;
}

found.pairs.forEach((pair, place) => { add(part("pair"), "option", pair.title).value = place; });
part("pair").addEventListener("change", (event) => { state.pair = +event.target.value; choices(); list(); });
part("solved").addEventListener("change", (event) => { state.solved = event.target.value; list(); });
part("search").addEventListener("input", (event) => { state.search = event.target.value; list(); });
choices();
list();
}
