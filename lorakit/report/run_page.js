// Values under the pointer, and the slider of the ranks. Without this script the page shows all but
// these.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function digits(value) {
  return Math.abs(value) >= 1e4 || Number.isInteger(value)
    ? value.toLocaleString("en", { maximumFractionDigits: 0 })
    : String(Number(value.toPrecision(4)));
}

function nearest(sorted, wanted) {
  let low = 0;
  let high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= wanted) low = middle;
    else high = middle;
  }
  return wanted - sorted[low] <= sorted[high] - wanted ? low : high;
}

function follow(figure) {
  const svg = figure.querySelector("svg[role=img]");
  const tip = figure.querySelector(".tip");
  const cursor = figure.querySelector(".cursor");
  const data = JSON.parse(figure.querySelector("script").textContent);
  const [first, last, left, right] = data.x;
  const [bottomValue, topValue, bottom, top] = data.y;
  const steps = [...new Set(data.series.flatMap((one) => one.steps))].sort((a, b) => a - b);
  const x = (step) => left + ((step - first) / (last - first)) * (right - left);
  const y = (value) =>
    bottom + ((value - bottomValue) / (topValue - bottomValue)) * (top - bottom);
  let shown = steps.length - 1;

  function draw(name, attributes) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    cursor.append(element);
  }

  function show(at) {
    shown = Math.max(0, Math.min(steps.length - 1, at));
    const step = steps[shown];
    const lines = [];
    cursor.replaceChildren();
    draw("line", { x1: x(step), x2: x(step), y1: top, y2: bottom, class: "rule" });
    data.series.forEach((one, number) => {
      const i = nearest(one.steps, step);
      draw("circle", { cx: x(one.steps[i]), cy: y(one.values[i]), r: 4, class: `dot c${number}` });
      const named = data.series.length > 1 ? `${one.name} ` : "";
      lines.push(`step ${digits(one.steps[i])}: ${named}${digits(one.values[i])}`);
    });
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const share = x(step) / svg.viewBox.baseVal.width;
    tip.style.left = share < 0.5 ? `${share * 100}%` : "auto";
    tip.style.right = share < 0.5 ? "auto" : `${(1 - share) * 100}%`;
  }

  function hide() {
    tip.hidden = true;
    cursor.replaceChildren();
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    show(nearest(steps, first + ((place - left) / (right - left)) * (last - first)));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("focus", () => show(shown));
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -steps.length, End: steps.length };
    if (event.key in move) {
      show(shown + move[event.key]);
      event.preventDefault();
    }
  });
}

function slide(section) {
  const data = JSON.parse(section.querySelector("script").textContent);
  const slider = section.querySelector("input");
  const label = section.querySelector("output");
  const cells = [...section.querySelectorAll("[data-modules]")].map((element) => ({
    element,
    modules: element.dataset.modules.split(" ").map(Number),
  }));
  const sum = (ranks, modules) => modules.reduce((total, i) => total + ranks[i], 0);

  function show(at) {
    const ranks = [...data.ranks];
    for (const record of data.records.slice(1, at + 1)) {
      for (const [module, rank] of Object.entries(record.changed)) ranks[module] = rank;
    }
    for (const { element, modules } of cells) {
      const now = sum(ranks, modules);
      const delta = now - sum(data.ranks, modules);
      element.style.setProperty("--share", now / data.highest);
      element.replaceChildren(String(now));
      if (delta !== 0) {
        const move = document.createElement("small");
        move.textContent = ` ${delta > 0 ? "+" : "\u2212"}${Math.abs(delta)}`;
        element.append(move);
      }
    }
    const { step, pool, budget } = data.records[at];
    const next = data.records[at + 1];
    const until = next ? `steps ${step} to ${next.step - 1}` : `from step ${step} on`;
    label.textContent = `${until}: ranks ${sum(ranks, ranks.map((_, i) => i))}, pool ${pool}, budget ${budget}`;
  }

  slider.addEventListener("input", () => show(Number(slider.value)));
  section.querySelector(".slider").hidden = false;
  show(Number(slider.value));
}

document.querySelectorAll(".chart").forEach(follow);
document.querySelectorAll(".ranks.moved").forEach(slide);
