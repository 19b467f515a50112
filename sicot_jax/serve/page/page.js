"use strict";

const $ = (id) => document.getElementById(id);
const SIDES = ["left", "top", "right", "bottom"];
let photo = null; // the file that is shown
let given = null; // the part of it that a person chose
let found = null; // the model's box of the whole photo
let turn = 0, list = 0; // answers to earlier questions are dropped: of photos, of categories

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function headers() {
  return $("key").value ? { Authorization: `Bearer ${$("key").value}` } : {};
}

function picture(product) {
  const img = element("img");
  img.alt = product.title || product.sku;
  img.loading = "lazy";
  const address = product.images[0];
  if (!address) img.hidden = true;
  else if (!$("key").value) img.src = address;
  else // an <img> sends no key
    fetch(address, { headers: headers() })
      .then((response) => (response.ok ? response.blob() : Promise.reject(response.status)))
      .then((blob) => { img.src = URL.createObjectURL(blob); img.onload = () => URL.revokeObjectURL(img.src); })
      .catch(() => { img.hidden = true; });
  return img;
}

const percent = (share) => (share >= 0.9995 ? "over 99.9 %" : `${(100 * share).toFixed(1)} %`);

function best(product, answer) {
  const box = element("div", answer.known === false ? "best unknown" : "best");
  box.append(picture(product));
  const words = element("div");
  if (answer.known === false) {
    words.append(element("h2", "", "Not in our catalogue"));
    words.append(element("p", "soft", "The nearest we have:"));
  }
  words.append(element(answer.known === false ? "p" : "h2", "", product.title || product.sku));
  words.append(element("p", "soft", `SKU ${product.sku}`));
  for (const text of [product.category, product.tags]) if (text) words.append(element("p", "soft", text));
  const sure = answer.confidence ?? product.probability;
  const line = element("p", "sure");
  const meter = element("meter");
  Object.assign(meter, { min: 0, max: 1, value: sure });
  meter.setAttribute("aria-hidden", "true");
  line.append(meter, element("span", "", `${percent(sure)} sure`));
  words.append(line);
  box.append(words);
  return box;
}

function card(product, text) {
  const item = element("li", "card");
  item.append(picture(product), element("p", "", product.title || product.sku), element("p", "soft", text));
  return item;
}

function say(text, bad) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", Boolean(bad));
}

async function ask(path) {
  const form = new FormData();
  form.append("photo", photo);
  const part = given ? `&box=${SIDES.map((side) => given[side].toFixed(4)).join(",")}` : "";
  const response = await fetch(path + part, { method: "POST", body: form, headers: headers() });
  const answer = await response.json().catch(() => ({}));
  if (response.status === 401) { $("key-box").hidden = false; $("key-box").open = true; $("key").focus(); }
  if (!response.ok) throw new Error(answer.error ? answer.error.message : `the service answered ${response.status}`);
  return answer;
}

function showSimilar(answer) {
  $("similar").replaceChildren(...answer.similar.map((p) => card(p, `${Math.round(100 * p.similarity)} % alike`)));
  $("ranked").hidden = !answer.ranker;
}

function showBox(answer) {
  if (!answer.box_given) {
    found = answer.box && Object.fromEntries(SIDES.map((side, place) => [side, answer.box[place]]));
    if (!box.busy) box.draw(found);
  }
  $("whole").disabled = !given;
  $("whole").textContent = found ? "The part found" : "Whole photo";
  $("how").textContent = box.now
    ? "Move it or pull its corners, also with the arrow keys, to search for something else."
    : matchMedia("(pointer: fine)").matches ? "Or draw a box over it." : "";
  $("box-part").hidden = false;
}

async function recognise() {
  const mine = ++turn;
  const start = performance.now();
  $("result").setAttribute("aria-busy", "true");
  say("Looking…");
  try {
    const answer = await ask("v1/recognize?k=6&similar=18");
    if (mine !== turn) return;
    const [first, ...others] = answer.products;
    $("top").replaceChildren(...(first ? [best(first, answer)] : [element("p", "", "The catalogue is empty.")]));
    $("others").replaceChildren(...others.map((p) => card(p, percent(p.probability))));
    $("others-part").hidden = !others.length;
    const kinds = answer.categories.filter((c, place) => !place || c.probability >= 0.01);
    $("kind").textContent = kinds.length ? `The photo shows: ${kinds.map((c) => `${c.name} (${percent(c.probability)})`).join(", ")}` : "";
    const listed = [...kinds.map((c) => c.name), ...[...answer.similar, ...answer.products].map((p) => p.category)];
    const names = [...new Set(listed.filter(Boolean))].sort();
    $("category").replaceChildren(new Option("all", ""), ...names.map((name) => new Option(name, name)));
    $("category").value = answer.searched ?? "";
    showSimilar(answer);
    showBox(answer);
    $("similar-part").hidden = !answer.similar.length && !kinds.length;
    const inside = Object.values(answer.timings_ms).reduce((a, b) => a + b, 0);
    $("about").textContent = `${Math.round(performance.now() - start)} ms, of these ${Math.round(inside)} in the service. ` +
      `Index ${answer.index}, model ${answer.model}.`;
    $("result").hidden = false;
    say(!first ? "" : answer.known === false ? "Not in our catalogue." : `Recognised: ${first.title || first.sku}`);
  } catch (error) {
    if (mine === turn) say(error.message, true);
  } finally {
    if (mine === turn) $("result").removeAttribute("aria-busy");
  }
}

function take(file) {
  if (!file) return;
  photo = file;
  given = found = null;
  box.draw(null);
  $("result").hidden = $("box-part").hidden = true;
  $("query").src = URL.createObjectURL(photo);
  $("hint").textContent = "Another photo?";
  document.body.classList.add("asked");
  recognise();
}

function choose(part) {
  given = part;
  recognise();
}

const box = new Box($("frame"), $("box"), $("shade"), choose);

$("query").addEventListener("load", () => {
  URL.revokeObjectURL($("query").src);
  $("frame").style.setProperty("--ratio", $("query").naturalWidth / $("query").naturalHeight);
  $("view").hidden = false;
});
$("query").addEventListener("error", () => { $("view").hidden = $("box-part").hidden = true; }); // the service says why
$("part").addEventListener("click", () => {
  const drawn = box.now;
  if (!drawn) box.draw({ left: 0.2, top: 0.2, right: 0.8, bottom: 0.8 });
  box.focus();
  if (!drawn) choose(box.now);
});
$("whole").addEventListener("click", () => {
  $("part").focus(); // this one goes out of use
  box.draw(found);
  choose(null);
});

$("file").addEventListener("change", () => take($("file").files[0]));
$("key").addEventListener("change", () => { if (photo) recognise(); });
$("category").addEventListener("change", async () => {
  const mine = turn, own = ++list, last = () => mine === turn && own === list;
  const name = $("category").value;
  try {
    const answer = await ask(`v1/search?similar=18&${name ? `category=${encodeURIComponent(name)}` : "any_category=true"}`);
    if (last()) showSimilar(answer);
  } catch (error) {
    if (last()) say(error.message, true);
  }
});
$("drop").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("file").click(); }
});
for (const name of ["dragenter", "dragover"])
  document.addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
for (const name of ["dragleave", "drop"])
  document.addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.remove("over"); });
document.addEventListener("drop", (event) => take(event.dataTransfer.files[0]));
document.addEventListener("paste", (event) => take([...event.clipboardData.files].find((f) => f.type.startsWith("image/"))));
