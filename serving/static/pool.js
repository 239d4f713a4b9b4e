// The panel of the block pool: asks the server twice a second while it can be seen.

import { getJson } from "./api.js";
import { BlockCanvas, STATES } from "./blocks.js";
import { colourOf } from "./colours.js";

const EVERY_MS = 500;
const AFTER_ERROR_MS = 2000;
const MAX_ROWS = 12;
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const find = (id) => document.getElementById(id);

export class PoolPanel {
  constructor() {
    this.blocks = new BlockCanvas(find("blocks"));
    this.onScreen = false;
    this.timer = null;
    this.asking = null;
    this.watchPointer();
    this.watchKeys();
    document.addEventListener("visibilitychange", () => this.update());
    new IntersectionObserver((entries) => {
      this.onScreen = entries.at(-1).isIntersecting;
      this.update();
    }).observe(find("blocks"));
  }

  /** Asks at once if the panel can be seen, and not at all otherwise. */
  update() {
    clearTimeout(this.timer);
    this.asking?.abort();
    if (this.onScreen && document.visibilityState === "visible") this.ask();
  }

  async ask() {
    const asking = new AbortController();
    this.asking = asking;
    let wait = EVERY_MS;
    try {
      this.show(await getJson("pool", asking.signal));
      this.note("");
    } catch (error) {
      if (asking.signal.aborted) return;
      wait = AFTER_ERROR_MS;
      const why = error.status === 401 ? "the server wants an API key" : error.message;
      this.note(`No view of the pool: ${why}`);
    }
    if (!asking.signal.aborted) this.timer = setTimeout(() => this.ask(), wait);
  }

  note(text) {
    const note = find("pool-note");
    note.textContent = text;
    note.hidden = !text;
  }

  show(view) {
    this.blocks.show(view);
    const { counts, num_blocks: total, block_size: size } = view;
    const group = this.blocks.grid?.group ?? 1;
    const squares = group > 1 ? `, a square is ${group} blocks` : "";
    find("pool-size").textContent = `${number(total)} blocks of ${size} tokens${squares}`;
    const held = counts.used + counts.shared;
    const wasted = held ? (100 * counts.wasted_slots) / (held * size) : 0;
    const texts = STATES.map((state) => [state, `${number(counts[state])} ${state}`]);
    if (counts.saved) texts[3][1] += ` (saves ${number(counts.saved)})`;
    find("counts").replaceChildren(
      ...texts.map(([state, text]) => item("li", text, state)),
      item("li", `${wasted.toFixed(1)} % of held slots empty`),
    );
    find("blocks").setAttribute("aria-label", `The block pool: ${texts.map((t) => t[1]).join(", ")}`);
    this.showSequences(view.sequences);
    const { cursor } = this.blocks;
    if (cursor >= 0) this.tell(this.blocks.blockOf(Math.floor(cursor / group)));
  }

  showSequences(sequences) {
    const rows = sequences.slice(0, MAX_ROWS).map(([request, index, tokens, blocks]) => {
      const row = document.createElement("tr");
      const name = item("td", index ? `${request} / ${index}` : request, "");
      name.firstChild.style.background = colourOf(request, index);
      name.title = request;
      row.append(name, item("td", number(tokens)), item("td", number(blocks)));
      return row;
    });
    if (sequences.length > MAX_ROWS) {
      const row = document.createElement("tr");
      row.append(item("td", `and ${sequences.length - MAX_ROWS} more`));
      rows.push(row);
    }
    find("sequences").tBodies[0].replaceChildren(...rows);
  }

  watchPointer() {
    const canvas = find("blocks");
    const tip = find("tip");
    canvas.addEventListener("pointermove", (event) => {
      const block = this.blocks.blockAt(event.offsetX, event.offsetY);
      tip.hidden = block < 0;
      if (block < 0) return;
      this.tipAt(event.offsetX, event.offsetY, block);
    });
    for (const name of ["pointerleave", "pointercancel"]) {
      canvas.addEventListener(name, () => { tip.hidden = true; });
    }
  }

  watchKeys() {
    const canvas = find("blocks");
    canvas.addEventListener("keydown", (event) => {
      const step = STEPS[event.key];
      if (!step) return;
      event.preventDefault();
      const block = this.blocks.moveCursor(...step);
      if (block >= 0) this.tell(block);
    });
    canvas.addEventListener("blur", () => {
      this.blocks.hideCursor();
      find("tip").hidden = true;
    });
  }

  /** Tells of the block under the cursor, to eyes and to screen readers. */
  tell(block) {
    const text = this.blocks.describe(block);
    if (find("block-told").textContent !== text) find("block-told").textContent = text;
    const { size, columns, group } = this.blocks.grid;
    const cell = Math.floor(this.blocks.cursor / group);
    find("tip").hidden = false;
    this.tipAt((cell % columns) * size, Math.floor(cell / columns) * size, block);
  }

  /** Puts the words beside a point, on the side where there is more room. */
  tipAt(x, y, block) {
    const canvas = find("blocks");
    const tip = find("tip");
    tip.textContent = this.blocks.describe(block);
    const below = y < canvas.clientHeight / 2;
    tip.style.left = `${Math.max(0, Math.min(x, canvas.clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${below ? y + 18 : y - tip.offsetHeight - 6}px`;
  }
}

function number(value) {
  return value.toLocaleString("en");
}

/** An element with text, after a swatch if it has a kind. */
function item(tag, text, kind = null) {
  const element = document.createElement(tag);
  if (kind !== null) {
    const swatch = document.createElement("i");
    if (kind) swatch.className = kind;
    element.append(swatch);
  }
  element.append(String(text));
  return element;
}
