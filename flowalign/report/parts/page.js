"use strict";
// What flowalign's pages do: sort tables, show the values of a curve, lay two images over each other; and of an evaluation, its
// images, one prompt at a time, and the blind vote. Texts enter the page as text, never as markup.
const $ = (selector, root = document) => root.querySelector(selector);
const every = (selector, root = document) => [...root.querySelectorAll(selector)];
document.documentElement.classList.add("js");

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const minus = (text) => text.replace(/^-/, "−");
const show = (value) => (value === null ? "not valid" : minus(Number(value.toPrecision(3)).toString()));
const signed = (value) => (value > 0 ? "+" : "") + minus(Number(value.toPrecision(3)).toString());

function mixed(text) { // FNV-1a with a last mix: a number below 2^32 that depends on the text alone
  let hash = 0x811c9dc5;
  for (const letter of text) hash = Math.imul(hash ^ letter.codePointAt(0), 0x01000193);
  hash = Math.imul(hash ^ (hash >>> 15), 0x85ebca6b);
  return (hash ^ (hash >>> 13)) >>> 0;
}

// ---------------------------------------------------------------------------------------------- sortable tables

function sortTable(table, column) { // what is no number stands last in a column of numbers
  const head = table.tHead.rows[0].cells, body = table.tBodies[0], numbers = head[column].classList.contains("number");
  const text = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
  const value = (row) => Number.parseFloat(text(row).replace("−", "-").replaceAll(",", ""));
  const before = head[column].getAttribute("aria-sort");
  const down = before ? before === "ascending" : numbers; // numbers: the largest first
  const compare = (a, b) => (numbers ? value(a) - value(b) : text(a).localeCompare(text(b))) * (down ? -1 : 1);
  const rows = [...body.rows].sort((a, b) => (numbers && Number.isNaN(value(a)) - Number.isNaN(value(b))) || compare(a, b) || 0);
  for (const cell of head) cell.removeAttribute("aria-sort");
  head[column].setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows);
}

for (const table of every("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const button = make("button", { type: "button" }, ...cell.childNodes);
    button.addEventListener("click", () => sortTable(table, column));
    cell.append(button);
  });
}

// ------------------------------------------------------------------------------------------- the values of a curve

function nearest(steps, step) {
  return steps.reduce((best, each, place) => (Math.abs(each - step) < Math.abs(steps[best] - step) ? place : best), 0);
}

for (const chart of every("figure.chart")) {
  const points = JSON.parse(chart.dataset.points), svg = $("svg", chart), width = svg.viewBox.baseVal.width;
  const steps = [...new Set(points.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const cursor = document.createElementNS(svg.namespaceURI, "line");
  cursor.setAttribute("class", "cursor");
  const title = $("figcaption", chart).textContent.trim();
  const slider = make("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": `Iteration of ${title}` });
  const output = make("output", { "aria-live": "polite" });
  svg.after(slider, output);
  const point = (place) => {
    const step = steps[place], x = points.left + ((step - points.from) / (points.to - points.from)) * (points.right - points.left);
    for (const [name, value] of Object.entries({ x1: x, x2: x, y1: 8, y2: 158 })) cursor.setAttribute(name, value);
    svg.append(cursor);
    slider.value = place;
    const values = points.lines.map((line) => {
      const at = nearest(line.x, step), smooth = line.smooth && line.smooth[at] !== null ? ` (smoothed ${show(line.smooth[at])})` : "";
      return `${line.name ? line.name + " " : ""}${show(line.y[at])}${smooth}`;
    });
    output.textContent = `iteration ${step}: ${values.join("; ")}`;
    slider.setAttribute("aria-valuetext", output.textContent);
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * width;
    point(nearest(steps, points.from + ((x - points.left) / (points.right - points.left)) * (points.to - points.from)));
  });
  svg.addEventListener("pointerleave", () => { cursor.remove(); output.textContent = ""; });
  slider.addEventListener("input", () => point(Number(slider.value)));
  slider.addEventListener("blur", () => { cursor.remove(); output.textContent = ""; });
}

