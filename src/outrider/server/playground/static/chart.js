// Acceptance by draft position: this run beside what is on record and what the engine has seen of late.

import { colour } from "./tokens.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190;
const EDGE = { top: 18, right: 6, bottom: 22, left: 34 };

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

export const percent = (rate) => (rate === undefined ? "–" : `${(100 * rate).toFixed(0)} %`);

const length = (rates) => (rates?.length ? (1 + rates.reduce((sum, rate) => sum + rate, 0)).toFixed(2) : "–");

/** The figure and, for whoever reads rather than looks, its numbers in a table. */
export class AcceptanceChart {
  #drawn = "";

  constructor(svg, body, foot) {
    this.svg = svg;
    this.body = body;
    this.foot = foot;
    this.figures = { positions: 0 };
    new ResizeObserver(() => this.#draw()).observe(svg.parentElement);
  }

  /** `run`, `record`, `recent`: rates from 0 to 1, first position first; undefined where there are none. */
  show(figures) {
    this.figures = figures;
    this.#tabulate();
    this.#draw();
  }

  #tabulate() {
    const { positions, run, record, recent } = this.figures;
    const row = (head, cells) => {
      const made = document.createElement("tr");
      const name = document.createElement("th");
      name.scope = "row";
      name.append(head);
      made.append(name, ...cells.map((cell) => Object.assign(document.createElement("td"), { textContent: cell })));
      return made;
    };
    const rows = Array.from({ length: positions }, (_, index) =>
      row(swatch(index + 1), [run, record, recent].map((rates) => percent(rates?.[index]))),
    );
    this.body.replaceChildren(...rows);
    this.foot.replaceChildren(row("tokens a round", [run, record, recent].map(length)));
  }

  #draw() {
    const width = Math.floor(this.svg.parentElement.clientWidth);
    const { positions, run, record, recent } = this.figures;
    const wanted = JSON.stringify([width, this.figures]);
    if (!width || !positions || wanted === this.#drawn) return;
    this.#drawn = wanted;
    const high = HEIGHT - EDGE.top - EDGE.bottom;
    const step = (width - EDGE.left - EDGE.right) / positions;
    const bar = Math.min(step * 0.56, 38);
    const y = (rate) => EDGE.top + high * (1 - rate);
    const parts = [];
    for (const rate of [0, 0.25, 0.5, 0.75, 1]) {
      parts.push(shape("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(rate), y2: y(rate) }));
      parts.push(shape("text", { class: "scale", x: EDGE.left - 6, y: y(rate) + 3.5, "text-anchor": "end" }, 100 * rate));
    }
    for (let index = 0; index < positions; index++) {
      const middle = EDGE.left + step * (index + 0.5);
      if (run) {
        const rate = run[index] ?? 0;
        const box = { x: middle - bar / 2, y: y(rate), width: bar, height: high * rate, rx: 2 };
        parts.push(shape("rect", { class: `bar ${colour(index + 1)}`, ...box }));
        const above = Math.min(y(rate), y(record?.[index] ?? 0), y(recent?.[index] ?? 0)) - 6;
        if (step > 30) parts.push(shape("text", { class: "figure", x: middle, y: above, "text-anchor": "middle" }, (100 * rate).toFixed(0)));
      }
      if (record?.[index] !== undefined) {
        const at = y(record[index]);
        parts.push(shape("line", { class: "record", x1: middle - bar / 2 - 5, x2: middle + bar / 2 + 5, y1: at, y2: at }));
      }
      if (recent?.[index] !== undefined) {
        parts.push(shape("circle", { class: "recent", cx: middle, cy: y(recent[index]), r: 3.5 }));
      }
      parts.push(shape("text", { class: "scale", x: middle, y: HEIGHT - 6, "text-anchor": "middle" }, index + 1));
    }
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.setAttribute("height", HEIGHT);
    this.svg.replaceChildren(...parts);
  }
}

export function swatch(position) {
  const made = document.createElement("span");
  made.className = `swatch draft ${colour(position)}`;
  made.textContent = position;
  return made;
}
