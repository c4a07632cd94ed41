const ROW = 56; // height of a row of the list, in pixels
const AROUND = 6; // rows drawn above and below the window
const DEFAULTS = { q: "", in: "any", model: "", show: "all", sort: "number", density_min: "", density_max: "", kurtosis_min: "", auc_min: "",
                   f: "", text: "", a: "", b: "", read: "", about: "" };
const CHOICES = {
  in: { any: "anything", label: "labels", token: "tokens it is on", writes: "tokens it writes", task: "tasks", text: "texts" },
  show: { all: "all", alive: "not dead", sparse: "not dead, not dense", dead: "dead", dense: "dense", tasks: "best at a task" },
  sort: { number: "by number", "density:high": "most often on", "density:low": "least often on", "kurtosis:high": "highest kurtosis",
          "kurtosis:low": "lowest kurtosis", "auc:high": "highest AUC", "auc:low": "lowest AUC", "largest:high": "largest value" },
};
const DAMAGED = "the file is damaged. Make the page again with glp-lens features page.";
const READS = { any: contains, text: contains }; // what is looked for in each passage
const SERVER = $('meta[http-equiv="Content-Security-Policy"]').content.includes("connect-src 'self'");

unpacked("index").then(start, (error) => {
  $("#facts").textContent = "The features cannot be read. This page needs a browser of 2023 or later.";
  console.error(error);
});

