"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const narrow = window.matchMedia("(max-width: 40rem)").matches;
for (const [id, chart] of Object.entries(charts)) {
  if (narrow) {
    chart.layout.font.size = 11;
    for (const trace of chart.data) {
      if (trace.colorbar) Object.assign(trace.colorbar, { orientation: "h", y: 1, yanchor: "bottom", title: { ...trace.colorbar.title, side: "top" } });
    }
  }
  Plotly.newPlot(id, chart.data, chart.layout, { responsive: true, displayModeBar: false });
}
for (const pair of document.querySelectorAll(".pair")) {
  const slider = pair.querySelector("input");
  const move = () => pair.style.setProperty("--at", slider.value + "%");
  slider.addEventListener("input", move);
  move(); // a browser that reloads the page keeps the slider where it was
}
const resize = () => Object.keys(charts).forEach((id) => Plotly.Plots.resize(id));
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((part) => (part.open = true));
  resize();
});
addEventListener("afterprint", resize);