// ------------------------------------------------------------------------------------------------------- clips
// A small one is an animated picture, another one a video. They stand still, as the first frame, if the system asks for less motion.

let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) { target.dataset.seen = isIntersecting; roll(target); }
});

function roll(element) { // a page has few players (Chromium 75): a video that is not seen gives its own back
  const { clip, still } = element.dataset;
  if (element.tagName === "IMG") { element.src = playing ? clip : still; return; }
  const on = playing && element.dataset.seen === "true";
  if (on === element.hasAttribute("src")) return;
  if (on) { element.src = clip; } else { element.removeAttribute("src"); element.load(); }
}

function prepare(element) { // what has a clip
  if (element.tagName === "VIDEO") {
    Object.assign(element, { muted: true, autoplay: true, loop: true, playsInline: true });
    seen.observe(element);
  } else roll(element);
  return element;
}

function picture(still, clip, alt) { // clip: undefined of images
  if (!clip) return make("img", { alt, src: still });
  const video = clip.startsWith("data:video");
  const element = make(video ? "video" : "img", video ? { role: "img", "aria-label": alt, poster: still } : { alt });
  Object.assign(element.dataset, { still, clip });
  return prepare(element);
}

function together(elements) { // in step, also when one of them is loaded later
  const videos = elements.filter((each) => each.tagName === "VIDEO");
  for (const video of videos) video.addEventListener("loadeddata", () => { for (const each of videos) each.currentTime = 0; });
}

function play(on) {
  playing = on;
  for (const element of every("[data-clip]")) roll(element);
  for (const button of every(".play")) button.textContent = on ? "❚❚ Stop the clips" : "▶ Play the clips";
}

for (const button of every(".play")) button.addEventListener("click", () => play(!playing));
for (const element of every("[data-clip]")) prepare(element);
play(playing);

// ------------------------------------------------------------------------- two images over each other, and what cuts them

function overlay(left, right, names) {
  const frame = make("div", { class: "frame" }, left, right);
  together([left, right]);
  const slider = make("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": `${names[0]} left of the cut, ${names[1]} right of it` });
  const cut = (value) => { slider.value = value; frame.style.setProperty("--cut", `${slider.value}%`); };
  slider.addEventListener("input", () => cut(slider.value));
  const drag = (event) => {
    const box = frame.getBoundingClientRect();
    if (event.buttons) cut((100 * (event.clientX - box.left)) / box.width);
  };
  frame.addEventListener("pointerdown", (event) => { frame.setPointerCapture(event.pointerId); drag(event); });
  frame.addEventListener("pointermove", drag);
  const labels = make("div", { class: "names" }, make("span", {}, `◂ ${names[0]}`), make("span", {}, `${names[1]} ▸`));
  return make("div", { class: "overlay" }, frame, slider, labels);
}

function copy(image) {
  const { clip, still } = image.dataset;
  return picture(still || image.poster || image.src, clip, image.alt || image.ariaLabel);
}

for (const pair of every(".pairs .pair")) { // of a training report
  const button = make("button", { type: "button", "aria-pressed": "false" }, "Lay over each other");
  let over = null;
  button.addEventListener("click", () => {
    const images = every("img, video", pair).slice(-2), names = every("span", pair).slice(-2);
    if (over) over.remove();
    over = over ? null : overlay(...images.map((image) => copy(image)), names.map((name) => name.textContent));
    pair.hidden = Boolean(over);
    if (over) pair.after(over);
    button.setAttribute("aria-pressed", String(Boolean(over)));
  });
  pair.parentElement.append(button);
}

// ------------------------------------------------------------------------------------------- images of an evaluation

const data = $("#data") && JSON.parse($("#data").textContent);
if (data) evaluation(data);

