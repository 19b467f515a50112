"use strict";

// The box over the photo: { left, top, right, bottom }, fractions of the photo.
// A person moves it, pulls a corner, or draws a new one; `chosen(box)` is told when that is done.
class Box {
  static smallest = 0.04; // a side: a little more than the service takes

  constructor(frame, box, shade, chosen) {
    Object.assign(this, { frame, box, shade, chosen, now: null, drag: null, timer: 0 });
    frame.addEventListener("pointerdown", (event) => this.down(event));
    frame.addEventListener("pointermove", (event) => this.move(event));
    frame.addEventListener("pointerup", (event) => this.up(event));
    frame.addEventListener("pointercancel", () => { if (this.drag) this.draw(this.drag.before); this.drag = null; });
    box.addEventListener("keydown", (event) => this.key(event));
  }

  get busy() { // a person is at it
    return Boolean(this.drag || this.timer);
  }

  draw(now) { // null: none
    clearTimeout(this.timer);
    this.timer = 0;
    this.now = now;
    this.box.hidden = this.shade.hidden = !now;
    for (const side in now) this.frame.style.setProperty(`--${side}`, `${100 * now[side]}%`);
  }

  focus() {
    this.box.querySelector("button").focus();
  }

  // The box after some of its sides went by x and y: all four keep its size, others leave it `smallest`.
  static moved(box, sides, x, y) {
    const clip = (value, low, high) => Math.min(Math.max(value, low), high);
    const { left, top, right, bottom } = box;
    if (sides.length === 4) {
      const across = clip(x, -left, 1 - right), down = clip(y, -top, 1 - bottom);
      return { left: left + across, top: top + down, right: right + across, bottom: bottom + down };
    }
    return {
      left: sides.includes("left") ? clip(left + x, 0, right - Box.smallest) : left,
      top: sides.includes("top") ? clip(top + y, 0, bottom - Box.smallest) : top,
      right: sides.includes("right") ? clip(right + x, left + Box.smallest, 1) : right,
      bottom: sides.includes("bottom") ? clip(bottom + y, top + Box.smallest, 1) : bottom,
    };
  }

  place(event) {
    const area = this.frame.getBoundingClientRect();
    const clip = (value) => Math.min(Math.max(value, 0), 1);
    return [clip((event.clientX - area.left) / area.width), clip((event.clientY - area.top) / area.height)];
  }

  down(event) {
    const grip = event.target.closest("[data-sides]");
    if (event.button || this.drag || (!grip && event.pointerType === "touch")) return; // a finger beside the box scrolls the page
    event.preventDefault();
    this.drag = { sides: grip?.dataset.sides.split(" "), from: this.place(event), before: this.now };
    this.frame.setPointerCapture(event.pointerId);
    grip?.focus({ preventScroll: true });
  }

  move(event) {
    if (!this.drag) return;
    const { sides, from, before } = this.drag;
    const [x, y] = this.place(event);
    if (sides) return this.draw(Box.moved(before, sides, x - from[0], y - from[1]));
    const drawn = { left: Math.min(x, from[0]), top: Math.min(y, from[1]), right: Math.max(x, from[0]), bottom: Math.max(y, from[1]) };
    const large = drawn.right - drawn.left >= Box.smallest && drawn.bottom - drawn.top >= Box.smallest;
    this.draw(large ? drawn : before); // a mere click draws nothing
  }

  up(event) {
    if (!this.drag) return;
    this.move(event);
    const { before } = this.drag;
    this.drag = null;
    if (JSON.stringify(this.now) !== JSON.stringify(before)) this.chosen(this.now);
  }

  key(event) {
    const step = event.shiftKey ? 0.1 : 0.02;
    const way = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    if (!way) return;
    event.preventDefault();
    this.draw(Box.moved(this.now, event.target.dataset.sides.split(" "), ...way));
    this.timer = setTimeout(() => { this.timer = 0; this.chosen(this.now); }, 400); // after the last of several
  }
}
