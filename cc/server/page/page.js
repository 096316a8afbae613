// The server's page. It asks for /status every two seconds while it is seen, and draws what it gets.
"use strict";

const SAMPLES = 300;
const byId = (id) => document.getElementById(id);

const state = {
  token: sessionStorage.getItem("token") || "",
  model: null, // the name of the one that is shown
  since: -1, // the newest sample that we have
  seconds: 2,
  histories: new Map(), // by model: lists by name
  status: null,
  watched: null, // {model, stream, abort}
};

// ---- Words and numbers ----

const REASONS = {
  invalid_argument: "Malformed",
  unauthenticated: "Without the token",
  not_found: "Not found",
  out_of_step: "Out of step",
  ended: "Stream had ended",
  not_started: "Not started",
  too_many_streams: "Too many streams",
  queue_full: "Queue full",
  deadline: "Deadline passed",
  cancelled: "Client had gone",
  unavailable: "Unavailable",
  unsupported: "Unsupported",
  internal: "Internal error",
};
const ENDS = {
  client: "ended by clients",
  idle: "idle for too long",
  closed: "closed by hand",
  unloaded: "model unloaded",
  moved: "moved away",
};

// Each returns the number and its unit.
function count(x) {
  if (x >= 1e9) return [(x / 1e9).toPrecision(3), "G"];
  if (x >= 1e6) return [(x / 1e6).toPrecision(3), "M"];
  if (x >= 1e5) return [(x / 1e3).toFixed(0), "k"];
  if (x >= 1e4) return [(x / 1e3).toFixed(1), "k"];
  if (x >= 100 || Number.isInteger(x)) return [Math.round(x).toLocaleString("en"), ""];
  return [x.toFixed(1), ""];
}
function duration(seconds) {
  if (seconds < 1e-3) return [(seconds * 1e6).toFixed(0), "µs"];
  if (seconds < 1e-2) return [(seconds * 1e3).toFixed(2), "ms"];
  if (seconds < 1) return [(seconds * 1e3).toPrecision(3), "ms"];
  if (seconds < 120) return [seconds.toPrecision(3), "s"];
  if (seconds < 7200) return [(seconds / 60).toFixed(0), "min"];
  if (seconds < 172800) return [(seconds / 3600).toFixed(1), "h"];
  return [(seconds / 86400).toFixed(1), "days"];
}
function bytes(x) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  for (; x >= 1024 && i < units.length - 1; ++i) x /= 1024;
  return [i === 0 ? String(x) : x.toPrecision(3), units[i]];
}
const text = ([number, unit]) => (unit ? `${number} ${unit}` : number);

// ---- Elements ----

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
function show(id, [number, unit]) {
  byId(id).replaceChildren(number, ...(unit ? [element("small", {}, unit)] : []));
}

// ---- Charts ----

// How many samples a chart shows: two minutes, and more when there are more.
function spanOf(history) {
  const kept = history.sample.length ? history.sample.at(-1) - history.sample[0] + 1 : 0;
  return Math.min(Math.max(Math.ceil(kept / 60), 1) * 60, SAMPLES);
}

// A round number of the sort 1, 2, 5, 10, ... that is at least x.
function roundUp(x) {
  const power = 10 ** Math.floor(Math.log10(x));
  for (const factor of [1, 2, 5, 10]) if (factor * power >= x * 0.9999) return factor * power;
  return 10 * power;
}