function evaluation({ columns, rewards, rows, seed, samples, digest, clips, sources }) {
  const name = (row) => (samples > 1 ? `${row.uid}-${row.sample}` : `${row.uid}`);
  const difference = (row, column, reward) => {
    const [base, value] = [row.scores[0][reward], row.scores[column][reward]];
    return column === 0 || base === null || value === null ? null : value - base;
  };
  const meta = (row) => `uid ${row.uid}, ${samples > 1 ? `sample ${row.sample}, ` : ""}seed ${seed}`;
  const label = (column) => (column < 0 ? "source" : columns[column]);
  const image = (row, column, alt) => (column < 0 ? make("img", { alt, src: sources[row.uid] }) : picture(row.images[column], row.clips[column], alt));

  function change(value) { // in color, with a sign and an arrow
    const kind = value > 0 ? "better" : value < 0 ? "worse" : "soft";
    return make("b", { class: kind }, value > 0 ? `▲ ${signed(value)}` : value < 0 ? `▼ ${signed(value)}` : "=");
  }

  function values(row, column) {
    const lines = rewards.map((reward, place) => {
      const gain = difference(row, column, place), value = make("dd", {}, show(row.scores[column][place]));
      if (gain !== null) value.append(" ", change(gain));
      return make("div", {}, make("dt", {}, reward), value);
    });
    return make("dl", { class: "values" }, ...lines);
  }

  function figures(row, wrap) {
    const places = [...(sources[row.uid] ? [-1] : []), ...columns.keys()];
    const images = places.map((place) => image(row, place, `${label(place)}: ${row.prompt}`));
    together(images);
    const found = places.map((place, number) => make("div", { class: "column" },
      make("div", { class: "label" }, label(place)), wrap(images[number], label(place)), place < 0 ? "" : values(row, place)));
    return make("div", { class: "columns" }, ...found);
  }

  // ---- the cards: in an order, filtered, page by page
  const size = 24, cards = $("#cards");
  let chosen = rows, first = 0;

  function ordered() {
    const order = $("#order").value, reward = Number($("#by").value), column = Number($("#against").value);
    const words = $("#filter").value.toLowerCase();
    const found = rows.filter((row) => row.prompt.toLowerCase().includes(words) || name(row) === words);
    const value = (row) => (columns.length > 1 ? difference(row, column, reward) : row.scores[0][reward]);
    const sign = order === "gains" ? -1 : 1;
    if (order === "chance") return found.sort((a, b) => mixed(`chance ${name(a)}`) - mixed(`chance ${name(b)}`));
    if (order === "file") return found;
    return found.sort((a, b) => (value(a) === null) - (value(b) === null) || sign * (value(a) - value(b)));
  }

  function card(row) {
    const wrap = (picture, column) => {
      const button = make("button", { type: "button", class: "open", "aria-label": `${column}: ${row.prompt}: look closer` }, picture);
      button.addEventListener("click", () => open(row));
      return button;
    };
    const heading = make("h3", {}, row.prompt);
    return make("article", { class: "card", "data-name": name(row) }, heading, make("p", { class: "meta" }, meta(row)), figures(row, wrap));
  }

  function render() {
    const shown = chosen.slice(first, first + size);
    cards.replaceChildren(...shown.map(card));
    $("#place").textContent = chosen.length ? `${first + 1}–${first + shown.length} of ${chosen.length}` : "no prompt has this text";
    $("#back").disabled = first === 0;
    $("#on").disabled = first + size >= chosen.length;
  }

  function reorder() { chosen = ordered(); first = 0; render(); }
  for (const id of ["order", "by", "against"]) $(`#${id}`).addEventListener("change", reorder);
  $("#filter").addEventListener("input", reorder);
  for (const [id, way] of [["back", -1], ["on", 1]]) {
    $(`#${id}`).addEventListener("click", () => { first += way * size; render(); $("#images").scrollIntoView(); });
  }
  cards.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key], buttons = every(".open", cards);
    const next = buttons[buttons.indexOf(document.activeElement) + way];
    if (next) { next.focus(); event.preventDefault(); }
  });

  for (const button of every(".play")) button.hidden = !clips;

  // ---- one prompt, large
  const detail = $("#detail");
  let current = null;

  function open(row) {
    current = row;
    const place = chosen.indexOf(row);
    $("#detail-prompt").textContent = row.prompt;
    $("#detail-meta").textContent = meta(row);
    $("#detail-place").textContent = place < 0 ? "" : `${place + 1} of ${chosen.length}`;
    $("#detail-figures").replaceChildren(figures(row, (picture) => picture));
    $("#detail-before").disabled = place <= 0;
    $("#detail-after").disabled = place === chosen.length - 1;
    lay();
    if (!detail.open) detail.showModal();
    remember(`#prompt-${name(row)}`);
  }

  function lay() {
    if (columns.length < 2) return;
    const [left, right] = ["#left", "#right"].map((id) => Number($(id).value));
    const pictures = [left, right].map((place) => image(current, place, `${label(place)}: ${current.prompt}`));
    $("#overlay").replaceChildren(overlay(...pictures, [label(left), label(right)]));
  }

  function remember(hash) { // of a file some browsers do not allow it
    try { history.replaceState(null, "", hash || location.pathname + location.search); } catch { /* the link stays as it was */ }
  }

  const move = (way) => { const next = chosen[chosen.indexOf(current) + way]; if (next) open(next); };
  for (const id of ["#left", "#right"]) $(id)?.addEventListener("change", lay);
  $("#detail-before").addEventListener("click", () => move(-1));
  $("#detail-after").addEventListener("click", () => move(1));
  $("#detail-close").addEventListener("click", () => detail.close());
  detail.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (way && !event.target.matches("input, select")) { move(way); event.preventDefault(); }
  });
  detail.addEventListener("close", () => { // back to the card, on whatever page it is
    remember("");
    const at = chosen.indexOf(current);
    if (at >= 0 && (at < first || at >= first + size)) { first = at - (at % size); render(); }
    every(".card").find((each) => each.dataset.name === name(current))?.querySelector(".open").focus();
  });
  const follow = () => {
    const row = rows.find((each) => location.hash === `#prompt-${name(each)}` || (!each.sample && location.hash === `#prompt-${each.uid}`));
    if (row) open(row);
  };
  addEventListener("hashchange", follow);
  reorder();
  follow();
  if (columns.length > 1) voting({ columns, rows, seed, digest, clips, sources, name, image });
}

