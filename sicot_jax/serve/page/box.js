"use strict";

// The box drawn over the photo: { left, top, right, bottom }, fractions of the photo.
// A person moves it, drags a corner, or draws a new one; `onChange(box)` is called at the end.
class Box {
  static minSide = 0.04; // a little more than the service's minimum

  constructor(frame, element, shade, onChange) {
    Object.assign(this, { frame, element, shade, onChange, current: null, drag: null, timer: 0 });
    frame.addEventListener("pointerdown", (event) => this.startDrag(event));
    frame.addEventListener("pointermove", (event) => this.continueDrag(event));
    frame.addEventListener("pointerup", (event) => this.endDrag(event));
    frame.addEventListener("pointercancel", () => { if (this.drag) this.draw(this.drag.before); this.drag = null; });
    element.addEventListener("keydown", (event) => this.handleKey(event));
  }

  get busy() { // while a person changes it
    return Boolean(this.drag || this.timer);
  }

  draw(box) { // null removes it
    clearTimeout(this.timer);
    this.timer = 0;
    this.current = box;
    this.element.hidden = this.shade.hidden = !box;
    for (const side in box) this.frame.style.setProperty(`--${side}`, `${100 * box[side]}%`);
  }

  focus() {
    this.element.querySelector("button").focus();
  }

  // The box with some sides moved by x and y; all four sides keep its size, fewer keep `minSide`.
  static moved(box, sides, x, y) {
    const clip = (value, low, high) => Math.min(Math.max(value, low), high);
    const { left, top, right, bottom } = box;
    if (sides.length === 4) {
      const across = clip(x, -left, 1 - right), down = clip(y, -top, 1 - bottom);
      return { left: left + across, top: top + down, right: right + across, bottom: bottom + down };
    }
    return {
      left: sides.includes("left") ? clip(left + x, 0, right - Box.minSide) : left,
      top: sides.includes("top") ? clip(top + y, 0, bottom - Box.minSide) : top,
      right: sides.includes("right") ? clip(right + x, left + Box.minSide, 1) : right,
      bottom: sides.includes("bottom") ? clip(bottom + y, top + Box.minSide, 1) : bottom,
    };
  }

  positionOf(event) { // [x, y], fractions of the photo
    const area = this.frame.getBoundingClientRect();
    const clip = (value) => Math.min(Math.max(value, 0), 1);
    return [clip((event.clientX - area.left) / area.width), clip((event.clientY - area.top) / area.height)];
  }

  startDrag(event) {
    const handle = event.target.closest("[data-sides]");
    if (event.button || this.drag || (!handle && event.pointerType === "touch")) return; // a finger outside the box scrolls the page
    event.preventDefault();
    this.drag = { sides: handle?.dataset.sides.split(" "), start: this.positionOf(event), before: this.current };
    this.frame.setPointerCapture(event.pointerId);
    handle?.focus({ preventScroll: true });
  }

  continueDrag(event) {
    if (!this.drag) return;
    const { sides, start, before } = this.drag;
    const [x, y] = this.positionOf(event);
    if (sides) return this.draw(Box.moved(before, sides, x - start[0], y - start[1]));
    const drawn = { left: Math.min(x, start[0]), top: Math.min(y, start[1]), right: Math.max(x, start[0]), bottom: Math.max(y, start[1]) };
    const largeEnough = drawn.right - drawn.left >= Box.minSide && drawn.bottom - drawn.top >= Box.minSide;
    this.draw(largeEnough ? drawn : before); // a mere click draws nothing
  }

  endDrag(event) {
    if (!this.drag) return;
    this.continueDrag(event);
    const { before } = this.drag;
    this.drag = null;
    if (JSON.stringify(this.current) !== JSON.stringify(before)) this.onChange(this.current);
  }

  handleKey(event) {
    const step = event.shiftKey ? 0.1 : 0.02;
    const offset = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    if (!offset) return;
    event.preventDefault();
    this.draw(Box.moved(this.current, event.target.dataset.sides.split(" "), ...offset));
    this.timer = setTimeout(() => { this.timer = 0; this.onChange(this.current); }, 400); // after the last of several keys
  }
}
