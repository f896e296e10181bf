"use strict";
/* The slice viewer. No library, no network. */

const COLOURS = { reference: "#56b4e9", prediction: "#e69f00", crosshair: "rgba(255,255,255,.45)" };
const LABEL_COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#ffffff"];
const LEVEL_COLOURS = ["#f0e442", "#cc79a7", "#00b386", "#b48cff"];
const LEVEL_NAMES = ["1/2", "1/4", "1/8", "1/16"];
const SCORE_COLOURS = ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"];
/* u runs from right to left of the picture, v from bottom to top, w into it; numbers are the axes of the scan (R, A, S). */
const PLANES = { axial: { u: 0, v: 1, w: 2 }, coronal: { u: 0, v: 2, w: 1 }, sagittal: { u: 1, v: 2, w: 0 } };
const WHEEL_STEP = 30;
const MAX_FIRST_ZOOM = 4;

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/* Cuts a plane out of a volume stored with its last axis running fastest: value at (i, j) is cells[i * high + j]. */
function cut(volume, shape, offset, { u, v, w }, slice) {
  const strides = [shape[1] * shape[2], shape[2], 1];
  const cells = new Uint8Array(shape[u] * shape[v]);
  if (slice < 0 || slice >= shape[w]) return cells;
  let place = 0;
  for (let i = 0; i < shape[u]; i++) {
    let from = offset + slice * strides[w] + i * strides[u];
    for (let j = 0; j < shape[v]; j++, from += strides[v]) cells[place++] = volume[from];
  }
  return cells;
}

/* The outline of a mask along the edges of its voxels, in runs as long as possible. */
function outline(inside, wide, high, x, y) {
  const path = new Path2D();
  const at = (i, j) => i >= 0 && j >= 0 && i < wide && j < high && inside[i * high + j] > 0;
  const trace = (lines, length, differs, point) => {
    for (let line = 0; line <= lines; line++) {
      for (let i = 0, from = -1; i <= length; i++) {
        const edge = i < length && differs(i, line);
        if (edge && from < 0) from = i;
        if (edge || from < 0) continue;
        path.moveTo(...point(from, line));
        path.lineTo(...point(i, line));
        from = -1;
      }
    }
  };
  trace(high, wide, (i, j) => at(i, j) !== at(i, j - 1), (i, j) => [x(i), y(j)]);
  trace(wide, high, (j, i) => at(i, j) !== at(i - 1, j), (j, i) => [x(i), y(j)]);
  return path;
}

function scoreColour(share) {
  const place = clamp(share, 0, 1) * (SCORE_COLOURS.length - 1);
  const first = Math.min(Math.floor(place), SCORE_COLOURS.length - 2);
  const part = (colour, start) => parseInt(colour.slice(start, start + 2), 16);
  const mixed = [1, 3, 5].map((start) => {
    const [low, high] = [part(SCORE_COLOURS[first], start), part(SCORE_COLOURS[first + 1], start)];
    return Math.round(low + (high - low) * (place - first));
  });
  return `rgb(${mixed.join(",")})`;
}