class Chart {
  // `series`: [{key, label, kind}]. `format` makes a number and its unit of a value.
  constructor(id, series, format, title) {
    this.series = series;
    this.format = format;
    this.title = title;
    this.history = null;
    this.cursor = null; // the sample that the pointer is at
    const section = byId(id);
    this.legend = element("p", { class: "legend" });
    section.prepend(element("div", { class: "head" }, section.querySelector("h2"), this.legend));
    this.svg = svg("svg", { class: "chart", role: "img" });
    section.append(this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => {
      this.cursor = null;
      this.draw();
    });
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  update(history) {
    this.history = history;
    this.draw();
  }

  point(event) {
    if (!this.history || !this.history.sample.length) return;
    const box = this.svg.getBoundingClientRect();
    const share = (event.clientX - box.left - this.left) / (box.width - this.left - this.right);
    const newest = this.history.sample.at(-1);
    this.cursor = Math.round(newest - (1 - Math.min(Math.max(share, 0), 1)) * (spanOf(this.history) - 1));
    this.draw();
  }

  draw() {
    const width = this.svg.clientWidth;
    const height = this.svg.clientHeight;
    if (!this.history || width === 0) return;
    const { history } = this;
    const top = 8;
    const bottom = 20;
    this.left = 52;
    this.right = 8;
    let most = 0;
    for (const { key } of this.series) for (const y of history[key]) most = Math.max(most, y || 0);
    const tick = roundUp(most > 0 ? most / 3 : 1 / 3);
    const end = Math.max(Math.ceil((most / tick) * 0.9999), most > 0 ? 1 : 3) * tick;
    const newest = history.sample.at(-1) ?? 0;
    const span = spanOf(history);
    const x = (sample) =>
      width - this.right - ((newest - sample) / (span - 1)) * (width - this.left - this.right);
    const y = (value) => height - bottom - (value / end) * (height - top - bottom);
    const drawn = [];

    for (let value = 0; value <= end * 1.0001; value += tick) {
      drawn.push(
        svg("line", { class: "grid", x1: this.left, x2: width - this.right, y1: y(value), y2: y(value) }),
        svg("text", { x: this.left - 8, y: y(value) + 4, "text-anchor": "end" },
          value === 0 ? "0" : text(this.format(Number(value.toPrecision(6)))).replace(/\.0+(?= |$)/, "")),
      );
    }
    const minutes = (span * state.seconds) / 60;
    for (const [share, anchor] of [[1, "start"], [0.5, "middle"], [0, "end"]]) {
      const words = share === 0 ? "now" : `${minutes * share} min ago`;
      drawn.push(svg("text", { x: x(newest - share * (span - 1)), y: height - 3, "text-anchor": anchor }, words));
    }

    for (const { key, kind } of this.series) {
      let path = "";
      let area = "";
      let from = null; // where the present piece of the line began
      history.sample.forEach((sample, i) => {
        const value = history[key][i];
        if (value === null) {
          if (from !== null) area += `L${x(history.sample[i - 1])},${y(0)}L${from},${y(0)}Z`;
          from = null;
          return;
        }
        const at = `${x(sample).toFixed(1)},${y(value).toFixed(1)}`;
        path += (from === null ? "M" : "L") + at;
        area += (from === null ? "M" : "L") + at;
        if (from === null) from = x(sample);
      });
      if (from !== null) area += `L${x(newest)},${y(0)}L${from},${y(0)}Z`;
      if (this.series.length === 1) drawn.push(svg("path", { class: "area", d: area }));
      drawn.push(svg("path", { class: `line ${kind}`, d: path }));
    }

    // The legend has the newest values, or those at the pointer.
    let at = history.sample.length - 1;
    if (this.cursor !== null) {
      const found = history.sample.indexOf(this.cursor);
      if (found >= 0) {
        at = found;
        drawn.push(svg("line", { class: "cursor", x1: x(this.cursor), x2: x(this.cursor), y1: top, y2: height - bottom }));
      }
    }
    const parts = [];
    const words = [];
    for (const { key, label, kind } of this.series) {
      const value = at >= 0 ? history[key][at] : null;
      const shown = value === null || value === undefined ? "–" : text(this.format(value));
      if (value !== null && value !== undefined) {
        drawn.push(svg("circle", { class: kind, cx: x(history.sample[at]), cy: y(value), r: 3.5 }));
      }
      parts.push(element("span", { class: kind }, element("i"), label ? `${label} ` : "", element("b", {}, shown)));
      words.push(label ? `${label} ${shown}` : shown);
    }
    if (this.cursor !== null && at >= 0) {
      const ago = (newest - history.sample[at]) * state.seconds;
      parts.unshift(element("span", {}, ago === 0 ? "now" : `${text(duration(ago))} ago`));
    }
    this.legend.replaceChildren(...parts);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("aria-label", `${this.title}: ${words.join(", ")}, and their history`);
    this.svg.replaceChildren(...drawn);
  }
}

const charts = [
  new Chart("chart-steps", [{ key: "steps_per_second", label: "", kind: "first" }], count, "Steps a second"),
  new Chart("chart-latency", [
    { key: "latency_p50", label: "50 %", kind: "first" },
    { key: "latency_p90", label: "90 %", kind: "second" },
    { key: "latency_p99", label: "99 %", kind: "third" },
  ], duration, "Latency"),
  new Chart("chart-streams", [{ key: "open_streams", label: "", kind: "first" }], count, "Open streams"),
  new Chart("chart-rows", [{ key: "rows_per_batch", label: "", kind: "first" }], count, "Streams a batch"),
];

function bars(list, bad) {
  const most = Math.max(...list.map(([, value]) => value), 1);
  const grid = element("div", { class: bad ? "bars bad" : "bars" });
  for (const [label, value] of list) {
    const bar = element("span");
    bar.style.width = `${(100 * value) / most}%`;
    grid.append(
      element("span", {}, label),
      element("span", { class: "bar", "aria-hidden": "true" }, bar),
      element("span", { class: "count" }, text(count(value))),
    );
  }
  return grid;
}

// ---- The server's answers ----

class NeedsToken extends Error {}

async function call(path, options = {}) {
  const headers = state.token ? { authorization: `Bearer ${state.token}` } : {};
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.status === 401) throw new NeedsToken();
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Error(body.error || `the server answered ${response.status}`);
  }
  return response;
}

