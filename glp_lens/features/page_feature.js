const CURVES = { top_value: "value on its top tokens", stability: "share of variance that is the token's, not the noise's",
                 ablation: "change of the velocity when ablated", jacobian_norm: "length of the Jacobian",
                 jacobian_agreement: "agreement of its Jacobians on its top tokens", jacobian_cosine: "cosine of the Jacobian with that at the features' sigma" };
const TERMS = {
  "Name, as in glp/0:69": "Unit 69 of block 0 of the model glp, both counted from 0; of a model without blocks the number alone.",
  "Label": "Tokens on which its highest passages peak, after “near” those around them, after “low” the same of its lowest passages. A program counts them; what a language model has written is marked so.",
  "On": "Above zero; of a feature that takes both signs, further from zero than a tenth of its largest value. Dead: the same value on every token. Dense: on in more than a tenth of them.",
  "σ": "The noise level at which a GLP reads an activation: 0 is the activation, 1 is noise.",
  "Kurtosis": "Excess kurtosis of its values over all tokens: 0 for a bell curve, hundreds for a feature that is strong on few tokens and still on all others.",
  "Best at a task, AUC": "A probing task for which glp-lens probe chose it among all features of its model, and how well it alone tells the two classes of test texts apart: 0.5 is chance, 1 is perfect.",
};

/** What one feature, one text, and the whole folder look like. */
class View {
  constructor(rows, about, link) {
    this.rows = rows;
    this.about = about;
    this.link = link; // changes of the state -> address
  }

  feature(row) { return make("a", this.rows.address(row), { href: this.link({ f: this.rows.address(row), text: "", read: "" }) }); }

