// Runs the page's script against a real server, with the little of a browser that it uses.
"use strict";
const [url, html, ...steps] = process.argv.slice(2);
const source = require("fs").readFileSync(html, "utf8");
const elements = {};

class Element {
  constructor(attributes = {}) {
    Object.assign(this, { value: "", textContent: "", className: "", hidden: false, style: {},
      disabled: false, children: [], attributes: {}, listeners: {} }, attributes);
  }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  replaceChildren(...children) { this.children = children; }
  fire(name) { return this.listeners[name]({ preventDefault() {} }); }
}

for (const [tag, id] of source.matchAll(/<[^>]*\bid="([\w-]+)"[^>]*>/g))
  elements[id] = new Element({
    value: /value="([^"]*)"/.exec(tag)?.[1] ?? "", hidden: /\bhidden\b/.test(tag) });

// Pixels are the bytes of the file: they are equal where the pictures are.
const bytesOf = (image) => Buffer.from(image.src.split(",")[1], "base64").subarray(0, 400);
globalThis.Image = class extends Element { async decode() { this.naturalWidth = 1; } };
globalThis.document = {
  getElementById: (id) => elements[id],
  createElement: () => new Element({ getContext: () => ({
    drawImage(image) { this.image = image; },
    getImageData() { return { data: bytesOf(this.image) }; },
  }) }),
};
const fetching = globalThis.fetch;
let waiting = 0;
globalThis.fetch = async (route, options) => {
  waiting++;
  try { return await fetching(url + route, options); } finally { waiting--; }
};

const settle = async () => {
  do { await new Promise((done) => setTimeout(done, 30)); } while (waiting);
};
const seen = () => ({
  ...Object.fromEntries(Object.entries(elements).map(([id, one]) => [id, one.textContent])),
  pressed: elements.plan.children.map((cell) => cell.attributes["aria-pressed"] === "true"),
  stride: elements.stride.value, shown: !elements.result.hidden,
  busy: elements.progress.className, can_draw: !elements.draw.disabled,
  asks_token: !elements["token-field"].hidden, clip: elements.cached.style.clipPath,
});

(async () => {
  const script = /<script>([^]*)<\/script>/.exec(source)[1];
  const { psnr } = new Function(script + "; return { psnr };")();
  const states = [];
  for (const step of steps) {
    await settle();
    const [what, which, value] = JSON.parse(step);
    if (what === "click") elements.plan.children[which].fire("click");
    if (what === "set") { elements[which].value = value; elements[which].listeners.change?.(); }
    if (what === "slide") { elements.slider.value = which; elements.slider.fire("input"); }
    if (what === "draw") elements.form.fire("submit");
    if (what === "psnr") states.push(psnr(which, value));
    await settle();
    if (what === "see") states.push(seen());
  }
  console.log(JSON.stringify(states));
})();