class Viewer {
  constructor(root) {
    this.root = root;
    this.blocks = [...root.querySelectorAll("script.case")];
    this.buttons = [...root.querySelectorAll(".picker button")];
    this.panes = [...root.querySelectorAll(".plane")].map((figure) => ({
      plane: PLANES[figure.dataset.plane],
      name: figure.dataset.plane,
      canvas: figure.querySelector("canvas"),
      slider: figure.querySelector(".slice"),
      output: figure.querySelector("output"),
      wheel: 0,
    }));
    this.listen();
    this.show(0);
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  on(selector) {
    const box = this.find(`input.${selector}`);
    return Boolean(box && box.checked);
  }

  listen() {
    this.buttons.forEach((button, index) => button.addEventListener("click", () => this.show(index)));
    this.find(".controls").addEventListener("input", (event) => this.changed(event.target));
    this.find(".reset").addEventListener("click", () => this.reset());
    for (const pane of this.panes) {
      const { canvas, slider, plane } = pane;
      slider.addEventListener("input", () => this.go(plane.w, Number(slider.value)));
      canvas.addEventListener("wheel", (event) => this.wheeled(event, pane), { passive: false });
      canvas.addEventListener("keydown", (event) => this.pressed(event, plane));
      canvas.addEventListener("contextmenu", (event) => event.preventDefault());
      canvas.addEventListener("pointerdown", (event) => this.touched(event, pane));
      canvas.addEventListener("pointermove", (event) => this.dragged(event, pane));
      new ResizeObserver(() => this.draw()).observe(canvas);
    }
  }

  async show(index) {
    this.buttons.forEach((button, each) => button.setAttribute("aria-pressed", String(each === index)));
    this.wanted = index;
    const data = JSON.parse(this.blocks[index].textContent);
    const channels = await Promise.all(data.channels.map((channel) => inflate(channel.data)));
    const masks = {};
    for (const role of ["reference", "prediction"]) {
      masks[role] = data.masks[role] === null ? null : await inflate(data.masks[role]);
    }
    if (this.wanted !== index) return; // another case was picked meanwhile
    this.data = data;
    this.volumes = channels;
    this.masks = masks;
    this.imageShape = data.shape.map((size, axis) => Math.ceil(size / data.factors[axis]));
    this.channel = 0;
    this.hiddenLabels = new Set();
    this.fillControls();
    this.reset();
    this.root.dataset.shown = data.id;
  }

  fillControls() {
    const { data } = this;
    const choice = this.find("select.channel");
    choice.replaceChildren(...data.channels.map((channel, index) => new Option(channel.name, String(index))));
    choice.parentElement.hidden = data.channels.length < 2;
    this.find(".labels").replaceChildren(...(data.labels.length > 1 ? data.labels.map((...label) => this.labelSwitch(...label)) : []));
    this.find(".facts").replaceChildren(...data.facts.flatMap(([name, fact]) => [make("dt", name), make("dd", fact)]));
    this.find(".note").textContent = data.note;
    for (const pane of this.panes) pane.slider.max = String(data.shape[pane.plane.w] - 1);
  }

  labelSwitch(name, index) {
    const label = make("label");
    const box = make("input");
    Object.assign(box, { type: "checkbox", checked: true, className: "label" });
    box.dataset.label = String(index);
    const swatch = make("i");
    swatch.className = "swatch";
    swatch.style.borderColor = this.colour("prediction", index);
    label.append(box, this.masks.reference ? "" : swatch, ` ${name}`);
    return label;
  }

  /* Beside a reference the colour says whose contour it is; alone, it can say which label. */
  colour(role, label) {
    return this.masks.reference ? COLOURS[role] : LABEL_COLOURS[label % LABEL_COLOURS.length];
  }

  reset() {
    const { start, shape, masks } = this.data;
    this.position = [...start];
    this.centre = start.map((_, axis) => masks.first[axis] + masks.shape[axis] / 2);
    // Small findings are shown enlarged: they would be a few pixels of the whole scan.
    const room = Math.min(...shape.map((size, axis) => size / masks.shape[axis]));
    this.find("input.zoom").value = Number.isFinite(room) ? String(clamp(0.35 * room, 1, MAX_FIRST_ZOOM)) : "1";
    this.find("input.level").value = "128";
    this.find("input.window").value = "256";
    this.draw();
  }

  changed(target) {
    if (target.matches("select.channel")) this.channel = Number(target.value);
    if (target.matches("input.label")) {
      this.hiddenLabels[target.checked ? "delete" : "add"](Number(target.dataset.label));
    }
    this.draw();
  }

  go(axis, slice) {
    this.position[axis] = clamp(Math.round(slice), 0, this.data.shape[axis] - 1);
    this.draw();
  }

  wheeled(event, pane) {
    if (event.ctrlKey) return; // the browser's own zoom
    event.preventDefault();
    pane.wheel += event.deltaMode === 0 ? event.deltaY : event.deltaY * WHEEL_STEP;
    const steps = Math.trunc(pane.wheel / WHEEL_STEP);
    pane.wheel -= steps * WHEEL_STEP;
    // A mouse wheel gives about 100 a notch, which is to be one slice; a touchpad gives many small amounts.
    if (steps) this.go(pane.plane.w, this.position[pane.plane.w] - (Math.abs(steps) > 2 ? Math.sign(steps) : steps));
  }

  pressed(event, plane) {
    const last = this.data.shape[plane.w] - 1;
    const now = this.position[plane.w];
    const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 5, PageDown: -5, Home: -last, End: last };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.go(plane.w, now + steps[event.key]);
  }