// ----------------------------------------------------------------------------------------------------- the blind vote

function voting({ columns, rows, seed, digest, clips, sources, name, image }) {
  const dialog = $("#vote");
  let pair, votes, queue; // votes: [name of the row, chosen column or −1 for a tie], in the order they were given

  const key = () => `flowalign votes ${digest} ${pair.join(" ")}`;
  function load() {
    pair = ["#vote-a", "#vote-b"].map((id) => Number($(id).value));
    try { votes = JSON.parse(localStorage.getItem(key())) || []; } catch { votes = []; }
    queue = [...rows].sort((a, b) => mixed(`vote ${seed} ${name(a)}`) - mixed(`vote ${seed} ${name(b)}`));
    $("#vote-results").hidden = true;
    state();
  }
  function state() {
    const all = votes.length === rows.length;
    $("#vote-start").disabled = pair[0] === pair[1] || all;
    $("#vote-start").textContent = all ? "All voted" : votes.length ? `Go on (${votes.length} of ${rows.length})` : "Vote";
    $("#vote-reveal").disabled = !votes.length;
  }
  function save() {
    try { localStorage.setItem(key(), JSON.stringify(votes)); } catch { /* a page of a file may not: votes last until it is closed */ }
  }
  const done = () => new Set(votes.map(([voted]) => voted));
  const next = () => { const seen = done(); return queue.find((row) => !seen.has(name(row))); };
  const sides = (row) => (mixed(`side ${seed} ${name(row)} ${pair}`) & 1 ? [pair[1], pair[0]] : pair);

  function ask() {
    const row = next();
    $("#vote-progress").value = votes.length;
    $("#vote-count").textContent = `${votes.length} of ${rows.length}`;
    $("#vote-undo").disabled = !votes.length;
    if (!row) { dialog.close(); reveal(); return; }
    $("#vote-prompt").textContent = row.prompt;
    if (sources[row.uid]) $("#vote-source").replaceChildren(image(row, -1, "the source"), make("figcaption", { class: "meta" }, "source"));
    const images = ["left", "right"].map((side, place) => image(row, sides(row)[place], `the ${side} image`));
    together(images);
    ["left", "right"].forEach((side, place) => $(`#vote-${side}`).replaceChildren(images[place], side));
    $("#vote-prompt").focus(); // so that the space bar does not press the last button again
  }
  function give(place) {
    const row = next();
    votes.push([name(row), place === null ? -1 : sides(row)[place]]);
    save();
    ask();
  }
  function undo() { if (votes.pop()) { save(); ask(); } }

  function interval(wins, n) { // Wilson's, 95 %
    const z = 1.96, p = wins / n, middle = (p + (z * z) / (2 * n)) / (1 + (z * z) / n);
    const half = (z * Math.sqrt((p * (1 - p)) / n + (z * z) / (4 * n * n))) / (1 + (z * z) / n);
    return [Math.max(0, middle - half), Math.min(1, middle + half)].map((bound) => `${(100 * bound).toFixed(0)} %`).join(" to ");
  }
  function reveal() {
    const [a, b] = pair.map((column) => columns[column]), count = (which) => votes.filter(([, column]) => column === which).length;
    const [wins, losses, ties] = [count(pair[1]), count(pair[0]), count(-1)], decided = wins + losses;
    const share = decided ? `: ${((100 * wins) / decided).toFixed(0)} % of the decided votes, 95 % interval ${interval(wins, decided)}` : "";
    $("#vote-sentence").textContent = `${b} against ${a}: ${wins} wins, ${losses} losses, ${ties} ties in ${votes.length} votes${share}.`;
    $("#vote-lines").textContent = `${decided} preference pairs, a line each; ${ties} ties are left out.`;
    $("#vote-results").hidden = false;
    state();
    $("#vote-results").focus();
  }
  function lines() {
    const find = new Map(rows.map((row) => [name(row), row]));
    return votes.filter(([, column]) => column >= 0).map(([voted, column]) => {
      const row = find.get(voted), other = pair[0] === column ? pair[1] : pair[0];
      const file = (which) => `images/${columns[which]}/${row.uid}-${row.sample}.${clips ? "webp" : "png"}`;
      return JSON.stringify({ prompt: row.prompt, uid: row.uid, sample: row.sample, seed, chosen: file(column), rejected: file(other),
        chosen_column: columns[column], rejected_column: columns[other] }) + "\n";
    }).join("");
  }

  for (const id of ["#vote-a", "#vote-b"]) $(id).addEventListener("change", load);
  $("#vote-start").addEventListener("click", () => { $("#vote-results").hidden = true; dialog.showModal(); ask(); });
  $("#vote-left").addEventListener("click", () => give(0));
  $("#vote-right").addEventListener("click", () => give(1));
  $("#vote-tie").addEventListener("click", () => give(null));
  $("#vote-undo").addEventListener("click", undo);
  $("#vote-end").addEventListener("click", () => dialog.close());
  $("#vote-reveal").addEventListener("click", reveal);
  $("#vote-anew").addEventListener("click", () => { votes = []; save(); load(); $("#vote-start").focus(); });
  dialog.addEventListener("close", state);
  dialog.addEventListener("keydown", (event) => {
    const act = { ArrowLeft: () => give(0), ArrowRight: () => give(1), 0: () => give(null), " ": () => give(null), u: undo, Backspace: undo }[event.key];
    if (act && !(event.key === " " && event.target.matches("button"))) { event.preventDefault(); act(); }
  });
  $("#vote-save").addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([lines()], { type: "application/jsonl" }));
    make("a", { href: url, download: "preferences.jsonl" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  });
  $("#vote-copy").addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(lines()); $("#vote-copied").textContent = "copied"; } catch {
      $("#vote-text").hidden = false; // a page of a file may not reach the clipboard: to be copied by hand
      $("#vote-text").value = lines();
      $("#vote-text").select();
    }
  });
  load();
}
