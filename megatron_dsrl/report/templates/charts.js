// The charts of the page: one cursor for all that count the same, smoothing, and their values as CSV.
"use strict";

const charts = [...document.querySelectorAll("figure[data-chart]")].map((figure) => {
  const data = JSON.parse(figure.dataset.chart);
  const { from, to } = data.steps;
  const steps = from === undefined ? data.steps : Array.from({ length: to - from + 1 }, (_, index) => from + index);
  const shown = Number(figure.querySelector(".at-step").textContent);
  return { ...data, steps, figure, svg: figure.querySelector("svg"), at: steps.indexOf(shown), first: steps.indexOf(shown) };
});

// Where a value lies in the drawing, like `Axes` in chart_source.py; `log` is the base of a logarithmic axis.
function place({ log, ends: [low, high], places: [start, end] }, value) {
  const scaled = log ? Math.log(value) / Math.log(log) : value;
  return start + (Math.min(Math.max(scaled, low), high) - low) / (high - low) * (end - start);
}

// A value for display, like `number` in chart_source.py.
function inWords(value, error) {
  if (value === null) return "none";
  const size = Math.abs(value);
  let text = String(Number(value.toPrecision(3)));
  if (size >= 1000 || Number.isInteger(value)) text = Math.round(value).toLocaleString("en-US");
  else if (size < 0.001) text = value.toExponential(1).replace(".0e", "e");
  return error == null ? text : `${text} ± ${Number(error.toPrecision(2))}`;
}

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return steps[high] - step < step - steps[low] ? high : low;
}

function phaseAt(chart, step) {
  const phase = chart.phases.find(([, first, last]) => first <= step && step <= last);
  return phase ? phase[0] : "";
}

// ---- the cursor: every chart shows its values at the step nearest to the chosen one

function caption(chart, index, cursor) {
  const step = chart.steps[index], x = place(chart.x, step).toFixed(1), phase = phaseAt(chart, step);
  chart.at = index;
  const line = chart.svg.querySelector(".cursor");
  line.setAttribute("x1", x);
  line.setAttribute("x2", x);
  line.setAttribute("visibility", cursor);
  chart.figure.querySelector(".at-step").textContent = step;
  chart.figure.querySelector(".at-phase").textContent = phase && `· ${phase}`;
  chart.figure.querySelectorAll(".value").forEach((element, number) => {
    const { values, errors } = chart.series[number];
    element.textContent = inWords(values[index], errors && errors[index]);
  });
}

const linked = (chart) => charts.filter((other) => other.counts === chart.counts);
const show = (chart, step) => linked(chart).forEach((one) => caption(one, nearest(one.steps, step), "visible"));
const hide = (chart) => linked(chart).forEach((one) => caption(one, one.first, "hidden"));

for (const chart of charts) {
  const point = (event) => {
    const box = chart.svg.getBoundingClientRect(), [low, high] = chart.x.ends, [left, right] = chart.x.places;
    const x = (event.clientX - box.left) / box.width * chart.svg.viewBox.baseVal.width;
    const scaled = low + (x - left) / (right - left) * (high - low);
    show(chart, chart.x.log ? chart.x.log ** scaled : scaled);
  };
  chart.svg.addEventListener("pointermove", point);
  chart.svg.addEventListener("pointerdown", point);
  chart.svg.addEventListener("pointerleave", () => hide(chart));
  chart.svg.addEventListener("blur", () => hide(chart));
  chart.svg.addEventListener("keydown", (event) => {
    const last = chart.steps.length - 1;
    const target = { ArrowLeft: chart.at - 1, ArrowRight: chart.at + 1, Home: 0, End: last }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    show(chart, chart.steps[Math.min(Math.max(target, 0), last)]);
  });
}

// ---- smoothing: an exponential moving average, as in TensorBoard, over the faded curve

function average(values, weight) {
  let sum = 0, count = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    count += 1;
    return sum / (1 - weight ** count);
  });
}

function smoothed(chart, { values, breaks = [] }, weight) {
  const starts = [0, ...breaks.map((step) => chart.steps.indexOf(step)), values.length];
  const pieces = starts.slice(1).map((end, number) => average(values.slice(starts[number], end), weight));
  let path = "", move = "M";
  pieces.flat().forEach((value, index) => {
    if (breaks.includes(chart.steps[index])) move = "M";
    if (value === null) return;
    path += `${move}${place(chart.x, chart.steps[index]).toFixed(1)} ${place(chart.y, value).toFixed(1)}`;
    move = "L";
  });
  return path;
}

function smooth(weight) {
  for (const chart of charts) {
    chart.svg.querySelectorAll(".trend").forEach((path) => path.remove());
    const series = chart.series.map((one, number) => ({ ...one, number })).filter((one) => !one.errors);
    const drawn = weight > 0 && chart.kind === "lines" && chart.counts === "step" ? series : [];
    chart.svg.classList.toggle("smoothed", drawn.length > 0);
    for (const one of drawn) {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      const swatch = chart.figure.querySelectorAll(".swatch")[one.number];
      path.setAttribute("class", `trend ${[...swatch.classList].find((name) => name.startsWith("series-"))}`);
      path.setAttribute("d", smoothed(chart, one, weight));
      chart.svg.querySelector(".cursor").before(path);
    }
  }
}

for (const control of document.querySelectorAll(".smoothing")) {
  control.hidden = false;
  const input = control.querySelector("input"), output = control.querySelector("output");
  input.addEventListener("input", () => {
    output.textContent = input.value;
    smooth(Number(input.value));
  });
}

// ---- CSV: one row per step

function csv(chart) {
  const names = chart.series.flatMap(({ name, errors }) => (errors ? [name, `${name} ±`] : [name]));
  const rows = chart.steps.map((step, index) => [
    step, phaseAt(chart, step),
    ...chart.series.flatMap(({ values, errors }) => (errors ? [values[index], errors[index]] : [values[index]])),
  ]);
  const cell = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const lines = [[chart.counts.replace(" =", ""), "phase", ...names], ...rows];
  return lines.map((line) => line.map((value) => cell(String(value ?? ""))).join(",") + "\n").join("");
}

for (const chart of charts) {
  const button = chart.figure.querySelector(".csv");
  button.hidden = false;
  button.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv(chart)], { type: "text/csv" }));
    link.download = `${chart.title.replace(/[^\w.-]+/g, "_")}.csv`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
}