  touched(event, pane) {
    if (event.button === 0) this.pointAt(event, pane);
    if (event.pointerType !== "touch") pane.canvas.setPointerCapture(event.pointerId);
  }

  dragged(event, pane) {
    if (event.buttons === 2) {
      for (const [name, change] of [["window", event.movementX], ["level", -event.movementY]]) {
        const slider = this.find(`input.${name}`);
        slider.value = String(Number(slider.value) + change);
      }
      this.draw();
    } else if (event.buttons === 1 && event.pointerType !== "touch") this.pointAt(event, pane);
  }

  pointAt(event, { canvas, plane }) {
    const box = canvas.getBoundingClientRect();
    const { x0, y0, du, dv } = this.geometry(canvas, plane);
    const x = ((event.clientX - box.left) * canvas.width) / box.width;
    const y = ((event.clientY - box.top) * canvas.height) / box.height;
    for (const [axis, place] of [[plane.u, (x0 - x) / du], [plane.v, (y0 - y) / dv]]) {
      this.position[axis] = clamp(Math.floor(place), 0, this.data.shape[axis] - 1);
    }
    this.draw();
  }

  /* Pixel of the edge at voxel 0 on both axes, and pixels a voxel; edge i lies at x0 - i * du, y0 - i * dv. */
  geometry(canvas, { u, v }) {
    const { shape, spacing } = this.data;
    const fitted = Math.min(canvas.width / (shape[u] * spacing[u]), canvas.height / (shape[v] * spacing[v]));
    const scale = fitted * Number(this.find("input.zoom").value);
    const origin = (axis, length) => {
      const voxel = spacing[axis] * scale;
      const visible = length / voxel;
      if (visible >= shape[axis]) return (length + shape[axis] * voxel) / 2;
      const slice = this.position[axis] + 0.5;
      if (Math.abs(slice - this.centre[axis]) > visible / 2) this.centre[axis] = slice;
      return length / 2 + clamp(this.centre[axis], visible / 2, shape[axis] - visible / 2) * voxel;
    };
    return { x0: origin(u, canvas.width), y0: origin(v, canvas.height), du: spacing[u] * scale, dv: spacing[v] * scale };
  }

  draw() {
    if (!this.data) return;
    for (const pane of this.panes) this.drawPane(pane);
    this.readOut();
    this.drawKey();
  }

