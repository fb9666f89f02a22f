"use strict";
// Draws the charts of the JSON in #data into the page's figures: data -> scales -> SVG, again at each change of width,
// axis or runs shown. Text from runs is only ever set as textContent.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const namespace = document.querySelector("svg").namespaceURI;
  const state = { axis: "steps", hidden: new Set(), whole: new Set(), cursor: null, over: null };
  const margin = { left: 50, right: 14, top: 14, bottom: 38 };

  const svg = (parent, name, attributes, text) => {
    const node = document.createElementNS(namespace, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };
  const html = (parent, name, className, text) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };

  // ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────
  const grouped = (v, digits = 0) =>
    v.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const large = (v) => {
    for (const [size, sign] of [[1e12, " T"], [1e9, " B"], [1e6, " M"], [1e4, " k"]]) {
      if (Math.abs(v) >= size) return String(Number((v / (sign === " k" ? 1e3 : size)).toPrecision(4))) + sign;
    }
    return grouped(v, Number.isInteger(v) ? 0 : 1);
  };
  const small = (v) => (v === 0 ? "0" : Math.abs(v) < 0.01 ? v.toExponential(2).replace(/\.?0+e/, "e") : String(Number(v.toPrecision(3))));
  const digits = (step) => {
    let n = 0;
    while (n < 6 && Math.abs(step * 10 ** n - Math.round(step * 10 ** n)) > 1e-6) n++;
    return n;
  };
  const write = {
    figure: (v, step) => grouped(v, step ? digits(step) : 4),
    small: (v, step) => (step >= 1e-3 ? grouped(v, digits(step)) : small(v)),
    large: (v) => large(v),
    percent: (v, step) => grouped(100 * v, step ? digits(100 * step) : 1) + " %",
  };
  const ticks = (low, high, most) => {
    const rough = (high - low) / Math.max(1, most);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 2.5, 5, 10].find((m) => m * power >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9) + 0; i * step <= high + step * 1e-9; i++) found.push(i * step || 0); // no -0
    return { found, step };
  };

  // ── the horizontal axis ──────────────────────────────────────────────────────────────────────────────────────
  const scaleX = (columns, run) => {
    if (state.axis === "minutes") return columns.minutes;
    return state.axis === "tokens" ? columns.step.map((s) => s * run.batch_tokens) : columns.step;
  };
  const xOf = (series) => scaleX(data.runs[series.run].x[series.x], data.runs[series.run]);
  const labelX = (v, span) =>
    state.axis === "minutes" ? (span > 600 ? grouped(v / 60, span > 6000 ? 0 : 1) + " h" : grouped(v, span < 5 ? 1 : 0))
      : state.axis === "tokens" ? large(v) : grouped(v);
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  // One domain for all charts, so that a place means the same step in each.
  const domainX = () => {
    let high = 0;
    data.runs.forEach((run, i) => {
      if (state.hidden.has(i)) return;
      for (const columns of Object.values(run.x)) for (const x of scaleX(columns, run)) if (x > high) high = x;
    });
    return [0, high || 1];
  };

  const charts = data.charts.map((chart, i) => {
    const figure = document.querySelector(`figure[data-chart="${i}"]`);
    return { ...chart, figure, frame: figure.querySelector(".frame"), node: figure.querySelector(".frame svg"),
      tip: figure.querySelector(".tip"), key: figure.querySelector(".key") };
  });
  const visible = (chart) => chart.series.filter((s) => !state.hidden.has(s.run));
  const bandsOf = (chart) => (state.axis === "minutes" ? [] : chart.bands || []);

  // The vertical range. Fitted: of what lies behind the first twentieth, where a curve falls steeply.
  const domainY = (chart, [, end]) => {
    let low = Infinity, high = -Infinity;
    const take = (v) => { if (v !== null && v < low) low = v; if (v !== null && v > high) high = v; };
    const fitted = chart.fit && !state.whole.has(chart.id);
    for (const series of visible(chart)) {
      if (series.draw === "faint" && fitted) continue;
      const xs = xOf(series), from = fitted ? end / 20 : 0;
      const start = xs.findIndex((x) => x >= from);
      series.y.forEach((v, i) => { if (i >= (start < 0 ? xs.length - 1 : start)) take(v); });
    }
    for (const line of chart.lines || []) if (chart.id !== "grad-norm" || line.y <= 1.5 * high) take(line.y);
    if (low > high) [low, high] = [0, 1];
    const room = (high - low || Math.abs(high) || 1) * 0.1;
    const label = data.runs.length === 1 && chart.series.some((s) => s.draw === "dots"); // the last value stands below
    return chart.zero ? [0, high + room || 1] : [low - room * (label ? 1.9 : 1), high + room];
  };

  const path = (xs, ys, X, Y, stairs) => {
    let text = "", pen = false;
    ys.forEach((y, i) => {
      if (y === null) { pen = false; return; }
      const px = X(xs[i]).toFixed(1), py = Y(y).toFixed(1);
      text += pen ? (stairs ? `H${px}V${py}` : `L${px} ${py}`) : `M${px} ${py}`;
      pen = true;
    });
    return text;
  };

  const draw = (chart, domain) => {
    const width = Math.round(chart.frame.clientWidth), height = Math.round(chart.node.getBoundingClientRect().height);
    if (!width || !height) return;
    const node = chart.node;
    node.replaceChildren();
    node.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const [x0, x1] = domain, [y0, y1] = domainY(chart, domain);
    const right = width - margin.right, bottom = height - margin.bottom;
    const X = (v) => margin.left + ((v - x0) / (x1 - x0)) * (right - margin.left);
    const Y = (v) => bottom - ((v - y0) / (y1 - y0)) * (bottom - margin.top);
    Object.assign(chart, { X, Y, right, bottom, width, domain });

    const clip = svg(svg(node, "defs", {}), "clipPath", { id: `clip-${chart.id}` });
    svg(clip, "rect", { x: margin.left, y: margin.top - 6, width: right - margin.left + 6, height: bottom - margin.top + 7 });
    const vertical = ticks(y0, y1, (bottom - margin.top) / 40);
    for (const v of vertical.found) {
      if (chart.id === "skipped" && !Number.isInteger(v)) continue;
      svg(node, "line", { class: "grid", x1: margin.left, x2: right, y1: Y(v), y2: Y(v) });
      svg(node, "text", { x: margin.left - 7, y: Y(v) + 4, "text-anchor": "end" }, write[chart.format](v, vertical.step));
    }
    const hours = state.axis === "minutes" && x1 > 600 ? 60 : 1;
    const horizontal = ticks(x0 / hours, x1 / hours, (right - margin.left) / (state.axis === "tokens" ? 66 : 60)).found.map((v) => v * hours);
    for (const v of horizontal) {
      if (state.axis === "steps" && !Number.isInteger(v)) continue;
      svg(node, "line", { class: "axis", x1: X(v), x2: X(v), y1: bottom, y2: bottom + 4 });
      const end = X(v) > right - 18;
      svg(node, "text", { x: end ? right + margin.right - 2 : X(v), y: bottom + 17, "text-anchor": end ? "end" : "middle" }, labelX(v, x1));
    }
    svg(node, "line", { class: "axis", x1: margin.left, x2: right, y1: bottom, y2: bottom });
    const title = { steps: "steps", tokens: "tokens", minutes: x1 > 600 ? "hours of training" : "minutes of training" };
    svg(node, "text", { x: (margin.left + right) / 2, y: height - 4, "text-anchor": "middle" }, title[state.axis]);

    const inside = svg(node, "g", { "clip-path": `url(#clip-${chart.id})` });
    for (const band of bandsOf(chart)) {
      const xs = band.step.map((s) => (state.axis === "tokens" ? s * band.batch_tokens : s));
      const up = xs.map((x, i) => `${X(x).toFixed(1)} ${Y(band.high[i]).toFixed(1)}`);
      const down = xs.map((x, i) => `${X(x).toFixed(1)} ${Y(band.low[i]).toFixed(1)}`).reverse();
      svg(inside, "path", { class: "band", d: `M${up.concat(down).join("L")}Z` });
    }
    for (const line of chart.lines || []) {
      if (line.y < y0 || line.y > y1) continue;
      svg(inside, "line", { class: "reference", x1: margin.left, x2: right, y1: Y(line.y), y2: Y(line.y) });
    }
    for (const series of visible(chart)) {
      const xs = xOf(series), name = `c${series.color}`;
      const group = svg(inside, "g", { class: name });
      const style = series.draw === "faint" ? " faint" : series.draw === "dots" ? " thick" : "";
      svg(group, "path", { class: `curve${style}${series.run >= 8 ? " dashed" : ""}`, d: path(xs, series.y, X, Y, series.draw === "stairs") });
      if (series.draw === "dots") {
        const radius = xs.length > 60 ? 1.8 : 3;
        series.y.forEach((y, i) => { if (y !== null) svg(group, "circle", { class: "dot", cx: X(xs[i]), cy: Y(y), r: radius }); });
        const last = series.y.length - 1;
        if (data.runs.length === 1 && last >= 0 && series.y[last] !== null) {
          // On the side where the curve did not come from.
          const before = series.y[Math.floor(last * 0.8)], below = before !== null && before > series.y[last];
          svg(group, "text", { class: "value", x: Math.min(X(xs[last]) + 4, right), y: Y(series.y[last]) + (below ? 19 : -9), "text-anchor": "end" },
            write[chart.format](series.y[last]));
        }
      }
    }
    if (chart.id === "loss" || chart.id === "grad-norm") {
      data.runs.forEach((run, i) => {
        if (state.hidden.has(i)) return;
        const group = svg(inside, "g", { class: `c${i % 8}` });
        for (const x of scaleX(run.x.skip, run).slice(1, -1)) svg(group, "line", { class: "skip", x1: X(x), x2: X(x), y1: bottom, y2: bottom - 9 });
      });
    }
    // Names of lines that lie close go on different sides of them.
    let above = true;
    for (const line of chart.lines || []) {
      if (line.y < y0 || line.y > y1) continue;
      const clipping = chart.id === "grad-norm", text = clipping ? line.label : `${line.label}: ${line.y}`;
      svg(node, "text", { class: "name", x: clipping ? right : margin.left + 6, y: Y(line.y) + (above ? -5 : 15),
        "text-anchor": clipping ? "end" : "start" }, text);
      above = chart.lines.length === 1 || !above;
    }
    chart.overlay = svg(node, "g", {});
    key(chart);
    point(chart);
  };

  const key = (chart) => {
    chart.key.replaceChildren();
    const one = data.runs.length === 1, seen = new Set();
    const entry = (label, colour, draw) => {
      const item = html(chart.key, "span", "");
      const image = svg(item, "svg", { viewBox: "0 0 27 12", "aria-hidden": "true", class: colour });
      if (draw === "band") svg(image, "rect", { class: "band", width: 27, height: 12 });
      else svg(image, "path", { class: draw === "faint" ? "curve faint" : draw === "dots" ? "curve thick" : "curve", d: "M1 6H26" });
      if (draw === "dots") svg(image, "circle", { class: "dot", cx: 13.5, cy: 6, r: 3.5 });
      item.append(label);
    };
    const series = visible(chart);
    if (new Set(series.map((s) => s.label)).size > 1) {
      for (const s of series) {
        if (!seen.has(s.label)) entry(s.label, one ? `c${s.color}` : "", s.draw);
        seen.add(s.label);
      }
    }
    for (const band of bandsOf(chart)) entry(band.label, "", "band");
    if ((chart.id === "loss" || chart.id === "grad-norm") && data.runs.some((r) => r.x.skip.step.length > 2)) {
      html(chart.key, "span", "", "ticks below: skipped steps");
    }
  };

  // ── the pointer: one place in all charts, its figures beside the one under it ────────────────────────────────
  const point = (chart) => {
    if (!chart.overlay) return;
    chart.overlay.replaceChildren();
    const x = state.cursor;
    chart.tip.hidden = true;
    if (x === null) return;
    const px = chart.X(x);
    svg(chart.overlay, "line", { class: "cursor", x1: px, x2: px, y1: margin.top, y2: chart.bottom });
    const rows = [];
    for (const series of visible(chart)) {
      const xs = xOf(series), i = nearest(xs, x), y = series.y[i];
      if (y === null || y === undefined || x > xs[xs.length - 1] + (chart.domain[1] - chart.domain[0]) / 50) continue;
      const py = chart.Y(y);
      if (py >= margin.top - 6 && py <= chart.bottom + 1 && series.draw !== "faint") {
        svg(chart.overlay, "circle", { class: `dot c${series.color}`, cx: chart.X(xs[i]), cy: py, r: 4 });
      }
      rows.push([series, y, xs[i]]);
    }
    if (chart !== state.over || !rows.length) return;
    chart.tip.replaceChildren();
    // The place of the densest series; values of others stand where theirs is nearest.
    const dense = rows.reduce((a, b) => (xOf(a[0]).length >= xOf(b[0]).length ? a : b));
    const span = chart.domain[1];
    const unit = { steps: "step ", tokens: "", minutes: "" }[state.axis];
    const after = { steps: "", tokens: " tokens", minutes: span > 600 ? "" : " min" }[state.axis];
    html(chart.tip, "b", "", unit + (state.axis === "minutes" && span <= 600 ? grouped(dense[2], 1) : labelX(dense[2], span)) + after);
    const labels = new Set(rows.map(([series]) => series.label));
    for (const [series, y] of rows) {
      const row = html(chart.tip, "div", "");
      html(row, "i", `swatch c${series.color}`);
      const name = data.runs.length > 1 ? data.runs[series.run].name : "";
      html(row, "span", "text", name + (name && labels.size > 1 ? ", " : "") + (labels.size > 1 || !name ? series.label : ""));
      html(row, "span", "", write[chart.format](y));
    }
    chart.tip.hidden = false;
    const box = chart.tip.getBoundingClientRect();
    const beside = px + 14 + box.width <= chart.width ? px + 14 : px - 14 - box.width;
    chart.tip.style.transform = `translate(${Math.max(0, Math.min(beside, chart.width - box.width))}px, ${margin.top}px)`;
  };
  const pointAll = () => charts.forEach(point);
  const drawAll = () => { const domain = domainX(); charts.forEach((chart) => draw(chart, domain)); };

  for (const chart of charts) {
    const move = (event) => {
      const px = event.clientX - chart.node.getBoundingClientRect().left;
      const part = (px - margin.left) / (chart.right - margin.left);
      state.over = chart;
      state.cursor = part < -0.02 || part > 1.03 ? null : chart.domain[0] + Math.max(0, Math.min(1, part)) * (chart.domain[1] - chart.domain[0]);
      pointAll();
    };
    chart.node.addEventListener("pointermove", move);
    chart.node.addEventListener("pointerdown", move);
    chart.node.addEventListener("pointerleave", () => { state.cursor = null; pointAll(); });
    const whole = chart.figure.querySelector(".whole");
    if (whole) {
      whole.addEventListener("click", () => {
        const on = !state.whole.has(chart.id);
        if (on) state.whole.add(chart.id); else state.whole.delete(chart.id);
        whole.setAttribute("aria-pressed", on);
        draw(chart, domainX());
      });
    }
  }
  const axes = document.querySelectorAll("[data-axis]");
  for (const button of axes) {
    button.addEventListener("click", () => {
      state.axis = button.dataset.axis;
      state.cursor = null;
      axes.forEach((other) => other.setAttribute("aria-pressed", other === button));
      drawAll();
    });
  }
  for (const button of document.querySelectorAll("[data-run]")) {
    button.addEventListener("click", () => {
      const run = Number(button.dataset.run), off = !state.hidden.has(run);
      if (off) state.hidden.add(run); else state.hidden.delete(run);
      button.setAttribute("aria-pressed", !off);
      drawAll();
    });
  }
  const only = document.getElementById("only-differences");
  if (only) {
    const table = document.querySelector("table.config");
    only.addEventListener("change", () => table.classList.toggle("only-differences", only.checked));
  }
  let width = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth !== width) { width = document.body.clientWidth; drawAll(); }
  }).observe(document.body);
  drawAll();
})();