  /** Tokens coloured by value over `largest`; the peak and what was searched underlined. */
  tokens(tokens, values, largest, { peak = -1, query = "" } = {}) {
    const line = make("div", "", { class: "tokens", dir: "auto" });
    const hits = new Set();
    const text = tokens.join("").toLowerCase();
    if (query && text.length === tokens.join("").length) {
      const ends = [];
      tokens.reduce((at, token) => { ends.push(at + token.length); return at + token.length; }, 0);
      for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + query.length)) {
        ends.forEach((end, i) => { if (end > at && end - tokens[i].length < at + query.length) hits.add(i); });
      }
    }
    tokens.forEach((token, i) => {
      const value = values[i];
      const known = value !== null && value !== undefined;
      const span = make("span", visible(token), { title: `${visible(token)}  ${known ? number(value) : "left out"}` });
      if (known && Math.abs(value) / largest > 0.01) {
        span.style.setProperty("--v", Math.min(1, Math.abs(value) / largest).toFixed(3));
        if (value < 0) span.classList.add("low");
      }
      if (i === peak) span.classList.add("peak");
      if (hits.has(i)) span.classList.add("hit");
      line.append(span);
    });
    return line;
  }

  passages(stored, row, query) {
    const list = make("ol", "", { class: "passages" });
    const largest = this.rows.largest(row);
    for (const each of stored) {
      const { key, position, peak, value, tokens, values } = passage(each);
      const about = make("small", `${number(value)} at token ${position} `);
      about.append(make("a", "compare", { class: "no-print", title: "Features of other models that have this text among their passages", href: this.link({ text: key, a: this.rows.of(row).label }) }));
      list.append(make("li", "", {}, this.tokens(tokens, values, largest, { peak, query }), about));
    }
    return list;
  }

  facts(pairs) {
    const list = make("dl", "", { class: "facts" });
    for (const [name, value] of pairs) list.append(make("div", "", {}, make("dt", name), make("dd", value)));
    return list;
  }

  table(head, body) {
    const table = make("table");
    table.append(make("thead", "", {}, make("tr", "", {}, ...head.map((text) => make("th", text, { scope: "col" })))));
    table.append(make("tbody", "", {}, ...body.map((cells) => make("tr", "", {}, ...cells.map((cell) =>
      cell instanceof Node ? make("td", "", {}, cell) : make("td", cell))))));
    return make("div", "", { class: "scroll" }, table);
  }

  histogram({ low, high, histogram }, on) {
    const [width, height] = [360, 90];
    const most = Math.log1p(Math.max(...histogram, 1));
    const image = draw("svg", { viewBox: `0 0 ${width} ${height + 16}`, width, height: height + 16, role: "img", "aria-label": "Histogram" });
    histogram.forEach((count, i) => {
      const step = (high - low) / histogram.length;
      const tall = (height * Math.log1p(count)) / most;
      const bar = draw("rect", { x: (i * width) / histogram.length, y: height - tall, width: Math.max(1, width / histogram.length - 1),
                                 height: tall, class: low + (i + 0.5) * step >= on ? "bar on" : "bar" });
      bar.append(draw("title", {}, `${number(low + i * step)} to ${number(low + (i + 1) * step)}: ${count.toLocaleString("en")} tokens`));
      image.append(bar);
    });
    image.append(draw("line", { x1: 0, x2: width, y1: height, y2: height, class: "axis" }), draw("text", { x: 0, y: height + 12 }, number(low)),
      draw("text", { x: width, y: height + 12, "text-anchor": "end" }, number(high)));
    return make("figure", "", {}, image, make("figcaption", "Values of a sample of tokens; heights are logarithms of counts"));
  }

  curve(points, title) {
    const known = points.filter(([, y]) => y !== null && y !== undefined);
    if (!known.length) return null;
    const [width, height, edge] = [190, 80, 26];
    const ys = known.map(([, y]) => y);
    const [low, high] = [Math.min(0, ...ys), Math.max(...ys, 1e-12)];
    const right = Math.max(...known.map(([x]) => x)) || 1;
    const place = ([x, y]) => [edge + ((width - edge - 6) * x) / right, 6 + ((height - 6) * (high - y)) / (high - low || 1)];
    const image = draw("svg", { viewBox: `0 0 ${width} ${height + 16}`, width, height: height + 16, role: "img", "aria-label": title });
    image.append(draw("line", { x1: edge, x2: width, y1: height, y2: height, class: "axis" }),
      draw("polyline", { points: known.map((p) => place(p).join(",")).join(" "), class: "curve" }));
    for (const p of known) {
      const [cx, cy] = place(p);
      const dot = draw("circle", { cx, cy, r: 3, class: "dot" });
      dot.append(draw("title", {}, `sigma ${p[0]}: ${number(p[1])}`));
      image.append(dot);
    }
    image.append(draw("text", { x: 0, y: 12 }, number(high)), draw("text", { x: 0, y: height }, number(low)),
      draw("text", { x: edge, y: height + 12 }, "sigma 0"), draw("text", { x: width, y: height + 12, "text-anchor": "end" }, String(right)));
    return make("figure", "", {}, image, make("figcaption", title));
  }

  words(tokens, numbers) {
    const line = make("div", "", { class: "words" });
    tokens.forEach((token, i) => line.append(make("span", "", { title: number(numbers[i]) }, make("code", visible(token)))));
    return line;
  }

  /** Everything known of one feature. */
  one(row, details, query) {
    const { rows } = this;
    const model = rows.of(row);
    const parts = [];
    const title = make("h2", rows.address(row));
    for (const [name, is] of [["dead", rows.dead[row]], ["dense", rows.dense[row]]]) if (is) title.append(make("span", name, { class: "tag" }));
    parts.push(title);
    if (details.explanation) {
      const [text, n, ...scores] = details.explanation;
      parts.push(make("p", text, {}, make("span", "explained by a language model", { class: "tag" })));
      const said = ["detection", "detection among near neighbours", "fuzzing"].map((name, i) => {
        const [value, low, high] = scores.slice(3 * i, 3 * i + 3);
        return value === null ? "" : `${name} ${number(value)}${low === null ? "" : ` [${number(low)}, ${number(high)}]`}`;
      });
      parts.push(make("p", `Scores of the explanation: ${said.filter(Boolean).join(", ") || "none"}; ${n} passages.`, { class: "soft" }));
    }
    if (rows.column(row, "labels")) {
      const [tokens, odds, context, contextOdds] = details.label;
      const line = make("p", rows.column(row, "labels"));
      line.append(make("span", "automatic label", { class: "tag", title: "Tokens that are more frequent where the feature is high; nobody wrote it." }));
      parts.push(line);
      for (const [name, words, numbers] of [["on", tokens, odds], ["near", context, contextOdds]]) {
        if (words?.length) parts.push(make("div", "", { class: "words" }, make("small", name), ...this.words(words, numbers).children));
      }
    }
    parts.push(this.facts([
      ["On in", `${percent(rows.density[row])} of tokens`], ["Mean", number(details.mean)], ["Std", number(details.std)],
      ["Excess kurtosis", number(rows.kurtosis[row])], ["Least", number(rows.min[row])], ["Largest", number(rows.max[row])],
      ["Model", this.kind(model)], ["At", model.hook],
    ]));
    if (rows.dead[row]) parts.push(make("p", "It has the same value on every token, so there is nothing else to show."));
    if (details.histogram.length && details.high > details.low) parts.push(this.histogram(details, model.signed ? 0 : Number.MIN_VALUE));
    const [main, bands] = [["top", "bottom"], []].map((wanted) => details.examples.filter(([group]) => wanted.length ? wanted.includes(group) : group.startsWith("band")));
    if (main.length) {
      const sides = make("div", "", { class: "sides" });
      for (const [group, stored] of main) {
        sides.append(make("div", "", {}, make("h3", group === "top" ? "Where it is highest" : "Where it is lowest"), this.passages(stored, row, query)));
      }
      parts.push(sides);
    }
    if (bands.length) parts.push(this.bands(bands, row, query));
    parts.push(...this.writes(details), ...this.neighbours(details), ...this.prior(details), ...this.tasks(details), ...this.steered(details));
    return parts;
  }

  bands(bands, row, query) {
    const all = make("div");
    for (const [group, stored] of bands.toReversed()) {
      const i = Number(group.split(" ")[1]);
      all.append(make("h4", `${20 * i} to ${20 * i + 20}% of the largest value`), this.passages(stored, row, query));
    }
    const found = query && bands.some(([, stored]) => stored.some((each) => contains(each, query)));
    return make("details", "", found ? { open: "" } : {}, make("summary", "Where it is lower: passages drawn at random", {}), all);
  }

  writes({ writes }) {
    if (!writes.length) return [];
    const body = writes.map(([way, top, topLogits, bottom, bottomLogits]) => [way, this.words(top, topLogits), this.words(bottom, bottomLogits)]);
    return [make("h3", "What it writes"), make("p", "The direction through the unembedding: a linear approximation. Logits where the pointer rests.", { class: "soft" }),
      this.table(["direction", "makes likelier", "less likely"], body)];
  }

  neighbours({ neighbours }) {
    if (!neighbours.length) return [];
    const sides = make("div", "", { class: "sides" });
    for (const [by, title] of [["direction", "By direction (cosine)"], ["activation", "By activation (correlation)"]]) {
      const body = neighbours.filter(([way]) => way === by).map(([, m, other, value]) => {
        const model = this.rows.models[m];
        const at = model.place.get(other);
        return [at === undefined ? make("span", `${model.label}/${this.rows.nameOf(model, other)}`, { class: "soft", title: "not on this page" }) : this.feature(at),
          number(value), at === undefined ? "" : this.rows.title(at)];
      });
      if (body.length) sides.append(make("div", "", {}, make("h4", title), this.table(["feature", "", "label"], body)));
    }
    return [make("h3", "Features like it"), sides];
  }

  prior({ prior }) {
    if (!prior.length) return [];
    const charts = make("div", "", { class: "charts" });
    Object.entries(CURVES).forEach(([, title], i) => {
      const figure = this.curve(prior.map((point) => [point[0], point[i + 1]]), title);
      if (figure) charts.append(figure);
    });
    return [make("h3", "At other noise levels"), charts];
  }

  tasks({ tasks }) {
    if (!tasks.length) return [];
    const body = tasks.map(([task, auc, low, high, sign]) => [task, `${auc.toFixed(3)} [${low === null ? "–" : low.toFixed(3)}, ${high === null ? "–" : high.toFixed(3)}]`, sign > 0 ? "high" : "low"]);
    return [make("h3", "Probing tasks it won"), this.table(["task", "AUC [95% interval]", "positive class is"], body)];
  }

  steered({ steered }) {
    if (!steered.length) return [];
    const body = steered.map(([way, strength, prompt, text]) => [way, String(strength), make("span", "", {}, make("span", prompt, { class: "soft" }), text)]);
    return [make("h3", "Steered along its direction"), this.table(["direction", "strength", "text"], body)];
  }

  kind(model) { return model.title + (model.sigma === null ? "" : `, σ = ${model.sigma}`); }

  /** What the folder holds, and what the words of the page mean. */
  overview() {
    const { about, rows } = this;
    const median = (values) => { const known = values.filter((x) => x !== null).sort((a, b) => a - b); const half = known.length / 2; return known.length ? (known[Math.ceil(half) - 1] + known[Math.floor(half)]) / 2 : null; };
    const body = rows.models.map((model) => [make("a", model.label, { href: this.link({ model: model.label, f: "", text: "", read: "" }) }), this.kind(model),
      `${model.feature.length.toLocaleString("en")}${model.feature.length < model.n_features ? `\u00a0of\u00a0${model.n_features.toLocaleString("en")}` : ""}`,
      model.feature.length ? percent(model.dead.length / model.feature.length) : "–", model.feature.length ? percent(model.dense.length / model.feature.length) : "–",
      number(median(model.kurtosis)), String(model.auc.filter((auc) => auc !== null).length), model.hook]);
    return [make("h2", "Features of these models"),
      make("p", `Measured on ${about.tokens.toLocaleString("en")} tokens of ${about.texts.toLocaleString("en")} texts: ${about.corpus}. Language model: ${about.language_model}.`),
      this.table(["model", "features of", "shown here", "dead", "dense", "median kurtosis", "best at a task", "hook point"], body),
      ...about.notes.map((note) => make("p", note)),
      make("p", "Choose a feature in the list, or press j.", { class: "no-print" }),
      make("h3", "Words of this page"), make("dl", "", { class: "terms" }, ...Object.entries(TERMS).flatMap(([word, text]) => [make("dt", word), make("dd", text)]))];
  }

  /** The features of two models that have one text among their passages. */
  compared(state, found, share) {
    const { rows } = this;
    const parts = [make("h2", "Features with one text among their passages")];
    const choices = make("div", "", { class: "line no-print" });
    for (const side of ["a", "b"]) {
      const select = make("select", "", { "data-side": side });
      rows.models.forEach((model) => select.append(make("option", model.label, { value: model.label })));
      select.value = state[side];
      choices.append(make("label", side === "a" ? "Model " : "Beside ", {}, select));
    }
    parts.push(choices, make("p", share < 1 ? `Reading the passages: ${percent(share)}` : "Only passages on this page count: those where a feature is among its highest, lowest, or was drawn.", { class: "soft" }));
    const sides = make("div", "", { class: "sides" });
    for (const label of new Set([state.a, state.b])) {
      const own = found.filter(([row]) => rows.of(row).label === label).sort((x, y) => y[2] - x[2]);
      const list = make("ol", "", { class: "passages" });
      for (const [row, stored] of own.slice(0, 100)) {
        const { peak, value, tokens, values } = passage(stored);
        list.append(make("li", "", {}, make("div", "", {}, this.feature(row), make("small", ` ${number(value)} · ${percent(rows.density[row])} on · ${rows.title(row)}`)),
          this.tokens(tokens, values, rows.largest(row), { peak })));
      }
      const count = `${own.length} feature${own.length === 1 ? "" : "s"}${own.length > 100 ? ", the first 100 of them" : ""}`;
      sides.append(make("div", "", {}, make("h3", label), make("small", count), list));
    }
    parts.push(sides);
    return parts;
  }
}