function setState(words, kind) {
  const element_ = byId("state");
  if (element_.textContent !== words) element_.textContent = words;
  element_.className = `state ${kind}`;
}

function remember(status) {
  // The server has begun anew.
  if (status.sample < state.since) {
    state.histories.clear();
    state.since = -1;
    return false;
  }
  for (const model of status.models) {
    if (!model.history) continue;
    const known = state.histories.get(model.name);
    // A quantile of no requests is no number.
    for (const key of ["latency_p50", "latency_p90", "latency_p99", "rows_per_batch"]) {
      model.history[key] = model.history[key].map((y, i) => (model.history.requests_per_second[i] > 0 ? y : null));
    }
    if (!known) {
      state.histories.set(model.name, model.history);
      continue;
    }
    for (const key of Object.keys(known)) known[key] = known[key].concat(model.history[key]).slice(-SAMPLES);
  }
  state.since = status.sample;
  state.seconds = status.sample_seconds;
  return true;
}

function drawModels(status) {
  const nav = byId("models");
  const names = status.models.map((model) => model.name);
  if (!names.includes(state.model)) state.model = names[0];
  nav.hidden = names.length < 2;
  if (nav.dataset.names !== JSON.stringify(names)) {
    nav.dataset.names = JSON.stringify(names);
    nav.replaceChildren(...names.map((name) => {
      const button = element("button", { type: "button" }, element("span", { class: "dot" }), name);
      button.addEventListener("click", () => {
        state.model = name;
        unwatch("");
        draw();
      });
      return button;
    }));
  }
  status.models.forEach((model, i) => {
    nav.children[i].className = model.ready ? "ready" : "";
    nav.children[i].setAttribute("aria-pressed", String(model.name === state.model));
  });
}

const shapeOf = (tensor) => `${tensor.name} ${tensor.datatype} [${tensor.shape.join(", ")}]`;

function draw() {
  const { status } = state;
  drawModels(status);
  byId("about").textContent = `Version ${status.version}, up for ${text(duration(status.up_seconds))}`;
  setState(status.ready ? "Ready" : "Not ready", status.ready ? "good" : "bad");
  const model = status.models.find(({ name }) => name === state.model);
  const loaded = Boolean(model && model.history);
  byId("model").hidden = !loaded;
  byId("model-reason").hidden = loaded;
  if (!loaded) {
    byId("model-reason").textContent = model ? `The model ${model.name} is not loaded: ${model.reason}` : "No models";
    return;
  }
  document.title = `${model.name} – stream server`;
  byId("facts").textContent =
    `${model.name}: ${model.inputs.map(shapeOf).join(", ")} → ${model.outputs.map(shapeOf).join(", ")}. ` +
    `The window is ${model.receptive_field.toLocaleString("en")} steps. A stream's state has ${text(bytes(model.stream_bytes))}.`;

  const history = state.histories.get(model.name);
  const newest = (key) => history[key].at(-1) ?? null;
  const shown = (key, format) => (newest(key) === null ? ["–", ""] : format(newest(key)));
  show("tile-open", count(model.open_streams));
  show("tile-steps", shown("steps_per_second", count));
  show("tile-p50", shown("latency_p50", duration));
  show("tile-p99", shown("latency_p99", duration));
  show("tile-rows", shown("rows_per_batch", count));
  show("tile-waiting", count(model.waiting));
  for (const chart of charts) chart.update(history);

  const refused = Object.entries(model.refused).sort((a, b) => b[1] - a[1]);
  byId("refused").replaceChildren(refused.length
    ? bars(refused.map(([reason, value]) => [REASONS[reason] || reason, value]), true)
    : element("span", { class: "muted" }, "None since the model was loaded."));

  const { bounds, counts } = model.batch_rows;
  const batches = [];
  counts.forEach((value, i) => {
    if (value === 0) return;
    const least = i === 0 ? 1 : bounds[i - 1] + 1;
    const most = bounds[i];
    let label = `${least} to ${most}`;
    if (most === undefined) label = `${least} or more`;
    else if (least >= most) label = `${most}`;
    batches.push([label, value]);
  });
  byId("batches").replaceChildren(batches.length ? bars(batches, false) : element("span", { class: "muted" }, "None yet."));

  const pairs = [
    ["Steps taken", count(model.steps)],
    ["Answered again", count(model.repeats)],
    ["Streams opened", count(model.opened)],
    ...Object.entries(model.ended).map(([end, value]) => [`… ${ENDS[end] || end}`, count(value)]),
    ["Memory of streams", bytes(model.memory.streams)],
    ["Memory of answers", bytes(model.memory.answers)],
    ["Memory of weights", bytes(model.memory.weights)],
  ];
  byId("totals").replaceChildren(...pairs.flatMap(([name, value]) => [
    element("dt", {}, name), element("dd", {}, text(value)),
  ]));
}

