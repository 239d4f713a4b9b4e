// The canvas: every block of the pool as a square, or a group of them where there are too many.

import { colourOf } from "./colours.js";

export const STATES = ["free", "cached", "used", "shared"];
const [FREE, CACHED, USED, SHARED] = [0, 1, 2, 3];
const LARGEST = 16;
const SMALLEST = 3;

/** The pool's blocks one by one: what GET /pool tells in runs. */
export function unpack(view) {
  const states = new Uint8Array(view.num_blocks);
  const owners = new Int32Array(view.num_blocks);
  let at = 0;
  for (let i = 0; i < view.runs.length; i += 3) {
    const end = at + view.runs[i + 2];
    states.fill(view.runs[i], at, end);
    owners.fill(view.runs[i + 1], at, end);
    at = end;
  }
  const fills = new Map();
  for (let i = 0; i < view.partial.length; i += 2) fills.set(view.partial[i], view.partial[i + 1]);
  return { states, owners, fills };
}

/** How squares are laid out: their size, how many fit in a row, and how many blocks each stands for. */
export function layout(width, height, numBlocks) {
  for (let size = LARGEST; size >= SMALLEST; size--) {
    const columns = Math.floor(width / size);
    if (columns * Math.floor(height / size) >= numBlocks) return { size, columns, group: 1 };
  }
  const columns = Math.max(Math.floor(width / SMALLEST), 1);
  const rows = Math.max(Math.floor(height / SMALLEST), 1);
  return { size: SMALLEST, columns, group: Math.ceil(numBlocks / (columns * rows)) };
}

export class BlockCanvas {
  constructor(canvas) {
    this.canvas = canvas;
    this.view = null;
    this.cursor = -1;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  show(view) {
    this.view = view;
    this.blocks = unpack(view);
    this.draw();
  }

  draw() {
    const { canvas, view } = this;
    const { clientWidth: width, clientHeight: height } = canvas;
    if (!view || !width || !height) return;
    const scale = devicePixelRatio || 1;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    // Custom properties come unresolved, and a canvas knows nothing of light-dark().
    const style = getComputedStyle(canvas);
    const colours = { line: style.borderTopColor, dim: style.caretColor, text: style.color };
    this.grid = layout(width, height, view.num_blocks);
    const cells = Math.ceil(view.num_blocks / this.grid.group);
    for (let cell = 0; cell < cells; cell++) this.drawCell(context, cell, colours);
    if (this.cursor >= 0) this.drawCursor(context, colours);
  }

  /** The block of a group that is most worth seeing: shared before used before cached. */
  blockOf(cell) {
    const { states } = this.blocks;
    const start = cell * this.grid.group;
    const end = Math.min(start + this.grid.group, states.length);
    let best = start;
    for (let block = start; block < end; block++) if (states[block] > states[best]) best = block;
    return best;
  }

  drawCell(context, cell, colours) {
    const { size, columns } = this.grid;
    const block = this.blockOf(cell);
    const x = (cell % columns) * size;
    const y = Math.floor(cell / columns) * size;
    const side = size > 5 ? size - 2 : size - 1;
    const state = this.blocks.states[block];
    if (state === FREE || state === CACHED) {
      context.strokeStyle = state === FREE ? colours.line : colours.dim;
      context.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
      if (state === CACHED) {
        context.beginPath();
        context.moveTo(x, y + side);
        context.lineTo(x + side, y);
        context.stroke();
      }
      return;
    }
    const fill = (this.blocks.fills.get(block) ?? this.view.block_size) / this.view.block_size;
    const high = Math.round(side * fill);
    context.fillStyle = this.colour(block);
    context.globalAlpha = 0.25;
    context.fillRect(x, y, side, side);
    context.globalAlpha = 1;
    context.fillRect(x, y + side - high, side, high);
    if (state === SHARED) {
      context.strokeStyle = colours.text;
      context.lineWidth = size > 9 ? 2 : 1;
      const inset = context.lineWidth / 2;
      context.strokeRect(x + inset, y + inset, side - 2 * inset, side - 2 * inset);
      context.lineWidth = 1;
    }
  }

  drawCursor(context, colours) {
    const { size, columns, group } = this.grid;
    const cell = Math.floor(this.cursor / group);
    context.strokeStyle = colours.text;
    context.lineWidth = 2;
    context.strokeRect((cell % columns) * size, Math.floor(cell / columns) * size, size, size);
    context.lineWidth = 1;
  }

  colour(block) {
    const sequence = this.view.sequences[this.blocks.owners[block]];
    return sequence ? colourOf(sequence[0], sequence[1]) : "gray";
  }

  /** The block at a point of the canvas, or -1. */
  blockAt(x, y) {
    if (!this.grid) return -1;
    const { size, columns, group } = this.grid;
    const column = Math.floor(x / size);
    if (column < 0 || column >= columns || y < 0) return -1;
    const cell = Math.floor(y / size) * columns + column;
    return cell * group < this.view.num_blocks ? this.blockOf(cell) : -1;
  }

  /** Moves the cursor by squares; the first move puts it on the first one. */
  moveCursor(columns, rows) {
    if (!this.grid) return -1;
    const { group } = this.grid;
    const cells = Math.ceil(this.view.num_blocks / group);
    const step = columns + rows * this.grid.columns;
    const cell = this.cursor < 0 ? 0 : Math.floor(this.cursor / group) + step;
    if (cell >= 0 && cell < cells) this.cursor = cell * group;
    this.draw();
    return this.blockOf(Math.floor(this.cursor / group));
  }

  hideCursor() {
    this.cursor = -1;
    this.draw();
  }

  /** Words for one block; blocks are counted from 1, block 0 is the null block. */
  describe(block) {
    const state = this.blocks.states[block];
    const name = `Block ${block + 1}`;
    if (state === FREE) return `${name}: free`;
    if (state === CACHED) return `${name}: free, but its content is still cached`;
    const size = this.view.block_size;
    const fill = this.blocks.fills.get(block) ?? size;
    const [request, index] = this.view.sequences[this.blocks.owners[block]] ?? ["?", 0];
    const who = index ? `${request}, sequence ${index}` : request;
    const more = state === SHARED ? " and others (shared)" : "";
    return `${name}: ${fill} of ${size} tokens of ${who}${more}`;
  }
}