  drawPane({ plane, name, canvas, slider, output }) {
    const dense = window.devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * dense));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * dense));
    const context = canvas.getContext("2d");
    const place = this.geometry(canvas, plane);
    const x = (i) => Math.round(place.x0 - i * place.du);
    const y = (i) => Math.round(place.y0 - i * place.dv);
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.save();
    context.beginPath();
    const { shape } = this.data;
    context.rect(x(shape[plane.u]), y(shape[plane.v]), x(0) - x(shape[plane.u]), y(0) - y(shape[plane.v]));
    context.clip();
    if (this.volumes.length) this.drawImage(context, plane, x, y);
    this.drawTokens(context, plane, x, y, dense);
    this.drawMasks(context, plane, x, y, Math.min(place.du, place.dv) < 4 * dense ? 0.5 : 1);
    if (this.on("crosshair")) this.drawCrosshair(context, plane, x, y, dense);
    context.restore();
    const [slice, count] = [this.position[plane.w], shape[plane.w]];
    slider.value = String(slice);
    output.textContent = `${slice + 1} / ${count}`;
    canvas.dataset.slice = String(slice);
    canvas.setAttribute("aria-label", `${name} slice ${slice + 1} of ${count} of ${this.data.id}; arrow keys change it`);
  }

  drawImage(context, plane, x, y) {
    const { u, v, w } = plane;
    const { factors } = this.data;
    const [wide, high] = [this.imageShape[u], this.imageShape[v]];
    const cells = cut(this.volumes[this.channel], this.imageShape, 0, plane, Math.floor(this.position[w] / factors[w]));
    const level = Number(this.find("input.level").value);
    const width = Number(this.find("input.window").value);
    const greys = Uint8ClampedArray.from({ length: 256 }, (_, stored) => ((stored - level) / width + 0.5) * 255);
    const pixels = new ImageData(wide, high);
    const words = new Uint32Array(pixels.data.buffer);
    for (let i = 0; i < wide; i++) {
      for (let j = 0; j < high; j++) {
        words[(high - j) * wide - 1 - i] = 0xff000000 | (greys[cells[i * high + j]] * 0x010101);
      }
    }
    const small = new OffscreenCanvas(wide, high);
    small.getContext("2d").putImageData(pixels, 0, 0);
    const [left, top] = [x(wide * factors[u]), y(high * factors[v])];
    context.imageSmoothingQuality = "high";
    context.drawImage(small, left, top, x(0) - left, y(0) - top);
  }

  /* One label of one mask in a plane, within the box that is stored. */
  maskCells(role, label, { u, v, w }) {
    const { first, shape } = this.data.masks;
    const size = shape[0] * shape[1] * shape[2];
    const cells = cut(this.masks[role], shape, (label >> 3) * size, { u, v, w }, this.position[w] - first[w]);
    return cells.map((bits) => (bits >> (label & 7)) & 1);
  }

  drawMasks(context, plane, x, y, weight) {
    const { first, shape } = this.data.masks;
    const roles = ["reference", "prediction"].filter((role) => this.masks[role] && this.on(role));
    const [wide, high] = [shape[plane.u], shape[plane.v]];
    const toX = (i) => x(i + first[plane.u]);
    const toY = (j) => y(j + first[plane.v]);
    const strokes = [];
    this.data.labels.forEach((_, label) => {
      if (this.hiddenLabels.has(label)) return;
      const cells = roles.map((role) => this.maskCells(role, label, plane));
      roles.forEach((role, index) => {
        const colour = this.colour(role, label);
        const other = cells[1 - index];
        if (this.on("fill")) fillCells(context, cells[index].map((on, at) => on && !(other && other[at])), high, toX, toY, colour);
        strokes.push([role, colour, outline(cells[index], wide, high, toX, toY)]);
      });
    });
    context.lineCap = "square";
    // The reference lies below and is wider, so that both show where they agree.
    strokes.sort((a, b) => (a[0] < b[0] ? 1 : -1));
    for (const [role, colour, path] of strokes) {
      context.lineWidth = Math.round((role === "reference" ? 2 + 2 * weight : 2 * weight) * (window.devicePixelRatio || 1));
      context.strokeStyle = colour;
      context.stroke(path);
    }
  }

  // Those of the chosen model, where several segmented together.
  get tokens() {
    return this.data.tokens[Number(this.find("select.token-model")?.value || 0)];
  }

  drawTokens(context, plane, x, y, dense) {
    const { tokens } = this;
    const mode = this.find("select.tokens")?.value;
    if (!tokens || !mode) return;
    const { u, v, w } = plane;
    const middle = this.position[w] + 0.5;
    const [low, high] = range(tokens.score);
    tokens.boxes.forEach((box, index) => {
      if (middle < box[w] || middle >= box[w + 3]) return;
      const level = tokens.level[index];
      const [left, right, top, bottom] = [x(box[u + 3]), x(box[u]), y(box[v + 3]), y(box[v])];
      context.lineWidth = dense;
      context.strokeStyle = "rgba(255,255,255,.22)";
      context.strokeRect(left, top, right - left, bottom - top);
      // The levels share their cells, so each has a quarter of it.
      const [wide, tall] = [(right - left) / 2, (bottom - top) / 2];
      const colour = mode === "level" ? LEVEL_COLOURS[level] : scoreColour((tokens.score[index] - low) / (high - low || 1));
      const quarter = [left + (level % 2) * wide + 2 * dense, top + (level >> 1) * tall + 2 * dense, wide - 4 * dense, tall - 4 * dense];
      context.fillStyle = context.strokeStyle = colour;
      context.globalAlpha = 0.35;
      context.fillRect(...quarter);
      context.globalAlpha = 0.9;
      context.strokeRect(...quarter);
      context.globalAlpha = 1;
    });
  }

  drawCrosshair(context, plane, x, y, dense) {
    const [column, row] = [this.position[plane.u] + 0.5, this.position[plane.v] + 0.5];
    const gap = 12 * dense;
    context.lineWidth = dense;
    context.strokeStyle = COLOURS.crosshair;
    context.beginPath();
    for (const [from, to] of [[0, x(column) - gap], [x(column) + gap, context.canvas.width]]) {
      context.moveTo(from, y(row));
      context.lineTo(to, y(row));
    }
    for (const [from, to] of [[0, y(row) - gap], [y(row) + gap, context.canvas.height]]) {
      context.moveTo(x(column), from);
      context.lineTo(x(column), to);
    }
    context.stroke();
  }

  drawKey() {
    const key = this.find(".key");
    const { tokens } = this;
    if (!key) return;
    const mode = this.find("select.tokens").value;
    const entries = { level: LEVEL_NAMES.map((name, level) => [LEVEL_COLOURS[level], name]), score: [] }[mode] || [];
    if (mode === "score" && tokens) {
      const [low, high] = range(tokens.score);
      entries.push([SCORE_COLOURS[0], low.toFixed(2)], [SCORE_COLOURS[2], ""], [SCORE_COLOURS[4], high.toFixed(2)]);
    }
    const count = mode && tokens ? `· ${tokens.boxes.length} of ${tokens.total} kept; each cell in four quarters, one a level` : "";
    key.replaceChildren(...entries.flatMap(([colour, name]) => {
      const swatch = make("i");
      swatch.className = "swatch";
      swatch.style.background = swatch.style.borderColor = colour;
      return [swatch, ` ${name} `];
    }), mode && !tokens ? " none for this case" : count);
  }

  readOut() {
    const { data, position } = this;
    const parts = [`voxel ${position.join(", ")}`];
    if (this.volumes.length) {
      const [i, j, k] = position.map((place, axis) => Math.floor(place / data.factors[axis]));
      const { name, low, high } = data.channels[this.channel];
      const stored = this.volumes[this.channel][(i * this.imageShape[1] + j) * this.imageShape[2] + k];
      parts.push(`${name} ${Number((low + (stored / 255) * (high - low)).toPrecision(3))}`);
    }
    for (const role of ["reference", "prediction"]) {
      if (this.masks[role]) parts.push(`${role}: ${this.labelsAt(role).join(", ") || "background"}`);
    }
    this.find(".readout").textContent = parts.join(" · ");
  }

  labelsAt(role) {
    const { first, shape } = this.data.masks;
    const [i, j, k] = this.position.map((place, axis) => place - first[axis]);
    if ([i, j, k].some((place, axis) => place < 0 || place >= shape[axis])) return [];
    const place = (i * shape[1] + j) * shape[2] + k;
    const size = shape[0] * shape[1] * shape[2];
    return this.data.labels.filter((_, label) => (this.masks[role][(label >> 3) * size + place] >> (label & 7)) & 1);
  }
}

function fillCells(context, cells, high, x, y, colour) {
  context.fillStyle = colour;
  context.globalAlpha = 0.5;
  cells.forEach((on, at) => {
    const [i, j] = [Math.floor(at / high), at % high];
    if (on) context.fillRect(x(i + 1), y(j + 1), x(i) - x(i + 1), y(j) - y(j + 1));
  });
  context.globalAlpha = 1;
}

function range(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

function make(name, text) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  return node;
}