// ---- The operator's list ----

async function drawStreams() {
  byId("streams").hidden = !state.status.operator;
  if (!state.status.operator || byId("model").hidden) return;
  const path = `/v2/models/${encodeURIComponent(state.model)}/streams`;
  const list = await (await call(`${path}?limit=20`)).json();
  byId("stream-rows").replaceChildren(...list.streams.map((stream) => {
    const watch = element("button", { type: "button" }, "Watch");
    watch.addEventListener("click", () => {
      byId("stream").value = stream.name;
      watchStream(stream.name, stream.path);
      byId("watch").scrollIntoView({ block: "nearest" });
    });
    const close = element("button", { type: "button" }, "Close");
    close.addEventListener("click", async () => {
      if (!window.confirm(`Close the stream ${stream.name}? Its state is gone then.`)) return;
      close.disabled = true;
      await call(stream.path, { method: "DELETE" }).catch((error) => window.alert(error.message));
      drawStreams();
    });
    return element("tr", {},
      element("td", { title: stream.name }, stream.name),
      element("td", {}, stream.next_step.toLocaleString("en")),
      element("td", {}, text(duration(stream.age_seconds))),
      element("td", {}, text(duration(stream.idle_seconds))),
      element("td", {}, watch, close));
  }));
  const more = list.open - list.streams.length;
  byId("streams-more").textContent = more > 0 ? `And ${more.toLocaleString("en")} more.` : "";
}

// ---- One stream's outputs ----

const COLUMNS = 150;

function unwatch(words) {
  if (state.watched) state.watched.abort.abort();
  state.watched = null;
  byId("watch-button").textContent = "Watch";
  byId("watch-state").textContent = words;
}