function start(index) {
  const rows = new Rows(index);
  const labels = rows.models.map((model) => model.label);
  const toHash = (state) => {
    const hash = new URLSearchParams();
    for (const [name, value] of Object.entries(state)) if (value !== DEFAULTS[name]) hash.set(name, value);
    return `#${hash}`;
  };
  let state = { ...DEFAULTS };
  const view = new View(rows, index.about, (changes) => toHash({ ...state, about: "", ...changes }));
  const reader = SERVER ? new Reader(rows, view) : null;
  const scan = new Scan(rows);
  const compare = new Scan(rows);
  let hits = new Uint8Array(rows.length);
  let searched = "";
  let found = [];
  let places = new Map(); // of rows in the list
  let shown = ""; // what the view shows

  function fromHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    state = { ...DEFAULTS };
    for (const name of Object.keys(DEFAULTS)) if (given.has(name)) state[name] = given.get(name);
    for (const [name, known] of Object.entries(CHOICES)) if (!(state[name] in known)) state[name] = DEFAULTS[name];
    if (!labels.includes(state.model)) state.model = "";
    for (const name of ["density_min", "density_max", "kurtosis_min", "auc_min"]) if (!Number.isFinite(Number(state[name]))) state[name] = "";
    if (state.text) {
      if (!labels.includes(state.a)) state.a = labels[0];
      if (!labels.includes(state.b)) state.b = labels.find((label) => label !== state.a) ?? state.a;
    }
  }

  /** The rows of the list that are in sight. */
  function drawList() {
    const list = $("#list");
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - AROUND);
    const last = Math.min(found.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + AROUND);
    const nodes = [];
    for (let i = first; i < last; i++) {
      const row = found[i];
      const address = rows.address(row);
      const chosen = address === state.f;
      const node = make("a", "", { role: "option", id: `row-${row}`, tabindex: "-1", href: view.link({ f: address, text: "", read: "" }),
                                   "aria-selected": String(chosen), "aria-setsize": String(found.length), "aria-posinset": String(i + 1) });
      node.style.transform = `translateY(${i * ROW}px)`;
      const title = make("span", "", {}, make("b", rows.name(row)), ` ${rows.heading(row)}`);
      const parts = [rows.of(row).label, rows.dead[row] ? "dead" : `${percent(rows.density[row])} of tokens`, `kurtosis ${number(rows.kurtosis[row])}`];
      if (!Number.isNaN(rows.auc[row])) parts.push(`AUC ${rows.auc[row].toFixed(3)} ${rows.column(row, "task")}`);
      node.append(title, make("span", "", {}, make("small", parts.join(" · "))));
      nodes.push(node);
      if (chosen) list.setAttribute("aria-activedescendant", node.id);
    }
    $("#space").style.height = `${found.length * ROW}px`;
    $("#space").replaceChildren(...nodes);
  }

  function showList(progress = 1) {
    found = rows.found(state, hits);
    places = new Map(found.map((row, i) => [row, i]));
    drawList();
    const count = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} features`;
    $("#count").textContent = progress < 1 ? `${count}, searched ${percent(progress)} of the passages …` : found.length ? count : `No feature fits: search something else, or reset.`;
    document.body.dataset.search = progress < 1 ? "running" : "done";
  }

  /** What has to be looked for in the passages is, in the background. */
  async function search() {
    const wanted = state.q && (state.in === "writes" || state.in in READS) ? `${state.in}\n${state.model}\n${state.q}` : "";
    if (wanted === searched) { showList(document.body.dataset.search === "running" ? 0 : 1); return; }
    searched = wanted;
    scan.stop();
    hits = new Uint8Array(rows.length);
    showList(wanted ? 0 : 1);
    if (!wanted) return;
    const query = state.q.toLowerCase();
    const test = READS[state.in];
    const look = (row, details) => {
      const fits = test ? details.examples.some(([, stored]) => stored.some((each) => test(each, query))) : writesToken(details, query);
      if (fits) hits[row] = 1;
    };
    const models = labels.map((_, m) => m).filter((m) => !state.model || labels[m] === state.model);
    try {
      if (await scan.over(models, look, showList)) showList();
    } catch (error) {
      showList();
      $("#count").textContent += ` Not all passages could be read: ${DAMAGED}`;
      console.error(error);
    }
  }

  function put(parts) {
    $("#view").replaceChildren(...parts);
    document.body.dataset.shown = shown;
  }

  async function showView() {
    const wanted = JSON.stringify([state.f, state.text, state.a, state.b, state.read, state.f && state.q]);
    document.body.dataset.view = state.f || state.text || state.read || state.about ? "detail" : "list";
    $("#back").href = view.link({ f: "", text: "", read: "" });
    $("#to-about").href = view.link({ f: "", text: "", read: "", about: "1" });
    $("#to-read").href = view.link({ f: "", text: "", read: "1" });
    document.title = state.f ? `${state.f} – features` : "Features";
    if (wanted === shown) return;
    const moved = shown && JSON.parse(shown).slice(0, 5).join() !== JSON.parse(wanted).slice(0, 5).join();
    shown = wanted;
    compare.stop();
    if (moved) $("#view").scrollTop = 0;
    if (state.read && reader) put(reader.page());
    else if (state.text) await showCompared(wanted);
    else if (state.f) {
      const row = rows.find(state.f);
      if (row < 0) { put([make("h2", state.f), make("p", "There is no such feature on this page.")]); return; }
      try {
        const details = await rows.details(row);
        if (wanted !== shown) return;
        put([...view.one(row, details, ["any", "text"].includes(state.in) ? state.q.toLowerCase() : ""), ...(reader ? [reader.trial(row)] : [])]);
      } catch (error) {
        put([make("h2", state.f), make("p", `Its data cannot be read: ${DAMAGED}`)]);
        console.error(error);
      }
    } else put(view.overview());
  }

  async function showCompared(wanted) {
    const got = [];
    const look = (row, details) => {
      let best = null;
      for (const [, stored] of details.examples) {
        for (const each of stored) if (each[0] === state.text && (!best || Math.abs(each[3]) > Math.abs(best[3]))) best = each;
      }
      if (best) got.push([row, best, Math.abs(best[3]) / rows.largest(row)]);
    };
    const models = [...new Set([labels.indexOf(state.a), labels.indexOf(state.b)])];
    put(view.compared(state, got, 0));
    const whole = await compare.over(models, look, (share) => { if (wanted === shown) put(view.compared(state, got, share)); });
    if (whole && wanted === shown) put(view.compared(state, got, 1));
  }

  function controls() {
    for (const name of ["q", "in", "model", "show", "sort", "density_min", "density_max", "kurtosis_min", "auc_min"]) {
      if ($(`#${name}`).value !== state[name]) $(`#${name}`).value = state[name];
    }
  }

  function changed() {
    history.replaceState(null, "", toHash(state));
    search();
    showView();
  }

  /** Keeps the chosen row of the list in sight. */
  function reveal() {
    const row = state.f ? rows.find(state.f) : -1;
    const at = places.get(row);
    if (at === undefined) return;
    const list = $("#list");
    if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
    else if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
  }

  function step(by) {
    if (!found.length) return;
    const at = state.f ? places.get(rows.find(state.f)) : undefined;
    const next = at === undefined ? 0 : Math.min(found.length - 1, Math.max(0, at + by));
    Object.assign(state, { f: rows.address(found[next]), text: "", read: "", about: "" });
    history.replaceState(null, "", toHash(state));
    reveal();
    drawList();
    showView();
  }

  function keys(event) {
    const typing = event.target.closest("input, select, textarea");
    if (event.ctrlKey || event.metaKey || event.altKey || $("#help").open) return;
    if (event.key === "Escape") {
      if (typing) event.target.blur();
      else if (state.f || state.text || state.read || state.about) { Object.assign(state, { f: "", text: "", read: "", about: "" }); changed(); $("#list").focus(); }
      return;
    }
    if (event.target.id === "q" && event.key === "Enter") { event.preventDefault(); event.target.blur(); step(0); return; }
    if (typing) return;
    const inView = event.target.closest("#view");
    if (event.key === "/") { event.preventDefault(); $("#q").focus(); $("#q").select(); }
    else if (event.key === "?") $("#help").showModal();
    else if (event.key === "j" || (event.key === "ArrowDown" && !inView)) { event.preventDefault(); step(1); }
    else if (event.key === "k" || (event.key === "ArrowUp" && !inView)) { event.preventDefault(); step(-1); }
    else if (event.key === "Enter" && !event.target.closest("a, button, summary")) { if (!state.f) step(0); $("#view").focus(); }
  }

  function build() {
    const { about } = index;
    $("#facts").textContent = `${rows.length.toLocaleString("en")} of ${labels.join(", ")}, on ${about.tokens.toLocaleString("en")} tokens of ${about.corpus}`;
    $("#to-read").hidden = !reader;
    for (const [name, known] of Object.entries(CHOICES)) $(`#${name}`).append(...Object.entries(known).map(([value, text]) => make("option", text, { value })));
    $("#model").append(make("option", "all", { value: "" }), ...labels.map((label) => make("option", label, { value: label })));
    $(".sample-high").style.setProperty("--v", 1);
    $(".sample-low").style.setProperty("--v", 1);
    let waiting = 0;
    for (const name of ["q", "density_min", "density_max", "kurtosis_min", "auc_min"]) {
      $(`#${name}`).addEventListener("input", (event) => {
        state[name] = event.target.value;
        clearTimeout(waiting);
        waiting = setTimeout(() => { $("#list").scrollTop = 0; changed(); }, 150);
      });
    }
    for (const name of ["in", "model", "show", "sort"]) {
      $(`#${name}`).addEventListener("change", (event) => { state[name] = event.target.value; $("#list").scrollTop = 0; changed(); });
    }
    $("#view").addEventListener("change", (event) => {
      if (event.target.dataset.side) { state[event.target.dataset.side] = event.target.value; changed(); }
    });
    $("#find").addEventListener("submit", (event) => event.preventDefault());
    $("#find").addEventListener("reset", (event) => { event.preventDefault(); state = { ...DEFAULTS, f: state.f }; controls(); changed(); });
    $("#help-open").addEventListener("click", () => $("#help").showModal());
    $("#list").addEventListener("scroll", () => requestAnimationFrame(drawList), { passive: true });
    addEventListener("resize", drawList);
    addEventListener("hashchange", read);
    addEventListener("keydown", keys);
  }

  function read() {
    fromHash();
    controls();
    search();
    return showView().then(reveal);
  }

  build();
  read().then(() => {
    document.body.dataset.milliseconds = String(Math.round(performance.now() - BEGAN));
    document.body.dataset.state = "ready";
  });
}
