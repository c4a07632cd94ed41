/** Features of a text of one's own, where the page comes from a running `glp-lens features serve`. */
class Reader {
  constructor(rows, view) {
    this.rows = rows;
    this.view = view;
    this.text = "";
    this.answer = null;
    this.token = -1; // -1: the whole text
  }

  async ask(body) {
    const response = await fetch("read", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    return answer;
  }

  form(onRead) {
    const form = make("form");
    const area = make("textarea", "", { "aria-label": "Text", maxlength: "20000", placeholder: "A text" });
    area.value = this.text;
    const button = make("button", "Read");
    const said = make("p", "", { role: "status", class: "soft" });
    form.append(area, button, said);
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      this.text = area.value;
      button.disabled = true;
      said.textContent = "Reading …";
      try {
        await onRead(area.value);
        said.textContent = "";
      } catch (error) {
        said.textContent = error.message;
      } finally {
        button.disabled = false;
      }
    });
    return form;
  }

  /** One feature on a text. */
  trial(row) {
    const result = make("div");
    const form = this.form(async (text) => {
      const answer = await this.ask({ text, model: this.rows.of(row).label, feature: this.rows.feature(row) });
      const { values } = answer.models[0].features[0];
      result.replaceChildren(this.view.tokens(answer.tokens, values, this.rows.largest(row)), make("small", this.note(answer)));
    });
    return make("div", "", { class: "try" }, make("h3", "This feature on a text of yours"), form, result);
  }

  note(answer) { return answer.cut ? "Only the beginning was read: the text is longer than the context." : ""; }

  /** What every model makes of a text. */
  page() {
    const results = make("div");
    const form = this.form(async (text) => {
      this.answer = await this.ask({ text });
      this.token = -1;
      this.show(results);
    });
    if (this.answer) this.show(results);
    return [make("h2", "Features of a text"), make("p", "How far a feature is from its mean, in its standard deviations: the most on any token, or on the one you choose. Nothing leaves this machine.", { class: "soft" }), form, results];
  }

  show(results) {
    const { answer } = this;
    const line = make("div", "", { class: "tokens" });
    answer.tokens.forEach((token, i) => {
      const button = make("button", visible(token), { type: "button", "aria-pressed": String(i === this.token) });
      button.addEventListener("click", () => { this.token = this.token === i ? -1 : i; this.show(results); });
      line.append(button);
    });
    const sides = make("div", "", { class: "sides" });
    for (const { label, features } of answer.models) {
      const model = this.rows.models.find((each) => each.label === label);
      const ranked = features.map((each) => {
        const above = each.values.map((value) => (value === null ? -Infinity : (value - each.mean) / each.std)).map((z) => (model.signed && z > -Infinity ? Math.abs(z) : z));
        return [this.token < 0 ? Math.max(...above) : above[this.token], each];
      }).filter(([above]) => above > 0).sort((x, y) => y[0] - x[0]).slice(0, 20);
      const list = make("ol", "", { class: "passages" });
      for (const [above, { feature, values, largest }] of ranked) {
        const row = model.place.get(feature);
        const name = row === undefined ? make("span", `${label}/${this.rows.nameOf(model, feature)}`) : this.view.feature(row);
        list.append(make("li", "", {}, make("div", "", {}, name, make("small", ` ${number(above)} std away · ${row === undefined ? "not on this page" : this.rows.title(row)}`)),
          this.view.tokens(answer.tokens, values, largest)));
      }
      sides.append(make("div", "", {}, make("h3", label), list));
    }
    const what = this.token < 0 ? "the whole text" : `token ${this.token + 1}`;
    results.replaceChildren(make("h3", `Chosen: ${what}`), line, make("small", this.note(answer)), sides);
  }
}
