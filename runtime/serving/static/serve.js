"use strict";
(() => {
const $ = id => document.getElementById(id);
const on = (target, kind, act, how) => target?.addEventListener(kind, act, how);
const isChat = () => state.mode === "chat", isWhole = Number.isSafeInteger;
// Spans that are there at most, and how many more make it worth to fold the oldest.
const MOST_SPANS = 4000, FOLD = 500;
const TOP = 10, CONTINUE_TOKENS = 200, MOST_TALKS = 100, MOST_TEXT = 1e6, MOST_LINK = 32000;
const BUSY = [429, 503], TRIES = 50;
const STARTS = ["Once upon a time", "The dragon looked at", "One day, a little girl"];
const SAMPLING = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "when_full"];
const state = {mode: "text", view: "experts", block: 0, talk: "", editing: null, cell: null,
  pinned: null};
const say = $("say"), root = document.documentElement;
let cards = [], key = "", keyAsked = null, active = null, panes = [], again = null;

// ------------------------------------------------------------------------------------- helpers
const put = (parent, name, kind, text) => {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
};
const button = (parent, text, act) => {
  const made = put(parent, "button", "", text);
  made.type = "button";
  on(made, "click", act);
  return made;
};
// What a model says must neither hide nor turn a line around: visible() of runtime/base/text.py.
const visible = text => String(text)
  .replace(/[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g, c => {
    const hex = c.charCodeAt(0).toString(16);
    return c === "\r" ? "\\r" : hex.length < 3 ? "\\x" + hex.padStart(2, "0") : "\\u" + hex;
  }).replace(/\p{Cs}/gu, "\ufffd");
const spell = text => text === "" ? "\u2205" : visible(text).replace(/\n/g, "\u21B5")
  .replace(/\t/g, "\u21E5").replace(/^ | $/g, "\u2423");
const percent = p => (100 * p).toFixed(p < .001 ? 3 : 1) + "\u00A0%";
const number = n => n.toLocaleString("en");
const sleep = (seconds, signal) => new Promise((resolve, reject) => {
  signal?.throwIfAborted();
  const timer = setTimeout(resolve, 1000 * seconds);
  on(signal, "abort", () => { clearTimeout(timer); reject(signal.reason); });
});
const isText = (value, most = MOST_TEXT) => typeof value === "string" && value.length <= most;
const isObject = value => typeof value === "object" && value !== null && !Array.isArray(value);

// This browser's storage may be full or forbidden, and may hold anything.
const kept = {
  read(name) {
    try { return JSON.parse(localStorage.getItem("gptoss." + name)); } catch { return null; }
  },
  write(name, value) {
    try { localStorage.setItem("gptoss." + name, JSON.stringify(value)); return true; }
    catch { return false; }
  },
};
const session = (name, value) => {
  try {
    if (value === undefined) return sessionStorage.getItem("gptoss." + name) || "";
    sessionStorage.setItem("gptoss." + name, value);
  } catch {
    // It then lasts as long as the page.
  }
  return value || "";
};

// ------------------------------------------------------------------------ what others may write
const FIELDS = [...$("pane").content.querySelectorAll("[data-name]")];
function checkedSettings(given) {
  const found = {};
  if (!isObject(given)) return found;
  for (const field of FIELDS) {
    const {name} = field.dataset;
    if (!Object.hasOwn(given, name)) continue;
    const value = given[name];
    if (field.type === "checkbox") { if (value === true) found[name] = true; }
    else if (field.type === "number") {
      const whole = field.step === "1";
      if (Number.isFinite(value) && value >= +field.min && value <= +(field.max || Infinity) &&
        (!whole || isWhole(value))) found[name] = value;
    } else if (name === "when_full") {
      if (value === "slide" || value === "stop") found[name] = value;
    } else if (isText(value, name === "system" ? 1e5 : 500) && value) found[name] = value;
  }
  return found;
}
function checkedDoc(given) {
  if (!Array.isArray(given) || given.length > 2000) return null;
  const doc = [];
  for (const one of given) {
    if (!isObject(one) || !isText(one.text)) return null;
    if (one.who !== "you" && one.who !== "model") return null;
    const hasIds = Array.isArray(one.ids) && one.ids.length < 1e5 && one.ids.every(isWhole);
    doc.push({who: one.who, text: one.text, seed: isWhole(one.seed) ? one.seed : null,
      ids: hasIds ? one.ids : undefined, model: isText(one.model, 999) ? one.model : ""});
  }
  return doc;
}
// What was kept becomes what is worked with: an answer is one token, of unknown experts.
const alive = doc => doc.map(({who, text, ids, model, seed}) => who === "you" ? {who, text}
  : {who, tokens: text ? [{p: text, ids}] : [], start: 0, model, seed});
// And back. An answer's text may have other ids than those that were drawn.
function written({who, text, tokens = [], model, seed = null}) {
  const ids = idsOf(tokens.filter(token => !token.end));
  return {who, text: text ?? textOf({tokens}), model, seed,
    ids: ids.length && ids.every(isWhole) ? ids : undefined};
}
const idsOf = tokens => tokens.flatMap(token => token.ids ?? token.id);
function checkedTalk(given) {
  if (!isObject(given) || !isText(given.id, 64) || !Number.isFinite(given.time)) return null;
  if (!["text", "chat"].includes(given.mode) || !Array.isArray(given.panes)) return null;
  const found = given.panes.slice(0, 2).map(one => isObject(one) && checkedDoc(one.doc) &&
    {doc: checkedDoc(one.doc), settings: checkedSettings(one.settings)});
  if (!found.length || !found.every(Boolean)) return null;
  return {id: given.id, time: given.time, mode: given.mode, panes: found};
}
const checkedTalks = given => Array.isArray(given)
  ? given.slice(0, 1000).map(checkedTalk).filter(Boolean) : [];

// ------------------------------------------------------------------------------------ the server
async function call(path, body, signal, waits) {
  for (let tries = 1; ; tries++) {
    const headers = {};
    if (key) headers.Authorization = "Bearer " + key;
    if (body) headers["Content-Type"] = "application/json";
    let answer;
    try {
      answer = await fetch(path, {method: body ? "POST" : "GET", headers, signal,
        body: body && JSON.stringify(body), cache: "no-store"});
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Error("The server does not answer.");
    }
    if (answer.ok) return answer;
    const said = await answer.json().catch(() => null);
    const message = visible(said?.error?.message ?? `The server answered ${answer.status}.`);
    if (answer.status === 401 && waits !== null) {
      await askKey(message);
    } else if (BUSY.includes(answer.status) && tries < TRIES) {
      // The longer it takes, the rarer it is asked.
      const least = Math.max(.1 * tries, +answer.headers.get("Retry-After") || 1);
      const seconds = Math.min(30, least);
      waits?.(message, seconds);
      await sleep(seconds, signal);
    } else throw Object.assign(new Error(message), {status: answer.status});
  }
}
// Several requests may need the key at a time: it is asked for once.
function askKey(message) {
  keyAsked ??= new Promise((resolve, reject) => {
    const dialog = $("key");
    $("key-title").textContent = key ? message : "This server asks for a key";
    on(dialog, "close", () => {
      keyAsked = null;
      const given = $("key-text").value.trim();
      $("key-text").value = "";
      if (!given) { reject(Object.assign(new Error("No key was given."), {status: 401})); return; }
      key = session("key", given);
      resolve();
    }, {once: true});
    dialog.showModal();
  });
  return keyAsked;
}
// The events of a stream. A character may come in two pieces, and so may a line.
async function* events(answer) {
  const reader = answer.body.getReader(), decoder = new TextDecoder();
  const broken = error => {
    if (error?.name === "AbortError") throw error;
    throw new Error("The connection ended before the answer did.");
  };
  let rest = "";
  try {
    for (;;) {
      const {done, value} = await reader.read().catch(broken);
      rest += decoder.decode(value, {stream: !done});
      const lines = rest.split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        let event;
        try { event = JSON.parse(data); } catch { throw new Error("The answer is damaged."); }
        if (isObject(event)) yield event;
      }
      if (done) broken();
    }
  } finally {
    // Nobody reads the rest: the server need not compute it.
    reader.cancel().catch(() => {});
  }
}
const encode = async (what, pane, signal) => {
  const answer = await (await call("tokenize", {model: pane.card.id, ...what}, signal)).json();
  return Array.isArray(answer.tokens) ? answer.tokens : [];
};

// -------------------------------------------------------------------------------------- tokens
// p: the text that a token adds. raw: its own text. lp: log-probability. top: the likeliest in its
// place. x: its experts. end: it ends the answer, and is no text. ids: of several tokens in one.
function tokensOf(choice, text) {
  const ids = choice.token_ids ?? [], given = choice.logprobs, content = given?.content;
  const names = given?.tokens ?? content?.map(one => one.token) ?? [];
  const count = Math.max(ids.length, names.length);
  const pieces = piecesOf(text, count, given?.text_offset);
  return Array.from({length: count}, (_, i) => {
    const token = {p: pieces[i], id: ids[i], raw: names[i] ?? pieces[i]};
    token.lp = given?.token_logprobs?.[i] ?? content?.[i]?.logprob ?? null;
    token.top = choice.top_tokens?.[i]?.map(([id, t, lp]) => ({id, t, lp}));
    const chosen = choice.experts?.ids?.[i];
    token.x = chosen ? {ids: chosen, weights: choice.experts.weights[i]} : null;
    return token;
  });
}
// Offsets count characters, not JavaScript's units.
function piecesOf(text, count, offsets) {
  if (count === 1) return [text];
  const all = [...text];
  return Array.from({length: count}, (_, i) => offsets
    ? all.slice(offsets[i] - offsets[0], i + 1 < count ? offsets[i + 1] - offsets[0] : undefined)
      .join("")
    : i ? "" : text);
}
const textOf = part => part.text ??
  part.tokens.map(token => token.end ? "" : token.p).join("");
const isPartial = text => text.startsWith("bytes:");
// The server holds text back that may begin a stop text; what it held back is text in the end.
function settled(tokens) {
  for (let i = tokens.length; i--;) {
    const {p, raw} = tokens[i];
    if (!raw || isPartial(raw) || !raw.startsWith(p)) break;
    tokens[i] = {...tokens[i], p: raw};
    if (p) break;
  }
  return tokens;
}

// ------------------------------------------------------------------------------------- colours
const gcd = (a, b) => b ? gcd(b, a % b) : a;
const even = x => Math.abs(x % 1) === .5 && Math.round(x) % 2 ? Math.round(x) - 1 : Math.round(x);
// Evenly spaced, neighbours in number far apart: _hues of runtime/inference/expert_map.py.
function hues(count) {
  let stride = Math.max(1, even(.382 * count));
  while (stride < count && gcd(stride, count) !== 1) stride++;
  if (stride >= count) stride = 1;
  return Array.from({length: count}, (_, e) =>
    even((25 + 360 * (e * stride % count) / count) % 360));
}
const sheet = new CSSStyleSheet();
document.adoptedStyleSheets = [sheet];
let coloured = 0;
function colour(count) {
  if (count === coloured) return;
  coloured = count;
  sheet.replaceSync(hues(count).map((hue, e) =>
    `.e${e}{--h:${hue};--tier:${count <= 12 ? 0 : [0, 1, -1][e % 3]}}`).join(""));
}
const level = (weight, K) =>
  K === 1 ? 3 : Math.min(3, Math.floor(4 * Math.max(0, weight - 1 / K) / (1 - 1 / K)));
const bits = token => Math.max(0, -token.lp / Math.LN2);
function look(token, isYours) {
  let kind = "t" + (isYours ? " you" : "") + (token.end ? " end" : "");
  if (/^\s*\n\s*$/.test(token.p)) kind += " nl";
  if (state.view === "experts" && token.x) {
    const {ids, weights} = token.x, cell = state.cell;
    const l = Math.min(cell ? cell[0] : state.block, ids.length - 1);
    const k = cell ? ids[l].indexOf(cell[1]) : 0;
    kind += k < 0 ? " off" : ` e${ids[l][k]} g${level(weights[l][k], ids[l].length)}`;
  } else if (state.view === "surprise" && token.lp !== null && token.lp !== undefined) {
    kind += " s" + [1, 3, 6, 10].filter(limit => bits(token) >= limit).length;
  }
  return kind;
}

// ---------------------------------------------------------------------------------------- panes
// Where a span's token is.
const places = new WeakMap();
class Pane {
  constructor(settings) {
    const made = $("pane").content.cloneNode(true).firstElementChild;
    Object.assign(this, {element: made, text: made.querySelector(".text"),
      tail: made.querySelector(".tail"), status: made.querySelector(".status"),
      starts: made.querySelector(".starts"), doc: [], past: [], future: [], spans: [],
      holders: new Map(), run: null, counts: [], settings: checkedSettings(settings)});
    for (const text of STARTS) button(this.starts, text, () => { say.value = text; send(); });
    on(made.querySelector(".problem button"), "click", () => {
      this.problem("");
      if (again) again();
      else generate(this);
    });
    on(made, "focusin", () => activate(this));
    on(made.querySelector(".acts"), "click", event =>
      event.target.dataset.act && acts[event.target.dataset.act](this));
    on(made.querySelector(".reset"), "click", () => {
      this.settings = {};
      this.showSettings();
      keepSettings();
    });
    on(made.querySelector(".fields"), "input", event => this.set(event.target));
    on(this.text, "focusin", event => places.has(event.target) && pin(event.target));
    on(this.text, "mouseover", event =>
      !state.pinned && places.has(event.target) && show(event.target));
    on(this.text, "keydown", event => this.move(event));
  }
  get card() { return cards.find(card => card.id === this.settings.model) ?? cards[0]; }
  // What its ids are of.
  get model() { return this.card.system_fingerprint ?? this.card.id; }
  field(name) { return this.find(`[data-name=${name}]`); }
  find(what) { return this.element.querySelector(what); }
  tell(text) { this.status.textContent = text; }
  problem(text) {
    const line = this.find(".problem");
    line.hidden = !text;
    line.firstElementChild.textContent = text;
  }

  // ----------------------------------------------------------------------------------- settings
  set(field) {
    const {name} = field.dataset;
    field.ariaInvalid = field.validity.valid ? null : "true";
    if (field.ariaInvalid) this.tell(field.validationMessage);
    const value = field.type === "checkbox" ? field.checked
      : field.type === "number" && field.value ? +field.value : field.value;
    const checked = checkedSettings({[name]: value});
    if (name in checked) this.settings[name] = checked[name];
    else delete this.settings[name];
    this.sum();
    keepSettings();
  }
  showSettings() {
    const model = this.field("model");
    model.textContent = "";
    for (const card of cards) put(model, "option", "", visible(card.id)).value = card.id;
    this.find(".many").hidden = cards.length < 2;
    for (const {dataset: {name}} of FIELDS) {
      const field = this.field(name), value = this.settings[name];
      if (field.type === "checkbox") field.checked = value === true;
      else if (name === "model") field.value = this.card?.id ?? "";
      else field.value = value ?? "";
      field.ariaInvalid = null;
      const usual = this.card?.sampling_defaults?.[name];
      if (field.type === "number" && usual !== undefined) field.placeholder = usual;
    }
    this.field("max_tokens").placeholder = isChat() ? "what fits" : CONTINUE_TOKENS;
    this.find(".for-chat").hidden = !isChat();
    this.find(".for-text").hidden = isChat();
    this.sum();
  }
  sum() {
    const name = this.find(".which").textContent = visible(this.card?.id ?? "gptoss");
    if (this === panes[0]) $("name").textContent = document.title = name;
    const set = Object.entries(this.settings).filter(([name]) => name !== "model" &&
      (name !== "system" || isChat()) && (name !== "echo" || !isChat()));
    this.find(".chosen").textContent = set.length ? set.map(([name, value]) =>
      value === true ? "my text coloured"
        : `${name.replaceAll("_", " ")} ${visible(value).slice(0, 60)}`)
      .join(" \u00B7 ") : "with the server\u2019s settings";
  }

  // --------------------------------------------------------------------------------------- text
  remember() {
    this.past.push(this.copied());
    if (this.past.length > 50) this.past.shift();
    this.future = [];
  }
  copied() {
    return this.doc.map(one => one.tokens ? {...one, tokens: one.tokens.slice()} : {...one});
  }
  put(doc) {
    this.doc = doc;
    this.render();
  }
  write(text) {
    const last = this.doc.at(-1);
    const before = last ? textOf(last) : "";
    if (!isChat()) {
      // One forgets the blank between what the model wrote and one's own.
      if (/[\p{L}\p{N}.,!?;:"')\u201d]$/u.test(before) && /^[\p{L}\p{N}"'\u201c]/u.test(text)) {
        text = " " + text;
      }
    } else if (last?.who === "you") text = "\n" + text;
    if (last?.who === "you") this.doc[this.doc.length - 1] = {who: "you", text: last.text + text};
    else this.doc.push({who: "you", text});
  }
  render() {
    unpin();
    this.text.textContent = "";
    this.spans = [];
    this.holders.clear();
    this.fold = null;
    this.counts = [];
    this.blocks = 0;
    this.experts = this.card?.num_experts ?? 0;
    this.doc.forEach(part => this.add(part));
    this.starts.hidden = isChat() || this.doc.length > 0 || this !== panes[0];
    this.text.dataset.empty = isChat() ? "Write a message."
      : "Write a beginning, and the model continues it. Or choose one:";
    if (this === active) drawHeat();
    controls();
  }
  add(part) {
    const isYours = part.who === "you";
    let parent = this.text;
    if (isChat()) {
      parent = put(parent, "div", "turn" + (isYours ? " mine" : ""));
      if (isYours) {
        button(parent, "", () => edit(this, this.doc.indexOf(part)))
          .ariaLabel = "Edit this message";
      }
    }
    const holder = put(parent, "span", "seg");
    this.holders.set(part, holder);
    if (state.view !== "plain") {
      holder.classList.add("seen");
      if (part.tokens) {
        holder.role = "listbox";
        holder.ariaOrientation = "horizontal";
        holder.ariaLabel = "Tokens; arrow keys go to the next, Enter to what else was likely";
      }
    }
    if (part.tokens) this.append(part, part.tokens);
    else put(holder, "span", "you", visible(part.text));
  }
  append(part, tokens) {
    const holder = this.holders.get(part), isYours = part.who === "you";
    for (const token of tokens) {
      const span = put(holder, "span", look(token, isYours), visible(token.end ? "" : token.p));
      if (state.view !== "plain") {
        span.role = "option";
        span.tabIndex = this.spans.length ? -1 : 0;
        if (!token.p.trim()) span.ariaLabel = token.p.includes("\n") ? "new line" : "no text";
        if (token.end) span.ariaLabel = "end of the answer";
      }
      places.set(span, {pane: this, part, token});
      this.spans.push(span);
      if (token.x) this.tally(token.x.ids);
      holder.line?.push(span);
      if (token.p.endsWith("\n")) this.wrap(holder);
    }
    this.foldOld();
  }
  // A browser lays out a whole paragraph for each new token: so each one ends where a line does.
  wrap(holder) {
    const line = holder.line?.filter(span => span.isConnected);
    holder.line = [];
    // The first may begin in the middle of a line.
    if (line) {
      const block = put(holder, "span", "para");
      line[0].before(block);
      block.append(...line);
    }
  }
  tally(ids) {
    this.blocks = Math.max(this.blocks, ids.length);
    ids.forEach((chosen, l) => {
      const counts = this.counts[l] ??= [];
      for (const e of chosen) {
        counts[e] = (counts[e] ?? 0) + 1;
        // Until the server says how many there are: a power of two that holds those seen.
        while (e >= this.experts) this.experts = Math.max(8, 2 * this.experts);
      }
    });
    colour(this.experts);
  }
  // A browser is slow with many thousands of spans: the oldest become one text, folded.
  foldOld() {
    if (this.spans.length <= MOST_SPANS + FOLD) return;
    const old = this.spans.splice(0, this.spans.length - MOST_SPANS);
    if (!this.fold) {
      this.fold = document.createElement("details");
      this.fold.className = "fold";
      this.text.prepend(this.fold);
      put(this.fold, "summary");
      put(this.fold, "span");
      this.folded = 0;
    }
    const range = document.createRange();
    range.setStartAfter(this.fold);
    range.setEndBefore(this.spans[0]);
    this.fold.lastChild.append(range.toString());
    range.deleteContents();
    this.folded += old.length;
    this.fold.firstChild.textContent = `${number(this.folded)} earlier tokens`;
    this.spans[0].tabIndex = state.view === "plain" ? -1 : 0;
  }
  move(event) {
    const at = this.spans.indexOf(event.target), end = this.spans.length - 1;
    if (at < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Enter") $("detail").querySelector("ol button")?.focus();
    const next = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: end}[event.key];
    if (next !== undefined) this.spans[Math.max(0, Math.min(end, next))].focus();
    if (next !== undefined || event.key === "Enter") event.preventDefault();
  }
}
const shown = () => state.two ? panes : panes.slice(0, 1);
const running = () => shown().some(pane => pane.run);
function activate(pane) {
  if (active === pane) return;
  active = pane;
  drawHeat();
}

// ------------------------------------------------------------------------------------ generate
const messagesOf = (pane, doc) => [
  ...(pane.settings.system ? [{role: "system", content: pane.settings.system}] : []),
  ...doc.map(one => ({role: one.who === "you" ? "user" : "assistant", content: textOf(one)})),
];
const textUntil = (pane, at) => pane.doc.slice(0, at).map(textOf).join("");
async function idsBefore(pane, part, signal) {
  const at = pane.doc.indexOf(part);
  if (part.before) return part.before;
  if (isChat()) {
    part.before = await encode({messages: messagesOf(pane, pane.doc.slice(0, at))}, pane, signal);
  } else {
    const text = textUntil(pane, at);
    part.before = text ? await encode({prompt: text}, pane, signal) : [];
  }
  return part.before;
}
async function idsWithin(pane, part, signal) {
  const ids = idsOf(part.tokens);
  if (ids.every(isWhole)) return ids;
  return encode({prompt: textOf(part), add_special_tokens: false}, pane, signal);
}
function bodyOf(pane, given) {
  const body = {model: pane.card.id, stream: true, stream_options: {include_usage: true},
    return_token_ids: true};
  for (const name of [...SAMPLING, "seed"]) {
    if (name in pane.settings) body[name] = pane.settings[name];
  }
  if (given !== undefined) body.seed = given;
  const stops = pane.settings.stop ? [pane.settings.stop.replace(/\\n/g, "\n")] : [];
  if (isChat() && !pane.card.has_chat_template) stops.push("\nUser:");
  if (stops.length) body.stop = stops;
  if (state.view !== "plain") body.experts = true;
  return body;
}
async function request(pane, part, run, seed) {
  const {settings, card} = pane, body = bodyOf(pane, seed), {signal} = run;
  const before = await idsBefore(pane, part, signal);
  const ids = [...before, ...await idsWithin(pane, part, signal)];
  const room = card.max_model_len - ids.length + 1;
  const slides = (settings.when_full ?? card.sampling_defaults?.when_full) === "slide";
  if (room < 1 || (room < 2 && !slides)) {
    throw new Error(`The context is full: ${number(ids.length)} of ${number(card.max_model_len)} ` +
      "tokens. Undo, or edit it to be shorter.");
  }
  run.prompt = ids.length;
  const usual = isChat() ? card.max_model_len : CONTINUE_TOKENS;
  body.max_tokens = Math.min(settings.max_tokens ?? usual, slides ? Infinity : room,
    card.max_new_tokens || Infinity);
  const scored = state.view !== "plain";
  if (isChat() && !part.tokens.length) {
    body.messages = messagesOf(pane, pane.doc.slice(0, -1));
    if (scored) Object.assign(body, {logprobs: true, top_logprobs: TOP});
    return ["v1/chat/completions", body];
  }
  if (scored) body.logprobs = TOP;
  body.prompt = ids.length ? ids : "";
  const [first] = pane.doc;
  if (settings.echo && scored && pane.doc.length === 2 && first.text && !part.tokens.length) {
    Object.assign(body, {prompt: first.text, echo: true});
    run.echo = first;
  }
  return ["v1/completions", body];
}
async function generate(pane, seed) {
  if (pane.run || !pane.card) return;
  let part = pane.doc.at(-1);
  if (part?.who !== "model") {
    part = {who: "model", tokens: [], seed: null};
    pane.doc.push(part);
    pane.add(part);
  }
  const stopper = new AbortController();
  const run = pane.run = {stopper, signal: stopper.signal, queue: [], part, heard: "", count: 0,
    prompt: 0, began: performance.now(), first: 0};
  // Ids of another model are other tokens.
  if (part.model !== undefined && part.model !== pane.model) {
    Object.assign(part, {before: null, tokens: [{p: textOf(part)}]});
    pane.render();
  }
  part.model = pane.model;
  trim(pane, part);
  Object.assign(part, {start: part.tokens.length, end: ""});
  pane.problem("");
  pane.tell("\u2026");
  pane.starts.hidden = true;
  follows = true;
  // The address is no longer that of what is here.
  bare();
  controls();
  save();
  try {
    const [path, body] = await request(pane, part, run, seed);
    run.began = performance.now();
    const answer = await call(path, body, run.signal, (message, seconds) => {
      pane.tell(`${message} Trying again in ${seconds.toFixed(1)} s.`);
    });
    for await (const event of events(answer)) take(pane, run, event);
  } catch (error) {
    flush(pane);
    if (run.signal.aborted) part.end = "stopped";
    else {
      part.end = "broken";
      pane.problem(visible(error.message));
      // It may serve other models by now.
      if (error.status === 404) await loadModels();
    }
  }
  finish(pane, run);
}
// A token that ended the answer, or half a character, must not stand in the middle.
function trim(pane, part) {
  const before = textOf(part), {length} = part.tokens;
  while (part.tokens.length && (part.tokens.at(-1).end ||
    (part.tokens.at(-1).raw && isPartial(part.tokens.at(-1).raw)))) part.tokens.pop();
  settled(part.tokens);
  if (part.tokens.length !== length || textOf(part) !== before) pane.render();
}
function finish(pane, run) {
  const {part} = run;
  // What ended the answer came in its last frame.
  flush(pane);
  if (part.end === "stop") {
    for (let i = part.tokens.length - 1; i >= 0 && part.tokens[i].p === ""; i--) {
      run.queue.push({ends: part.tokens[i]});
    }
    flush(pane);
  }
  run.end = performance.now();
  if (run.heard.trim()) $("said").textContent = run.heard;
  pane.run = null;
  if (!part.tokens.length && pane.doc.at(-1) === part && part.end !== "stop") {
    pane.doc.pop();
    pane.holders.get(part)?.closest(".turn, .seg").remove();
    pane.holders.delete(part);
  }
  report(pane, run);
  run.resolve?.();
  controls();
  save();
  if (pane === active) drawHeat();
}
function take(pane, run, event) {
  if (event.error) throw new Error(String(event.error.message ?? "The answer broke off."));
  if (isWhole(event.seed)) run.part.seed = event.seed;
  const {prompt_tokens: prompt, completion_tokens: count} = event.usage ?? {};
  if (isWhole(prompt) && isWhole(count)) Object.assign(run, {prompt, count});
  const choice = event.choices?.[0];
  if (!choice) return;
  const text = String(choice.text ?? choice.delta?.content ?? ""), tokens = tokensOf(choice, text);
  if (run.echo && tokens.length) {
    run.echo.tokens = tokens;
    run.echo = null;
    pane.render();
    return;
  }
  if (tokens.length) {
    run.last = performance.now();
    run.first ||= run.last;
    run.count += tokens.length;
    run.queue.push(...tokens);
  } else if (text) run.queue.push({more: text});
  if (choice.finish_reason) run.part.end = choice.finish_reason;
  // One change of the page a frame, however fast tokens come. A hidden tab has no frames.
  if (!pane.frame && run.queue.length) {
    const draw = () => flush(pane);
    pane.frame = document.hidden ? -setTimeout(draw, 300) : requestAnimationFrame(draw);
  }
}
function flush(pane) {
  const {run} = pane;
  if (pane.frame > 0) cancelAnimationFrame(pane.frame);
  else if (pane.frame < 0) clearTimeout(-pane.frame);
  pane.frame = 0;
  if (!run?.queue.length) return;
  const {part, queue} = run, came = [];
  run.queue = [];
  for (const one of queue) {
    const last = came.at(-1) ?? part.tokens.at(-1);
    if (one.ends) one.ends.end = true;
    else if (one.more === undefined) came.push(one);
    else if (last) last.p += one.more;
    else came.push({p: one.more});
    run.heard += one.more ?? one.p ?? "";
  }
  for (const token of [part.tokens.at(-1), ...queue.map(one => one.ends)]) {
    const span = token && pane.spans.findLast(one => places.get(one).token === token);
    if (span) {
      span.className = look(token, false);
      span.textContent = visible(token.end ? "" : token.p);
      if (token.end) span.ariaLabel = "end of the answer";
    }
  }
  part.tokens.push(...came);
  pane.append(part, came);
  hear(run);
  report(pane, run);
  if (pane === active && (!pane.drawn || performance.now() - pane.drawn > 100)) {
    pane.drawn = performance.now();
    drawHeat();
  }
  // Never up: of two panes, one ends higher.
  if (follows && !inView(pane.tail)) pane.tail.scrollIntoView({block: "nearest"});
  $("newest").hidden = follows || shown().every(one => !one.run || inView(one.tail));
}
const inView = element => element.getBoundingClientRect().top < innerHeight - $("ask").offsetHeight;
// The page goes with a growing text, unless one scrolls up to read; at the end it goes on again.
let follows = true, lastY = 0;
on(document, "scroll", () => {
  follows = scrollY >= lastY && (follows || shown().some(pane => pane.run && inView(pane.tail)));
  lastY = scrollY;
});
new ResizeObserver(() => root.style.setProperty("--ask", `${$("ask").offsetHeight}px`))
  .observe($("ask"));
// A screen reader hears sentences, not tokens.
function hear(run) {
  const sentences = /^[\s\S]*(?:[.!?]["')\u201d]*\s|[\u3002\n])/.exec(run.heard);
  if (!sentences) return;
  $("said").textContent = sentences[0];
  run.heard = run.heard.slice(sentences[0].length);
}
const ENDS = {stop: "the model ended it", length: "as long as asked for", stopped: "stopped",
  broken: "broken off"};
function report(pane, run) {
  const {part} = run, now = run.last, parts = [];
  parts.push(`${number(run.count)} token${run.count === 1 ? "" : "s"}`);
  if (run.count > 1) {
    const seconds = Math.max(1e-3, (now - run.first) / 1000);
    parts.push(`${((run.count - 1) / seconds).toFixed(1)} tokens/s`);
  }
  if (run.first) parts.push(`first after ${((run.first - run.began) / 1000).toFixed(2)} s`);
  if (part.seed !== null) parts.push(`seed ${part.seed}`);
  if (part.end) parts.push(visible(ENDS[part.end] ?? part.end));
  pane.tell(parts.join(" \u00B7 "));
  if (pane === shown()[0] && run.prompt) context(run.prompt + run.count);
}
function stop(pane) {
  if (!pane.run) return null;
  const ended = new Promise(resolve => { pane.run.resolve = resolve; });
  pane.run.stopper.abort();
  return ended;
}

// ------------------------------------------------------------------------------- what one may do
function send() {
  if (running()) return;
  const text = say.value, {editing} = state;
  if (isChat() && !text.trim() && (editing || !panes[0].doc.length)) return;
  for (const pane of shown()) {
    pane.remember();
    if (editing) pane.doc = pane.doc.slice(0, cutAt(pane, editing));
    if (text) pane.write(text);
    pane.render();
    generate(pane);
  }
  state.editing = null;
  say.value = "";
  controls();
}
// Where an edited text begins: in another pane it is the text of the same number.
function cutAt(pane, editing) {
  if (editing.whole) return 0;
  const yours = pane.doc.flatMap((one, i) => one.who === "you" ? [i] : []);
  return yours[editing.nth] ?? pane.doc.length;
}
function edit(pane, at) {
  if (running() || !pane.doc.length) return;
  const whole = at === undefined && !isChat();
  at ??= pane.doc.findLastIndex(one => one.who === "you");
  if (!whole && at < 0) return;
  const nth = pane.doc.slice(0, at).filter(one => one.who === "you").length;
  state.editing = {whole, nth};
  say.value = whole ? textUntil(pane) : pane.doc[at].text;
  controls();
  say.focus();
}
function leaveEditing() {
  state.editing = null;
  say.value = "";
  controls();
}
function step(pane, from, to) {
  if (pane.run || !from.length) return;
  to.push(pane.copied());
  pane.problem("");
  pane.tell("");
  pane.put(from.pop());
  save();
}
const acts = {
  regenerate(pane) {
    const last = pane.doc.at(-1);
    if (pane.run || !last) return;
    pane.remember();
    // With a seed of one's own, the next: the same would give the same answer.
    const own = pane.settings.seed !== undefined;
    const seed = own ? ((last.seed ?? pane.settings.seed) + 1) % 2 ** 53 : undefined;
    // What was there before its last part was drawn stays, such as a token that one chose.
    const rest = last.start ? [{...last, tokens: last.tokens.slice(0, last.start)}] : [];
    pane.put(last.who === "model" ? [...pane.doc.slice(0, -1), ...rest] : pane.doc);
    generate(pane, seed);
  },
  edit: pane => edit(pane),
  undo: pane => step(pane, pane.past, pane.future),
  redo: pane => step(pane, pane.future, pane.past),
  copy(pane) {
    copy(pane, !isChat() ? textUntil(pane) : messagesOf(pane, pane.doc)
      .map(one => `${one.role}: ${one.content}`).join("\n\n"), "Copied.");
  },
  link(pane) {
    const [address, note] = linkOf(pane);
    history.replaceState(null, "", address);
    copy(pane, address, note);
  },
};
async function copy(pane, text, note) {
  try { await navigator.clipboard.writeText(text); }
  catch {
    // Without https, a browser has no clipboard but that of a selection.
    const field = put(document.body, "textarea", "sr");
    field.value = text;
    field.select();
    if (!document.execCommand("copy")) note = "The browser does not let the page copy.";
    field.remove();
  }
  pane.tell(note);
  $("said").textContent = note;
}
// Stop at a token and continue with another in its place.
async function branch({pane, part, token}, choice) {
  await stop(pane);
  const at = pane.doc.indexOf(part), index = part.tokens.indexOf(token);
  if (at < 0 || index < 0) return;
  pane.remember();
  const ends = Boolean(pane.card.stop_token_ids?.includes(choice.id));
  const chosen = {...token, ...choice, p: ends ? "" : choice.t, raw: choice.t, x: null, end: ends};
  pane.put([...pane.doc.slice(0, at),
    {...part, tokens: [...settled(part.tokens.slice(0, index)), chosen]}]);
  if (!ends) { generate(pane); return; }
  pane.tell("You ended it.");
  save();
}

// -------------------------------------------------------------------------------------- details
function pin(span) {
  const before = state.pinned;
  if (before) before.ariaSelected = null;
  for (const one of places.get(span).pane.spans) if (one.tabIndex === 0) one.tabIndex = -1;
  state.pinned = span;
  span.tabIndex = 0;
  span.ariaSelected = "true";
  show(span);
}
function unpin() {
  if (state.pinned) state.pinned.ariaSelected = null;
  state.pinned = null;
  $("detail").hidden = true;
}
function show(span) {
  const panel = $("detail"), place = places.get(span), {pane, part, token} = place;
  panel.textContent = "";
  panel.hidden = state.view === "plain";
  const isYours = part.who === "you", bar = put(panel, "div", "bar");
  put(bar, "p", "facts", `Token ${number(part.tokens.indexOf(token) + 1)} of ` +
    (isYours ? "yours" : "the answer") + (token.id === undefined ? "" : `, id ${token.id}`));
  button(bar, "Close", () => { unpin(); say.focus(); });
  put(panel, "p", "piece", `\u201C${spell(token.end ? token.raw : token.p || token.raw)}\u201D`);
  if (token.lp !== null && token.lp !== undefined) {
    put(panel, "p", "facts",
      `${percent(Math.exp(token.lp))} likely, ${bits(token).toFixed(2)} bits of surprise`);
  }
  if (token.top?.length) likely(panel, place, isYours);
  if (token.x) experts(panel, token.x);
  if (token.lp == null && !token.x) put(panel, "p", "facts", "Its probabilities are not kept.");
}
function likely(panel, place, isYours) {
  const {token} = place, list = put(panel, "ol"), top = [...token.top];
  list.ariaLabel = "Likely here; choose one to continue from it";
  if (!top.some(choice => choice.id === token.id)) top.push({...token, t: token.raw});
  top.forEach(choice => {
    const one = button(put(list, "li"), undefined, () => branch(place, choice));
    put(one, "i").style.width = percent(Math.exp(choice.lp)).replace("\u00A0", "");
    put(one, "span", "", spell(choice.t));
    put(one, "span", "", percent(Math.exp(choice.lp)));
    if (choice.id === token.id) one.ariaCurrent = "true";
    const isHalf = isPartial(choice.t) || isPartial(token.raw ?? "");
    one.title = isHalf ? "Half a character has no text to continue" : "Continue with this one";
    one.disabled = isYours || isHalf;
  });
}
function experts(panel, {ids, weights}) {
  const table = put(panel, "table"), body = put(table, "tbody");
  table.ariaLabel = "Experts and their routing weights by block";
  ids.forEach((chosen, l) => {
    const row = put(body, "tr", l === state.block ? "now" : "");
    put(row, "th", "", `Block ${l}`).scope = "row";
    const cell = put(row, "td");
    chosen.forEach((e, k) => {
      const part = put(cell, "span");
      put(part, "i", "e" + e);
      put(part, "b", "", e);
      part.append(` ${percent(weights[l][k])}`);
    });
    const bars = put(cell, "div", "bars");
    chosen.forEach((e, k) => { put(bars, "i", "e" + e).style.flexGrow = weights[l][k]; });
  });
}

// ------------------------------------------------------------------------------------- heat map
let heat = {};
function drawHeat() {
  const pane = active, L = pane?.blocks ?? 0, E = pane?.experts ?? 0;
  const hasNone = !L || state.view !== "experts";
  $("use").hidden = state.view !== "experts";
  $("heat").hidden = hasNone;
  if (hasNone) {
    $("read").textContent = "Here one sees which experts the tokens go to, as they stream.";
    return;
  }
  if (heat.L !== L || heat.E !== E) buildHeat(L, E);
  const slider = $("block");
  slider.max = L - 1;
  heat.cells.forEach((row, l) => {
    const counts = pane.counts[l] ?? [], total = counts.reduce((a, b) => a + b, 0);
    row.forEach((cell, e) => {
      const kind = heatKind(counts[e] ?? 0, total, E);
      if (cell.className !== kind) cell.className = kind;
    });
    row[0].parentNode.className = l === state.block ? "now" : "";
  });
  read(state.cell);
}
function heatKind(count, total, E) {
  const step = count ? Math.round(4 + 2 * Math.log2(count * E / total)) : 0;
  return total ? "q" + Math.max(0, Math.min(8, step)) : "";
}
function buildHeat(L, E) {
  $("heat").textContent = "";
  const table = put($("heat"), "table", E > 16 ? "wide" : "");
  if (E > 24) table.style.minWidth = `${.68 * E + 3}rem`;
  table.role = "grid";
  table.ariaLabel = "Use of experts: rows are blocks, columns experts";
  const head = put(put(table, "thead"), "tr");
  put(head, "th", "corner");
  for (let e = 0; e < E; e++) put(head, "th", "e" + e, E > 16 ? "" : e).scope = "col";
  const body = put(table, "tbody");
  heat = {L, E, cells: Array.from({length: L}, (_, l) => {
    const row = put(body, "tr");
    put(row, "th", "", l).scope = "row";
    return Array.from({length: E}, (_, e) => {
      const cell = put(row, "td");
      cell.tabIndex = l || e ? -1 : 0;
      return cell;
    });
  })};
}
const placeOf = cell => [cell.parentNode.rowIndex - 1, cell.cellIndex - 1];
function read(place) {
  const line = $("read"), [l, e] = place ?? [];
  let text = "Share of a block\u2019s choices over the fair share. Point at a cell to see its " +
    "tokens; click keeps them.";
  if (place) {
    const counts = active.counts[l] ?? [], total = counts.reduce((a, b) => a + b, 0);
    text = `Block ${l}, expert ${e}: ${number(counts[e] ?? 0)} of ${number(total)} choices, ` +
      `${((counts[e] ?? 0) * heat.E / Math.max(1, total)).toFixed(2)} \u00D7 its fair share` +
      (state.keeps ? " (kept: Esc lets go)" : "");
  }
  if (line.textContent !== text) line.textContent = text;
}
function pointAt(place, keeps) {
  if (state.keeps && !keeps) return;
  if (keeps) {
    const same = state.keeps && String(state.cell) === String(place);
    state.keeps = !same;
  }
  state.cell = place;
  for (const cell of heat.cells?.flat() ?? []) cell.ariaSelected = null;
  if (place && state.keeps) heat.cells[place[0]][place[1]].ariaSelected = "true";
  read(place);
  paint();
}
function paint() {
  for (const pane of shown()) {
    for (const span of pane.spans) {
      const {part, token} = places.get(span), kind = look(token, part.who === "you");
      if (span.className !== kind) span.className = kind;
    }
  }
}
const isCell = event => event.target.matches("td");
const heatKeys = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
for (const kind of ["mouseover", "focusin"]) {
  on($("heat"), kind, event => isCell(event) && pointAt(placeOf(event.target)));
}
for (const kind of ["mouseleave", "focusout"]) on($("heat"), kind, () => pointAt(null));
on($("heat"), "click", event => isCell(event) && pointAt(placeOf(event.target), true));
on($("heat"), "keydown", event => {
  if (!isCell(event) || event.ctrlKey || event.altKey || event.metaKey) return;
  const [l, e] = placeOf(event.target), way = heatKeys[event.key];
  if (event.key === "Enter" || event.key === " ") pointAt([l, e], true);
  else if (!way) return;
  event.preventDefault();
  const next = way && heat.cells[l + way[0]]?.[e + way[1]];
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
on($("block"), "input", () => {
  state.block = +$("block").value;
  $("block-shown").textContent = state.block;
  drawHeat();
  paint();
  if (state.pinned) show(state.pinned);
});

// -------------------------------------------------------------------------------------- context
let counting = 0;
function context(used) {
  const most = panes[0]?.card?.max_model_len ?? 0;
  $("context").textContent = `Context ${number(Math.min(used, most))} of ${number(most)}`;
  $("meter").value = most ? Math.min(1, used / most) : 0;
}
function countSoon() {
  clearTimeout(counting);
  counting = setTimeout(async () => {
    const [pane] = panes, draft = say.value;
    if (running() || !pane.card) return;
    const doc = state.editing ? pane.doc.slice(0, cutAt(pane, state.editing)) : pane.doc;
    const text = doc.map(textOf).join("") + draft;
    if (!text) context(0);
    if (!text || text.length > 2e5) return;
    const messages = messagesOf(pane, doc);
    if (draft) messages.push({role: "user", content: draft});
    const what = isChat() ? {messages} : {prompt: text};
    try {
      const answer = await call("tokenize", {model: pane.card.id, ...what}, undefined, null);
      const {count} = await answer.json();
      if (isWhole(count) && !running()) context(count);
    } catch { /* The meter is no reason to disturb. */ }
  }, 400);
}

// -------------------------------------------------------------------------------------- history
const NOTE = `The newest ${MOST_TALKS} are kept, in this browser alone.`;
let historyNote = NOTE;
const talksKept = () => checkedTalks(kept.read("history"));
function keepTalks(talks) {
  talks.length = Math.min(talks.length, MOST_TALKS);
  const wanted = talks.length;
  while (!kept.write("history", talks) && talks.length) talks.length = Math.floor(talks.length / 2);
  const lost = wanted - talks.length;
  if (!talks.length) historyNote = NOTE;
  if (lost) {
    historyNote = `This browser\u2019s storage is full: ${lost} of ${wanted} are not kept.`;
  }
}
function save() {
  if (!panes[0].doc.length) return;
  const talk = {id: state.talk, time: Date.now(), mode: state.mode, panes: shown().map(pane => ({
    settings: pane.settings,
    doc: pane.doc.map(written),
  }))};
  keepTalks([talk, ...talksKept().filter(one => one.id !== talk.id)]);
}
function keepSettings() { kept.write("settings", panes.map(pane => pane.settings)); }
function begin(mode = state.mode) {
  for (const pane of panes) stop(pane);
  Object.assign(state, {mode, editing: null,
    talk: Date.now().toString(36) + Math.random().toString(36).slice(2, 8)});
  unpin();
  for (const pane of panes) {
    Object.assign(pane, {past: [], future: []});
    pane.problem("");
    pane.tell("");
    pane.put([]);
    pane.showSettings();
  }
  say.value = "";
  controls();
}
function openTalk(talk) {
  begin(talk.mode);
  state.talk = talk.id;
  setTwo(talk.panes.length > 1);
  talk.panes.forEach((one, i) => {
    panes[i].settings = one.settings;
    panes[i].showSettings();
    panes[i].put(alive(one.doc));
  });
}
function listTalks() {
  const list = $("talks"), talks = talksKept();
  list.textContent = "";
  $("history-note").textContent = talks.length ? historyNote : "Nothing is kept yet.";
  for (const talk of talks) {
    const row = put(list, "li"), text = talk.panes[0].doc.map(textOf).join(" ")
      .slice(0, 200).replace(/\s+/g, " ").trim();
    const time = new Date(talk.time), when = isNaN(time) ? "" : time.toLocaleDateString();
    button(row, `${visible(text) || "(empty)"} \u00B7 ${when}`, () => {
      $("history").close();
      openTalk(talk);
    });
    button(row, "\u00D7", () => {
      keepTalks(talksKept().filter(one => one.id !== talk.id));
      listTalks();
    }).ariaLabel = "Delete " + visible(text).slice(0, 40);
  }
}
on($("show-history"), "click", () => { listTalks(); $("history").showModal(); });
on($("history"), "click", event =>
  event.target.hasAttribute("data-close") && $("history").close());
on($("clear"), "click", () => {
  if (confirm("Delete the whole history?")) keepTalks([]);
  listTalks();
});
on($("export"), "click", () => {
  const data = JSON.stringify({gptoss_history: 1, talks: talksKept()});
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([data], {type: "application/json"}));
  link.download = "gptoss-history.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
on($("import"), "click", () => $("file").click());
on($("file"), "change", async () => {
  const [file] = $("file").files;
  if (!file) return;
  let talks = [];
  try {
    // More than any browser keeps would only make the page slow.
    if (file.size < 2e7) talks = checkedTalks(JSON.parse(await file.text()).talks);
  } catch {
    // It is none.
  }
  $("file").value = "";
  const ids = new Set(talks.map(talk => talk.id));
  if (talks.length) {
    keepTalks([...talks, ...talksKept().filter(talk => !ids.has(talk.id))]
      .sort((a, b) => b.time - a.time));
  }
  listTalks();
  $("history-note").textContent = talks.length ? `${talks.length} came from the file.`
    : "That file has no history of this page.";
});

// ---------------------------------------------------------------------------------------- links
const toLink = value => btoa(Array.from(new TextEncoder().encode(JSON.stringify(value)),
  byte => String.fromCharCode(byte)).join(""))
  .replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
function fromLink(text) {
  try {
    const bytes = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")),
      c => c.charCodeAt(0));
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch { return null; }
}
function linkOf(pane) {
  const last = pane.doc.at(-1), doc = pane.doc.map(written);
  const settings = {...pane.card?.sampling_defaults, model: pane.card?.id, ...pane.settings};
  if (last?.who === "model") {
    doc.pop();
    // What was there before the answer's last part was drawn.
    const before = written({...last, tokens: last.tokens.slice(0, last.start)});
    if (before.text) doc.push(before);
    if (last.seed !== null) settings.seed = last.seed;
  }
  const make = parts => `${location.origin}${location.pathname}#link=` +
    toLink({mode: state.mode, settings, doc: parts, model: pane.model});
  const whole = make(doc);
  return whole.length <= MOST_LINK ? [whole, "The link is copied: settings, seed and text."]
    : [make([]), "The text is too long for a link: it has the settings and the seed alone."];
}
// A key must not stay in the address, nor in the browser's history.
function bare() {
  if (location.hash) history.replaceState(null, "", location.pathname + location.search);
}
function openFragment() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (given.has("token")) key = session("key", given.get("token").trim().slice(0, 512));
  const link = given.has("link") ? fromLink(given.get("link")) : null;
  bare();
  const doc = isObject(link) ? checkedDoc(link.doc) : null;
  if (!doc) return;
  begin(link.mode === "chat" ? "chat" : "text");
  setTwo(false);
  const [pane] = panes, last = doc.at(-1)?.who === "you" ? doc.pop() : null;
  pane.settings = checkedSettings(link.settings);
  pane.showSettings();
  pane.put(alive(doc));
  say.value = last?.text ?? "";
  pane.tell(link.model !== pane.model ? "From a link to another model: Enter draws with this one."
    : pane.card.batch_invariant ? "From a link: Enter draws the same again."
    : "From a link: Enter draws it again, and this model may differ in company.");
  controls();
}

// ------------------------------------------------------------------------------------- controls
function controls() {
  const isRunning = running(), {editing} = state;
  const hasText = say.value !== "", last = panes[0]?.doc.at(-1);
  $("send").textContent = isRunning ? "Stop" : !isChat() ? "Continue"
    : hasText || editing || !last ? "Send" : last.who === "you" ? "Answer" : "Continue";
  $("send").disabled = !cards.length;
  $("editing").hidden = !editing;
  $("modes").hidden = !isChat() && !cards.some(card => card.has_chat_template || card.plain_chat);
  $("compare").disabled = isRunning;
  $("read").ariaLive = isRunning ? "off" : "polite";
  say.placeholder = isChat() ? "Your message"
    : last ? "Add to it, or press Enter to continue it" : "Write a beginning";
  for (const pane of panes) {
    pane.element.classList.toggle("busy", Boolean(pane.run));
    const can = {regenerate: !isRunning && pane.doc.length, edit: !isRunning && pane.doc.length,
      undo: !pane.run && pane.past.length, redo: !pane.run && pane.future.length,
      copy: pane.doc.length, link: cards.length};
    for (const one of pane.element.querySelectorAll("[data-act]")) {
      one.disabled = !can[one.dataset.act];
    }
    const cut = editing ? cutAt(pane, editing) : Infinity;
    pane.doc.forEach((one, i) => pane.holders.get(one)?.classList.toggle("gone", i >= cut));
  }
  document.body.className = `v-${state.view} m-${state.mode}${state.two ? " two" : ""}`;
  const pressed = {mode: state.mode, view: state.view};
  for (const [name, value] of Object.entries(pressed)) {
    for (const one of document.querySelectorAll(`[data-${name}]`)) {
      one.ariaPressed = one.dataset[name] === value;
    }
  }
  $("compare").ariaPressed = Boolean(state.two);
  if (!isRunning) $("newest").hidden = true;
  countSoon();
}
function setTwo(two) {
  state.two = two;
  if (two && panes.length < 2) {
    panes.push(new Pane((kept.read("settings") ?? [])[1] ?? panes[0].settings));
    $("panes").append(panes[1].element);
    panes[1].showSettings();
  }
  if (panes[1]) panes[1].element.hidden = !two;
  if (two) panes[1].put(panes[0].copied());
  else { stop(panes[1] ?? panes[0]); activate(panes[0]); }
  for (const pane of panes) pane.find(".settings").open = two && !pane.doc.length;
  controls();
}
on($("compare"), "click", () => setTwo(!state.two));
on($("new"), "click", () => { begin(); say.focus(); });
on($("modes"), "click", ({target: {dataset}}) =>
  dataset.mode && dataset.mode !== state.mode && begin(dataset.mode));
function setView(view) {
  state.view = view;
  kept.write("view", view);
  unpin();
  for (const pane of panes) pane.render();
  drawHeat();
}
on($("views"), "click", ({target: {dataset}}) => {
  if (dataset.view) setView(dataset.view);
});
const THEMES = {Auto: "as the system has them", Light: "light", Dark: "dark"};
function setTheme(name) {
  if (!Object.hasOwn(THEMES, name)) name = "Auto";
  if (name === "Auto") delete root.dataset.theme;
  else root.dataset.theme = name.toLowerCase();
  $("theme").textContent = "\u25D0 " + (state.theme = name);
  $("theme").ariaLabel = "Colours: " + THEMES[name];
}
on($("theme"), "click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(state.theme) + 1) % names.length];
  setTheme(next);
  kept.write("theme", next);
});
on($("ask"), "submit", event => {
  event.preventDefault();
  if (running()) shown().forEach(stop);
  else send();
});
on(say, "keydown", event => {
  // In Safari the Enter that ends a composition has this code alone.
  if (event.isComposing || event.keyCode === 229) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !say.value) {
    event.preventDefault();
    edit(active, active.doc.findLastIndex(one => one.who === "you"));
  }
});
on(say, "input", controls);
on(say, "focus", unpin);
on(document, "keydown", event => {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  if (running()) shown().forEach(stop);
  else if (state.editing) leaveEditing();
  else {
    if (state.keeps) { state.keeps = false; pointAt(null); }
    const isInside = $("detail").contains(document.activeElement), {pinned} = state;
    // From the choices back to their token; from there to the text field.
    if (isInside && pinned) pinned.focus();
    else { unpin(); say.focus(); }
  }
});
on($("newest"), "click", () => {
  follows = true;
  (shown().find(pane => pane.run) ?? panes[0]).tail.scrollIntoView({block: "nearest"});
  $("newest").hidden = true;
});
on(window, "pagehide", () => {
  if (running()) save();
  // For a reload: another tab has a talk of its own.
  session("talk", panes[0]?.doc.length ? state.talk : "");
  session("draft", say.value);
});
// The keyboard of a phone lies over the page; the text field must stay above it.
const view = window.visualViewport;
for (const kind of ["resize", "scroll"]) {
  on(view, kind, () => {
    const hidden = view.scale > 1 ? 0 : Math.max(0, innerHeight - view.height - view.offsetTop);
    root.style.setProperty("--keyboard", `${hidden}px`);
  });
}

// ---------------------------------------------------------------------------------------- start
async function loadModels() {
  for (;;) {
    try {
      const waits = message => { panes[0].tell(message); };
      const list = await (await call("v1/models", undefined, undefined, waits)).json();
      cards = list.data.filter(card => isObject(card) && isText(card.id, 200));
      for (const pane of panes) pane.showSettings();
      return;
    } catch (error) {
      panes[0].problem(visible(error.message));
      await new Promise(resolve => {
        again = resolve;
        // Who gave no key is not asked again and again.
        if (error.status !== 401) setTimeout(resolve, 3000);
      });
      again = null;
    }
  }
}
async function start() {
  setTheme(kept.read("theme"));
  const viewKept = kept.read("view");
  if (["plain", "surprise", "experts"].includes(viewKept)) state.view = viewKept;
  if (location.pathname.endsWith("/experts")) state.view = "experts";
  key = session("key");
  const settings = kept.read("settings");
  panes = [new Pane(Array.isArray(settings) ? settings[0] : null)];
  active = panes[0];
  $("panes").append(panes[0].element);
  // A key in the address is needed for the first request.
  const fragment = location.hash;
  if (new URLSearchParams(fragment.slice(1)).has("token")) openFragment();
  await loadModels();
  begin(cards[0]?.has_chat_template ? "chat" : "text");
  drawHeat();
  // What was here before a reload.
  const talk = talksKept().find(one => one.id === session("talk")), draft = session("draft");
  if (talk) openTalk(talk);
  session("talk", "");
  session("draft", "");
  say.value = draft;
  controls();
  if (fragment.includes("link=")) {
    if (!location.hash) history.replaceState(null, "", fragment);
    openFragment();
  }
  on(window, "hashchange", openFragment);
  root.dataset.ready = "1";
  say.focus({preventScroll: true});
}
start();
})();
