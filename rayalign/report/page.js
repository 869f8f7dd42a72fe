"use strict";
// Draws the panels: colours from the style sheet, smoothing by a slider, runs hidden by their boxes.
(() => {
  const HALF_LIVES = [0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]; // in steps; 0 is off
  const THEMES = ["light dark", "light", "dark"];
  const root = document.documentElement;
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const several = Boolean(document.querySelector(".runs"));
  const hidden = new Set();
  const slider = document.querySelector("#smoothing");
  const steps = Number(slider.dataset.steps);

  const probe = document.body.appendChild(document.createElement("span"));
  function color(name, opacity = 1) {
    probe.style.color = `color-mix(in srgb, var(--${name}) ${100 * opacity}%, transparent)`;
    const [, channels] = getComputedStyle(probe).color.match(/\((?:srgb )?(.*)\)/);
    const [r, g, b, a = 1] = channels.split(/[\s,/]+/).map(Number);
    const scale = getComputedStyle(probe).color.startsWith("color(") ? 255 : 1;
    return `rgba(${[r, g, b].map((c) => Math.round(c * scale)).join()},${a})`;
  }

  // Exponential average with weights that halve every `half` steps, corrected for its start; gaps stay gaps.
  function smooth(steps, values, half) {
    if (!half || !values) return values;
    let sum = 0, weight = 0, last = null;
    return values.map((value, i) => {
      if (value === null) return null;
      const decay = last === null ? 0 : 2 ** (-(steps[i] - last) / half);
      last = steps[i];
      sum = sum * decay + value;
      weight = weight * decay + 1;
      return sum / weight;
    });
  }

  const HOVER = "%{y:.4~g}";
  const POINT = "%{fullData.name}<br>step %{customdata:,d}<br>reward %{y:.4~g}<br>KL %{x:.4~g}<extra></extra>";
  const draw = {
    curve(trace, half) {
      const { color: slot, mean, exact } = trace.meta;
      if (exact) half = 0;
      const from = mean || trace;
      const y = smooth(from.x, from.y, half);
      const parts = [];
      if (mean?.band) {
        const band = smooth(mean.x, mean.band, half);
        const edge = (sign) => y.map((v, i) => (v === null || band[i] === null ? null : v + sign * band[i]));
        const line = { width: 0 };
        parts.push({ x: mean.x, y: edge(-1), mode: "lines", line, hoverinfo: "skip" });
        parts.push({ x: mean.x, y: edge(1), mode: "lines", line, hoverinfo: "skip", fill: "tonexty", fillcolor: color(`c${slot}`, several ? 0.06 : 0.14) });
      }
      const solid = { ...trace.line, color: color(`c${slot}`), width: 2 };
      const same = from.x.length === trace.x.length;
      if (half) {
        parts.push({ ...trace, line: { ...trace.line, color: color(`c${slot}`, trace.x.length > 500 ? 0.25 : 0.4), width: 1 }, hoverinfo: "skip" });
        parts.push({ ...trace, x: from.x, y, customdata: same ? trace.y : undefined, line: solid,
          hovertemplate: HOVER + (same ? ", raw %{customdata:.4~g}" : "") });
      } else {
        parts.push({ ...trace, line: { ...solid, width: 1.5 }, hovertemplate: HOVER });
      }
      return parts;
    },
    path(trace, half) {
      const { color: slot } = trace.meta;
      const steps = trace.customdata;
      const faint = { size: 5, color: color(`c${slot}`, half ? 0.35 : 0.8) };
      const parts = [{ ...trace, mode: half ? "markers" : "lines+markers", marker: faint, line: { width: 1, color: color(`c${slot}`, 0.35) }, hovertemplate: POINT }];
      if (half) {
        parts.push({ ...trace, x: smooth(steps, trace.x, half), y: smooth(steps, trace.y, half), mode: "lines",
          line: { color: color(`c${slot}`), width: 2 }, hovertemplate: POINT.replace("<extra>", "<br>smoothed<extra>") });
      }
      return parts;
    },
    area(trace, half) {
      const slot = `c${trace.meta.color}`;
      return [{ ...trace, y: smooth(trace.x, trace.y, half), stackgroup: "one", hovertemplate: "%{y:.2f} s",
        line: { width: 0.5, color: color(slot) }, fillcolor: color(slot, 0.55) }];
    },
    outline(trace, half) {
      return [{ ...trace, y: smooth(trace.x, trace.y, half), line: { width: 1.5, color: color("text") }, hovertemplate: "%{y:.2f} s" }];
    },
    "held-out"(trace) {
      const main = color(`c${trace.meta.color}`);
      const many = trace.x.length > 20;
      const bars = (error) => error && { ...error, color: main, thickness: many ? 0.75 : 1.5, width: many ? 0 : 4 };
      const template = trace.customdata ? POINT : HOVER;
      return [{ ...trace, error_x: bars(trace.error_x), error_y: bars(trace.error_y), hovertemplate: template,
        marker: { symbol: "diamond", size: many ? 6 : 10, color: main, line: { width: many ? 0.5 : 1.5, color: color("panel") } } }];
    },
  };

  function layout(given) {
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("muted") };
    const axis = { gridcolor: color("grid"), linecolor: color("line"), zerolinecolor: color("line"), zerolinewidth: 1, automargin: true,
      fixedrange: matchMedia("(pointer: coarse)").matches }; // so that a finger scrolls the page
    const title = { font: { ...font, size: 11.5 }, standoff: 6 };
    return {
      ...given,
      xaxis: { ...axis, ...given.xaxis, title: { ...title, ...given.xaxis.title }, nticks: 7, showgrid: false, ticks: "outside", ticklen: 4,
        ...(given.xaxis.title.text === "step" && steps <= 7 ? { dtick: 1 } : {}), tickcolor: color("line"), showline: true,
        spikecolor: color("muted"), spikethickness: 1, hoverformat: ",d", unifiedhovertitle: { text: "step %{x}" } },
      yaxis: { ...axis, ...given.yaxis, title: given.yaxis.title && { ...title, ...given.yaxis.title }, nticks: 6,
        exponentformat: "power" },
      font, showlegend: false, paper_bgcolor: color("panel"), plot_bgcolor: color("panel"),
      margin: { l: 44, r: 14, t: 8, b: 40 }, uirevision: "kept",
      modebar: { bgcolor: color("panel"), color: color("muted"), activecolor: color("text") },
      hoverlabel: { bgcolor: color("panel"), bordercolor: color("line"), font: { ...font, color: color("text") }, namelength: 40 },
    };
  }

  const panels = all(".panel").map((panel) => ({
    chart: panel.querySelector(".chart"),
    figure: JSON.parse(panel.querySelector("script").textContent),
  }));
  const options = { displaylogo: false, responsive: true, showSendToCloud: false, showEditInChartStudio: false, plotlyServerURL: "",
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false, modeBarButtons: [["toImage", "resetScale2d"]] };

  function render({ chart, figure }) {
    if (!chart.checkVisibility()) return;
    if (!chart.classList.contains("drawn")) {
      chart.replaceChildren();
      chart.classList.add("drawn");
    }
    const half = HALF_LIVES[slider.value];
    const traces = figure.data.filter((trace) => !hidden.has(trace.meta.run));
    Plotly.react(chart, traces.flatMap((trace) => draw[trace.meta.role](trace, half)), layout(figure.layout), options);
  }

  let waiting = 0;
  function renderAll() {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => panels.forEach(render));
  }

  const offered = HALF_LIVES.filter((half) => half <= Math.max(5, steps / 4));
  slider.max = offered.length - 1;
  slider.value = offered.findLastIndex((half) => half <= Math.max(1, steps / 15));
  const output = document.querySelector(".controls output");
  function showSmoothing() {
    const half = HALF_LIVES[slider.value];
    output.textContent = half ? `${half.toLocaleString("en")} step${half > 1 ? "s" : ""}` : "off";
    slider.setAttribute("aria-valuetext", half ? `half-life ${half} steps` : "off");
  }
  slider.addEventListener("input", () => { showSmoothing(); renderAll(); });
  slider.title = "Exponential average over steps: the steps after which a weight has halved";

  const theme = document.querySelector("#theme");
  let chosen = 0;
  function setTheme(next) {
    chosen = next;
    root.style.colorScheme = THEMES[chosen];
    theme.textContent = `Theme: ${["auto", "light", "dark"][chosen]}`;
  }
  theme.addEventListener("click", () => { setTheme((chosen + 1) % THEMES.length); renderAll(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", renderAll);
  addEventListener("beforeprint", () => { root.style.colorScheme = "light"; panels.forEach(render); });
  addEventListener("afterprint", () => { setTheme(chosen); renderAll(); });

  for (const box of all(".runs input")) {
    box.addEventListener("change", () => {
      const run = Number(box.dataset.run);
      box.checked ? hidden.delete(run) : hidden.add(run);
      all(`main [data-run="${run}"]`).forEach((part) => { part.hidden = !box.checked; });
      renderAll();
    });
  }
  all("details.others").forEach((part) => part.addEventListener("toggle", renderAll));

  const picker = document.querySelector("#prompt");
  if (picker) {
    const show = () => all(".story").forEach((story) => { story.hidden = story.id !== picker.value; });
    picker.addEventListener("change", show);
    all("[data-turn]").forEach((button) => button.addEventListener("click", () => {
      picker.selectedIndex = (picker.selectedIndex + Number(button.dataset.turn) + picker.length) % picker.length;
      show();
    }));
    show();
  }

  all(".controls, .runs, .picker").forEach((part) => { part.hidden = false; });
  if (!panels.length) all(".controls > :not(#theme)").forEach((part) => { part.hidden = true; });
  setTheme(0);
  showSmoothing();
  panels.forEach(render);
})();
