"use strict";

const $ = (id) => document.getElementById(id);
const SIDES = ["left", "top", "right", "bottom"];
let photo = null; // the file that is shown
let requestedBox = null; // the part of it that a person selected
let predictedBox = null; // the model's box in the full photo
let recognition = 0, categorySearch = 0; // number of the latest request: answers to earlier ones are dropped

function createElement(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

function headers() {
  return $("key").value ? { Authorization: `Bearer ${$("key").value}` } : {};
}

function productPicture(product) {
  const img = createElement("img");
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

function matchBox(product, answer) {
  const rejected = answer.known === false;
  const box = createElement("div", rejected ? "match rejected" : "match");
  box.append(productPicture(product));
  const details = createElement("div");
  if (rejected) {
    details.append(createElement("h2", "", "Not in our catalogue"));
    details.append(createElement("p", "soft", "The most similar product:"));
  }
  details.append(createElement(rejected ? "p" : "h2", "", product.title || product.sku));
  details.append(createElement("p", "soft", `SKU ${product.sku}`));
  for (const text of [product.category, product.tags]) if (text) details.append(createElement("p", "soft", text));
  const confidence = answer.confidence ?? product.probability;
  const line = createElement("p", "confidence");
  const meter = createElement("meter");
  Object.assign(meter, { min: 0, max: 1, value: confidence });
  meter.setAttribute("aria-hidden", "true");
  line.append(meter, createElement("span", "", `${percent(confidence)} confident`));
  details.append(line);
  box.append(details);
  return box;
}

function productCard(product, text) {
  const item = createElement("li", "card");
  item.append(productPicture(product), createElement("p", "", product.title || product.sku), createElement("p", "soft", text));
  return item;
}

function setStatus(text, isError) {
  $("status").textContent = text;
  $("status").classList.toggle("error", Boolean(isError));
}

async function sendPhoto(path) {
  const form = new FormData();
  form.append("photo", photo);
  const box = requestedBox ? `&box=${SIDES.map((side) => requestedBox[side].toFixed(4)).join(",")}` : "";
  const response = await fetch(path + box, { method: "POST", body: form, headers: headers() });
  const answer = await response.json().catch(() => ({}));
  if (response.status === 401) { $("key-box").hidden = false; $("key-box").open = true; $("key").focus(); }
  if (!response.ok) throw new Error(answer.error ? answer.error.message : `the service answered ${response.status}`);
  return answer;
}

function showSimilar(answer) {
  $("similar").replaceChildren(...answer.similar.map((p) => productCard(p, `${Math.round(100 * p.similarity)} % similar`)));
  $("ranked").hidden = !answer.ranker;
}

function showBox(answer) {
  if (!answer.box_given) {
    predictedBox = answer.box && Object.fromEntries(SIDES.map((side, i) => [side, answer.box[i]]));
    if (!box.busy) box.draw(predictedBox);
  }
  $("reset-box").disabled = !requestedBox;
  $("reset-box").textContent = predictedBox ? "Detected part" : "Full photo";
  $("box-hint").textContent = box.current
    ? "Move the box or drag its corners, also with the arrow keys, to search for something else."
    : matchMedia("(pointer: fine)").matches ? "Or draw a box over the photo." : "";
  $("box-controls").hidden = false;
}

function showCategories(answer) {
  const categories = answer.categories.filter((c, i) => !i || c.probability >= 0.01);
  $("categories").textContent = categories.length
    ? `The photo shows: ${categories.map((c) => `${c.name} (${percent(c.probability)})`).join(", ")}` : "";
  const listed = [...categories.map((c) => c.name), ...[...answer.similar, ...answer.products].map((p) => p.category)];
  const names = [...new Set(listed.filter(Boolean))].sort();
  $("category").replaceChildren(new Option("all", ""), ...names.map((name) => new Option(name, name)));
  $("category").value = answer.searched ?? "";
  $("similar-part").hidden = !answer.similar.length && !categories.length;
}

async function recognise() {
  const request = ++recognition;
  const start = performance.now();
  $("result").setAttribute("aria-busy", "true");
  setStatus("Recognising…");
  try {
    const answer = await sendPhoto("v1/recognize?k=6&similar=18");
    if (request !== recognition) return;
    const [first, ...others] = answer.products;
    $("match").replaceChildren(...(first ? [matchBox(first, answer)] : [createElement("p", "", "The catalogue is empty.")]));
    const candidates = others.map((p) => [p, percent(p.probability)]).filter(([, text]) => text !== "0.0 %");
    $("alternatives").replaceChildren(...candidates.map(([p, text]) => productCard(p, text)));
    $("alternatives-part").hidden = !candidates.length;
    showCategories(answer);
    showSimilar(answer);
    showBox(answer);
    const service = Object.values(answer.timings_ms).reduce((a, b) => a + b, 0);
    $("timing").textContent = `${Math.round(performance.now() - start)} ms, of which ${Math.round(service)} in the service. ` +
      `Index ${answer.index}, model ${answer.model}.`;
    $("result").hidden = false;
    setStatus(!first ? "" : answer.known === false ? "Not in our catalogue." : `Recognised: ${first.title || first.sku}`);
  } catch (error) {
    if (request === recognition) setStatus(error.message, true);
  } finally {
    if (request === recognition) $("result").removeAttribute("aria-busy");
  }
}

function setPhoto(file) {
  if (!file) return;
  photo = file;
  requestedBox = predictedBox = null;
  box.draw(null);
  $("result").hidden = $("box-controls").hidden = true;
  $("query").src = URL.createObjectURL(photo);
  $("hint").textContent = "Another photo?";
  document.body.classList.add("with-photo");
  recognise();
}

function requestBox(selected) {
  requestedBox = selected;
  recognise();
}

const box = new Box($("frame"), $("box"), $("shade"), requestBox);

$("query").addEventListener("load", () => {
  URL.revokeObjectURL($("query").src);
  $("frame").style.setProperty("--ratio", $("query").naturalWidth / $("query").naturalHeight);
  $("view").hidden = false;
});
$("query").addEventListener("error", () => { $("view").hidden = $("box-controls").hidden = true; }); // the service says why
$("select-box").addEventListener("click", () => {
  const drawn = box.current;
  if (!drawn) box.draw({ left: 0.2, top: 0.2, right: 0.8, bottom: 0.8 });
  box.focus();
  if (!drawn) requestBox(box.current);
});
$("reset-box").addEventListener("click", () => {
  $("select-box").focus(); // this button is about to be disabled
  box.draw(predictedBox);
  requestBox(null);
});

$("file").addEventListener("change", () => setPhoto($("file").files[0]));
$("key").addEventListener("change", () => { if (photo) recognise(); });
$("category").addEventListener("change", async () => {
  const photoRequest = recognition, request = ++categorySearch;
  const isLatest = () => photoRequest === recognition && request === categorySearch;
  const name = $("category").value;
  try {
    const answer = await sendPhoto(`v1/search?similar=18&${name ? `category=${encodeURIComponent(name)}` : "any_category=true"}`);
    if (isLatest()) showSimilar(answer);
  } catch (error) {
    if (isLatest()) setStatus(error.message, true);
  }
});
$("drop").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("file").click(); }
});
for (const name of ["dragenter", "dragover"])
  document.addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
for (const name of ["dragleave", "drop"])
  document.addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.remove("over"); });
document.addEventListener("drop", (event) => setPhoto(event.dataTransfer.files[0]));
document.addEventListener("paste", (event) => setPhoto([...event.clipboardData.files].find((f) => f.type.startsWith("image/"))));
