"use strict";
const BEGAN = performance.now();
const SEPARATOR = "\x1f"; // between tokens
const KEPT = 16; // pieces in memory
const $ = (selector) => document.querySelector(selector);

/** An element with a text, which is never read as markup. */
function make(tag, text = "", attributes = {}, ...children) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}

const number = (value) => (value === null || Number.isNaN(value) ? "–" : String(Number(value.toPrecision(3))));
const percent = (share) => `${number(100 * share)}%`;
const visible = (token) => token.replaceAll("\n", "↵").replaceAll("\r", "").replaceAll("\t", "⇥");

async function unpacked(id) {
  const text = document.getElementById(id).textContent;
  let bytes;
  if (Uint8Array.fromBase64) bytes = Uint8Array.fromBase64(text);
  else {
    const binary = atob(text);
    bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  }
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const pieces = new Map();

/** Details of the features of one piece; the latest ones are kept. */
function piece(index) {
  const found = pieces.get(index) ?? unpacked(`piece-${index}`);
  pieces.delete(index);
  pieces.set(index, found);
  if (pieces.size > KEPT) pieces.delete(pieces.keys().next().value);
  return found;
}

/** All features of all models, a row each, with columns to sort and filter by. */
class Rows {
  constructor(index) {
    this.models = index.models;
    this.together = index.together;
    this.length = this.models.reduce((all, model) => all + model.feature.length, 0);
    this.model = new Uint16Array(this.length);
    for (const name of ["density", "kurtosis", "min", "max", "auc"]) this[name] = new Float64Array(this.length).fill(NaN);
    this.dead = new Uint8Array(this.length);
    this.dense = new Uint8Array(this.length);
    this.starts = [];
    let start = 0;
    this.models.forEach((model, m) => {
      this.starts.push(start);
      model.place = new Map(model.feature.map((feature, i) => [feature, start + i]));
      for (let i = 0; i < model.feature.length; i++) {
        this.model[start + i] = m;
        for (const name of ["density", "kurtosis", "min", "max", "auc"]) this[name][start + i] = model[name][i] ?? NaN;
      }
      model.dead.forEach((i) => { this.dead[start + i] = 1; });
      model.dense.forEach((i) => { this.dense[start + i] = 1; });
      start += model.feature.length;
    });
    this.lowered = null;
  }

  local(row) { return row - this.starts[this.model[row]]; }
  of(row) { return this.models[this.model[row]]; }
  feature(row) { return this.of(row).feature[this.local(row)]; }
  column(row, name) { return this.of(row)[name][this.local(row)]; }
  /** The words of a language model where there are some, else the automatic label. */
  title(row) { return this.column(row, "explanations") || this.column(row, "labels"); }
  /** Its title, else the tokens that its highest and lowest passages are shown for. */
  heading(row) { return this.title(row) || this.column(row, "tokens").split(SEPARATOR).slice(0, 8).map((token) => visible(token).trim()).join(" "); }
  /** Its largest absolute value. */
  largest(row) { return Math.max(Math.abs(this.min[row]), Math.abs(this.max[row])) || 1; }

  /** What a feature is called beside others of its model. */
  name(row) { return this.nameOf(this.of(row), this.feature(row)); }
  nameOf(model, feature) {
    if (model.blocks === 1) return String(feature);
    const width = model.n_features / model.blocks;
    return `${Math.floor(feature / width)}:${feature % width}`;
  }
  address(row) { return `${this.of(row).label}/${this.name(row)}`; }

  /** The row that `LABEL/UNIT` or `LABEL/BLOCK:UNIT` names; -1 if it is not on the page. */
  find(address) {
    const cut = address.lastIndexOf("/");
    const model = this.models.find((each) => each.label === address.slice(0, cut));
    const parts = address.slice(cut + 1).match(/^(?:(\d+):)?(\d+)$/);
    if (!model || !parts) return -1;
    const block = parts[1] === undefined ? 0 : Number(parts[1]);
    return model.place.get(block * (model.n_features / model.blocks) + Number(parts[2])) ?? -1;
  }

  async details(row) {
    const local = this.local(row);
    return (await piece(this.of(row).piece + Math.floor(local / this.together)))[local % this.together];
  }

  /** What is searched at once, in lower case. */
  words(row) {
    this.lowered ??= new Array(this.length);
    return (this.lowered[row] ??= {
      label: `${this.column(row, "labels")}\n${this.column(row, "explanations")}`.toLowerCase(),
      token: this.column(row, "tokens").toLowerCase().split(SEPARATOR).map((token) => token.trim()),
      task: (this.column(row, "task") ?? "").toLowerCase(),
      name: this.address(row).toLowerCase(),
    });
  }

  /** Whether a row has what is searched among what is known at once. */
  matches(row, query, where) {
    const words = this.words(row);
    if (where === "label") return words.label.includes(query);
    if (where === "task") return words.task.includes(query);
    if (where === "token") return words.token.includes(query.trim());
    return where === "any" && (words.label.includes(query) || words.task.includes(query)
      || words.token.includes(query.trim()) || words.name === query || words.name.endsWith(`/${query}`));
  }

  passes(row, state) {
    if (state.model && this.of(row).label !== state.model) return false;
    if (state.show === "alive" && this.dead[row]) return false;
    if (state.show === "sparse" && (this.dead[row] || this.dense[row])) return false;
    if (state.show === "dead" && !this.dead[row]) return false;
    if (state.show === "dense" && !this.dense[row]) return false;
    if (state.show === "tasks" && Number.isNaN(this.auc[row])) return false;
    const least = (value, bound) => bound === "" || value >= Number(bound);
    return least(100 * this.density[row], state.density_min) && least(this.kurtosis[row], state.kurtosis_min)
      && least(this.auc[row], state.auc_min)
      && (state.density_max === "" || 100 * this.density[row] <= Number(state.density_max));
  }

  /** The rows that pass, in order; `hits` marks those found by reading the passages. */
  found(state, hits) {
    const query = state.q.toLowerCase();
    const kept = [];
    for (let row = 0; row < this.length; row++) {
      if (this.passes(row, state) && (!query || hits[row] || this.matches(row, query, state.in))) kept.push(row);
    }
    const [name, way] = state.sort.split(":");
    if (!way) return kept;
    const values = name === "largest" ? (row) => this.largest(row) : (row) => this[name][row];
    const sign = way === "high" ? -1 : 1;
    const last = (value) => (Number.isNaN(value) ? Infinity : sign * value);
    const keyed = kept.map((row) => [last(values(row)), row]);
    keyed.sort((a, b) => (a[0] === b[0] ? a[1] - b[1] : a[0] - b[0]));
    return keyed.map(([, row]) => row);
  }
}

/** A passage as it is stored: text key, position, place of the peak, value there, largest value, tokens, hundredths. */
function passage([key, position, peak, value, scale, tokens, shares]) {
  return { key, position, peak, value, tokens: tokens.split(SEPARATOR), values: shares.map((x) => (x * scale) / 100) };
}

/** Whether the text of a stored passage has a query in it. */
const contains = (stored, query) => stored[5].replaceAll(SEPARATOR, "").toLowerCase().includes(query);

const writesToken = (details, query) =>
  details.writes.some(([, top, , bottom]) => [...top, ...bottom].some((token) => token.trim().toLowerCase() === query.trim()));

/** Reads the passages of some models, piece by piece, and lets the page live meanwhile. */
class Scan {
  constructor(rows) {
    this.rows = rows;
    this.run = 0;
  }

  stop() { this.run += 1; }

  /** Calls `look(row, details)` for each feature of the models, `progress(share)` now and then; false if stopped. */
  async over(models, look, progress) {
    this.run += 1;
    const own = this.run;
    const all = models.flatMap((m) => {
      const length = this.rows.models[m].feature.length;
      return Array.from({ length: Math.ceil(length / this.rows.together) }, (_, i) => [m, i]);
    });
    let told = performance.now();
    for (const [done, [m, i]] of all.entries()) {
      const details = await unpacked(`piece-${this.rows.models[m].piece + i}`);
      if (own !== this.run) return false;
      details.forEach((each, k) => look(this.rows.starts[m] + i * this.rows.together + k, each));
      if (performance.now() - told > 150) {
        progress((done + 1) / all.length);
        await new Promise((resolve) => { setTimeout(resolve); });
        if (own !== this.run) return false;
        told = performance.now();
      }
    }
    return true;
  }
}
