// Shows the values of the step under the pointer, or chosen with the arrow keys, in the caption of a chart.
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const chart = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const values = figure.querySelectorAll(".value");
  let shown = chart.steps.length - 1;

  const show = (index) => {
    shown = Math.min(Math.max(index, 0), chart.steps.length - 1);
    const x = chart.x[shown] * svg.viewBox.baseVal.width;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    figure.querySelector(".at-step").textContent = chart.steps[shown];
    figure.querySelector(".at-phase").textContent = chart.phases[shown] && "· " + chart.phases[shown];
    values.forEach((value, series) => { value.textContent = chart.series[series][shown]; });
  };
  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    let best = 0;
    chart.x.forEach((x, index) => { if (Math.abs(x - share) < Math.abs(chart.x[best] - share)) best = index; });
    show(best);
  };
  svg.addEventListener("pointermove", nearest);
  svg.addEventListener("pointerdown", nearest);
  svg.addEventListener("pointerleave", () => cursor.setAttribute("visibility", "hidden"));
  svg.addEventListener("blur", () => cursor.setAttribute("visibility", "hidden"));
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    show(shown + move);
  });
}