async function watchStream(stream, path) {
  unwatch("");
  const watched = { abort: new AbortController(), plots: null };
  state.watched = watched;
  byId("watch-button").textContent = "Stop";
  byId("watch-state").textContent = "Waiting for its next step";
  byId("outputs").replaceChildren();
  let words = "The server has ended this.";
  try {
    const response = await call(`${path}/outputs`, { signal: watched.abort.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    while (true) {
      const { done, value } = await reader.read();
      if (done) break;
      rest += value;
      const events = rest.split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (event.startsWith("data: ")) drawOutputs(watched, JSON.parse(event.slice(6)));
      }
    }
  } catch (error) {
    words = error.message;
  }
  if (state.watched === watched) unwatch(words);
}

function drawOutputs(watched, event) {
  if (state.watched !== watched) return;
  byId("watch-state").textContent = `Step ${(event.next_step - 1).toLocaleString("en")}`;
  if (!watched.plots) {
    watched.plots = event.outputs.map((output) => {
      const plot = { bars: element("canvas", { role: "img" }), trace: element("canvas", { role: "img" }), columns: [], note: element("p") };
      const shown = output.numbers.length < output.elements ? `the first ${output.numbers.length} of ${output.elements} numbers` : `${output.elements} numbers`;
      byId("outputs").append(element("div", { class: "output" },
        element("h3", {}, `${output.name}: ${shown}, now and before`),
        element("div", { class: "plots" }, plot.bars, plot.trace), plot.note));
      return plot;
    });
  }
  event.outputs.forEach((output, i) => drawOutput(watched.plots[i], output));
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function canvasOf(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return [context, width, height];
}

function drawOutput(plot, output) {
  const numbers = output.numbers.map((x) => (typeof x === "number" ? x : NaN));
  if (numbers.length === 0) {
    plot.note.textContent = "The request did not ask for this output.";
    return;
  }
  plot.columns.push(numbers);
  if (plot.columns.length > COLUMNS) plot.columns.shift();
  let most = 0;
  for (const column of plot.columns) for (const x of column) if (Math.abs(x) > most) most = Math.abs(x);
  const scale = most > 0 ? most : 1;
  const [high, low] = [color("--accent"), color("--low")];

  // Now: a bar for each number, up or down from the middle.
  let [context, width, height] = canvasOf(plot.bars);
  const step = width / numbers.length;
  numbers.forEach((x, i) => {
    context.fillStyle = x >= 0 ? high : low;
    const size = (Math.abs(x || 0) / scale) * (height / 2 - 6);
    context.fillRect(i * step + Math.min(1, step / 8), x >= 0 ? height / 2 - size : height / 2, Math.max(step - 2, step * 0.75), Math.max(size, 1));
  });
  context.fillStyle = color("--line");
  context.fillRect(0, height / 2, width, 1);

  // Before: a column for each time, a row for each number, as strong as it is large.
  [context, width, height] = canvasOf(plot.trace);
  const cell = width / COLUMNS;
  const row = height / numbers.length;
  plot.columns.forEach((column, k) => {
    const left = width - (plot.columns.length - k) * cell;
    column.forEach((x, i) => {
      context.fillStyle = x >= 0 ? high : low;
      context.globalAlpha = Math.min(Math.abs(x || 0) / scale, 1);
      context.fillRect(left, i * row, cell + 0.5, row + 0.5);
    });
  });
  context.globalAlpha = 1;

  const largest = numbers.reduce((best, x, i) => (x > numbers[best] ? i : best), 0);
  plot.note.textContent = `Largest now: number ${largest}, with ${numbers[largest].toPrecision(4)}. The plots reach from −${most.toPrecision(3)} to ${most.toPrecision(3)}.`;
  plot.bars.setAttribute("aria-label", `The newest output. ${plot.note.textContent}`);
  plot.trace.setAttribute("aria-label", "The outputs before it, as colors");
}

// ---- What happens when ----

async function refresh() {
  try {
    let status = await (await call(`/status?since=${state.since}`)).json();
    if (!remember(status)) {
      status = await (await call("/status")).json();
      remember(status);
    }
    state.status = status;
    byId("token-form").hidden = true;
    byId("content").hidden = false;
    draw();
    await drawStreams();
  } catch (error) {
    if (error instanceof NeedsToken) {
      setState("Needs a token", "bad");
      byId("content").hidden = true;
      if (byId("token-form").hidden) {
        byId("token-form").hidden = false;
        byId("token").focus();
      }
      if (state.token) byId("token-error").textContent = "The server does not know this token.";
      state.token = "";
    } else {
      setState(`No answer: ${error.message}`, "bad");
    }
  }
}

let timer = 0;
async function loop() {
  window.clearTimeout(timer);
  if (!document.hidden) await refresh();
  window.clearTimeout(timer);
  timer = window.setTimeout(loop, state.seconds * 1000);
}

const THEMES = ["system", "light", "dark"];
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function applyTheme() {
  const theme = localStorage.getItem("theme") || "system";
  const isDark = theme === "dark" || (theme === "system" && dark.matches);
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  byId("theme").textContent = `Theme: ${theme}`;
}
byId("theme").addEventListener("click", () => {
  const now = THEMES.indexOf(localStorage.getItem("theme") || "system");
  localStorage.setItem("theme", THEMES[(now + 1) % THEMES.length]);
  applyTheme();
});
dark.addEventListener("change", applyTheme);
applyTheme();

byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = byId("token").value.trim();
  sessionStorage.setItem("token", state.token);
  byId("token").value = "";
  byId("token-error").textContent = "";
  loop();
});

byId("watch-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.watched) return unwatch("");
  const stream = byId("stream").value;
  watchStream(stream, `/v2/models/${encodeURIComponent(state.model)}/streams/${encodeURIComponent(stream)}`);
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) loop();
});
loop();
