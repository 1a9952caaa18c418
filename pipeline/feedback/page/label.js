// One task on the screen. What was done is kept in this browser until the server has said "saved".
import { element, markdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const LETTERS = "ABCDEFGHI";
const FLAGS = {
  fails_task: "Does not do what was asked", untrue: "Untrue", harmful: "Harmful",
  unfinished: "Unfinished", repeats: "Repeats itself", wrong_language: "Wrong language",
};
const ROLES = { user: "Person", assistant: "Assistant", system: "System" };
let me = "", guideline = { version: 0, text: "" };
let task = null, state = null, undone = [], selected = 0, busy = false, last = null, editing = false;

// --- talking with the server ---------------------------------------------------------------------

async function ask(path, body) {
  const sent = body === undefined ? {} : {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  };
  const answer = await fetch(path, sent);
  const told = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(told.error), { status: answer.status });
  return told;
}

const sleep = (ms) => new Promise((done) => {
  const timer = setTimeout(finish, ms);
  window.addEventListener("online", finish);
  function finish() { clearTimeout(timer); window.removeEventListener("online", finish); done(); }
});

// Try until the server has answered; what it refuses is thrown.
async function surely(path, body) {
  for (let wait = 1000; ; wait = Math.min(2 * wait, 15000)) {
    try {
      const told = await ask(path, body);
      notice("");
      return told;
    } catch (error) {
      const again = error.status === undefined || error.status >= 500 || error.status === 429;
      if (!again) throw error;
      const kept = body ? "Not saved yet; what you did is kept in this browser. " : "";
      notice(kept + (error.status ? error.message : "No connection; trying again."));
      await sleep(wait);
    }
  }
}

const notice = (text) => { $("notice").textContent = text; $("notice").hidden = !text; };
const status = (text) => { $("status").textContent = text; };
const memory = (name) => `label/${me}/${name}`;
const recall = (name) => JSON.parse(localStorage.getItem(memory(name)) ?? "null");
const keep = (name, value) => value === null ? localStorage.removeItem(memory(name))
  : localStorage.setItem(memory(name), JSON.stringify(value));

async function begin() {
  try {
    if (location.hash.length > 1) {
      await surely("/api/session", { token: decodeURIComponent(location.hash.slice(1)) });
      history.replaceState(null, "", "/");
    }
    await next();
  } catch (error) { stopped(error); }
}

function stopped(error) {
  notice(error.message);
  hold(false);
}

// --- a task --------------------------------------------------------------------------------------

async function next(told) {
  told ??= await surely("/api/next");
  me = told.name;
  if (recall("pending")) {
    const { path, body } = recall("pending");
    status("Saving…");
    await surely(path, body).catch((error) => { notice(error.message); if (error.status === 401) throw error; });
    keep("pending", null);
    return next();
  }
  guideline = told.guideline;
  $("admin").hidden = !told.admin;
  $("progress").textContent = `${me}: ${told.done} done, ${told.left} left`;
  show(told.task, false);
  $("empty").textContent = told.left
    ? "What is left is with others just now. Reload in a while." : "Nothing is left to rank. Thank you!";
  if (guideline.text && (recall("guideline") ?? 0) < guideline.version) openGuideline();
}

function show(given, edits) {
  task = given;
  editing = edits;
  undone = [];
  selected = 0;
  $("empty").hidden = task !== null;
  $("task").hidden = $("bar").hidden = task === null;
  $("editing").hidden = !editing;
  busy = $("skip").disabled = false;
  if (task === null) return;
  const k = task.responses.length;
  const draft = recall("draft");
  const blank = { ranks: Array(k).fill(null), overall: Array(k).fill(null), flags: Array.from({ length: k }, () => []) };
  state = { ...blank, comment: "", seconds: 0 };
  if (task.mine) {
    const { ranks, overall, flags, comment } = task.mine;
    state = { ...state, ranks: ranks ?? blank.ranks, overall: overall ?? blank.overall, flags: flags ?? blank.flags, comment: comment ?? "" };
  }
  if (draft?.task === task.id && draft.after === (task.mine?.event ?? null)) state = draft.state;
  $("conversation").replaceChildren(...task.prompt.map((turn) =>
    element("div", { class: `turn ${turn.role}` },
      element("h3", {}, ROLES[turn.role] ?? turn.role), prose(turn.content))));
  $("cards").replaceChildren(...task.responses.map(card));
  $("comment").value = state.comment;
  const names = ["?", ...Array.from({ length: k }, (_, n) => (n ? `${n + 1}` : "1 best"))];
  $("tray").replaceChildren(...names.map((name, rank) => element("div", { class: "slot", "data-rank": rank, "data-name": name })));
  paint();
  $("cards").children[0].focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

function prose(text) {
  const out = element("div", { class: "prose", dir: "auto" });
  out.append(markdown(text));
  return out;
}

function card(response, n) {
  const letter = LETTERS[n], k = task.responses.length;
  const ranks = Array.from({ length: k }, (_, at) => element("label", {},
    element("input", { type: "radio", name: `rank-${n}`, value: at + 1, "data-card": n, tabindex: at ? null : 0 }), `${at + 1}`));
  const grades = ["–", 1, 2, 3, 4, 5, 6, 7].map((grade) => element("option", { value: grade === "–" ? "" : grade }, `${grade}`));
  const flags = Object.entries(FLAGS).map(([flag, name]) => element("label", {},
    element("input", { type: "checkbox", value: flag, "data-flag": n }), ` ${name}`));
  return element("article", { class: "card answer", tabindex: "0", role: "group", "data-card": n },
    element("header", {}, element("span", { class: "letter", "data-letter": n, "aria-hidden": "true" }, letter),
      element("h3", {}, `Answer ${letter}`), element("span", { class: "place" })),
    prose(response.text || "(empty)"),
    response.ended ? null : element("p", { class: "cut" }, "… cut off: it did not end by itself"),
    element("fieldset", { class: "ranks" }, element("legend", {}, `Rank of ${letter}`), ...ranks),
    element("details", {}, element("summary", {}, "Grade and flags"),
      element("p", {}, element("label", {}, `Overall, 1 to 7 the best `, element("select", { "data-overall": n }, ...grades))),
      element("fieldset", {}, element("legend", {}, "It…"), ...flags)));
}

function paint() {
  [...$("cards").children].forEach((own, n) => {
    const rank = state.ranks[n];
    own.classList.toggle("selected", n === selected);
    own.classList.toggle("ranked", rank !== null);
    own.setAttribute("aria-label", `Answer ${LETTERS[n]}, ${rank === null ? "no rank yet" : `rank ${rank}`}`);
    own.querySelector(".place").textContent = rank === null ? "" : `${rank}`;
    own.querySelectorAll("[type=radio]").forEach((box) => { box.checked = Number(box.value) === rank; });
    own.querySelectorAll("[type=checkbox]").forEach((box) => { box.checked = state.flags[n].includes(box.value); });
    own.querySelector("select").value = state.overall[n] ?? "";
  });
  [...$("tray").children].forEach((slot, rank) => slot.replaceChildren(
    ...state.ranks.flatMap((own, n) => (own ?? 0) === rank
      ? [element("span", { class: "letter", "data-letter": n }, LETTERS[n])] : [])));
  const lacking = state.ranks.filter((rank) => rank === null).length;
  $("save").disabled = busy || lacking > 0;
  status(lacking ? `${lacking} of ${state.ranks.length} still without a rank` : "Enter saves");
  $("undo").disabled = busy || (!undone.length && (last === null || editing));
}

const hold = (is) => { busy = is; if (task) paint(); $("skip").disabled = is; };
const draft = () => keep("draft", { task: task.id, after: task.mine?.event ?? null, state });

function change(how) {
  if (busy) return;
  undone.push([structuredClone(state), selected]);
  how(state);
  draft();
  paint();
}

// Gives a rank; the next answer without one, or -1.
function rank(n, to) {
  change((now) => { now.ranks[n] = to; });
  const after = state.ranks.indexOf(null, n + 1);
  return after >= 0 ? after : state.ranks.indexOf(null);
}

async function undo() {
  if (busy) return;
  if (undone.length) {
    [state, selected] = undone.pop();
    $("comment").value = state.comment;
    draft();
    paint();
    focusCard(selected);
  } else if (last !== null && !editing) await edit(last);
}

async function edit(number) {
  try {
    show(await surely(`/api/task/${number}`), true);
  } catch (error) { stopped(error); }
}

async function send(path, more) {
  if (busy || !task) return;
  const own = { uuid: uuid(), task: task.id, after: task.mine?.event ?? null, guideline: guideline.version };
  const body = { ...own, seconds: Math.min(86400, Math.round(10 * state.seconds) / 10), comment: state.comment, ...more };
  hold(true);
  status("Saving…");
  keep("pending", { path, body });
  try {
    await surely(path, body);
    keep("pending", null);
    keep("draft", null);
    last = task.id;
    await next();
    status("Saved.");
  } catch (error) {
    if (error.status !== 401) keep("pending", null);
    if (error.status === 409) { keep("draft", null); await next().catch(stopped); }
    stopped(error);
  }
}

function uuid() { // crypto.randomUUID is for secure addresses alone
  const bytes = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return bytes.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

const save = () => state.ranks.includes(null) ? status("Every answer needs a rank.")
  : send("/api/label", { ranks: state.ranks, overall: state.overall, flags: state.flags });

// --- keys ----------------------------------------------------------------------------------------

const focusCard = (n) => { $("cards").children[n]?.focus(); };

document.addEventListener("keydown", (event) => {
  const at = event.target;
  const undoes = event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey);
  if (!task || document.querySelector("dialog[open]") || at.matches("textarea, select, [type=text]")) return;
  if (!undoes && (event.ctrlKey || event.metaKey || event.altKey)) return;
  const radio = at.matches("[type=radio]"), k = state.ranks.length;
  if (/^[1-9]$/.test(event.key) && Number(event.key) <= k) {
    const open = rank(selected, Number(event.key));
    if (open >= 0) focusCard(open);
  } else if (event.key === "Enter" && !at.matches("button, a, summary")) save();
  else if (event.key.toLowerCase() === "u" || undoes) undo();
  else if (event.key.toLowerCase() === "s") $("skip").click();
  else if (event.key === "?") openGuideline();
  else if (!radio && ["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"].includes(event.key) && at.closest("#cards, body") && !at.matches("button, a, summary, pre, .scroll")) {
    focusCard((selected + (/Right|Down/.test(event.key) ? 1 : k - 1)) % k);
  } else return;
  event.preventDefault();
});

$("cards").addEventListener("focusin", (event) => {
  const own = event.target.closest("[data-card].answer");
  if (own && Number(own.dataset.card) !== selected) { selected = Number(own.dataset.card); paint(); }
});
$("cards").addEventListener("click", (event) => {
  const own = event.target.closest(".answer");
  if (own && !event.target.closest("a, label, select, summary, pre") && !getSelection().toString()) own.focus();
});
$("cards").addEventListener("change", (event) => {
  const { card: own, flag, overall } = event.target.dataset;
  if (own !== undefined) rank(Number(own), Number(event.target.value));
  if (overall !== undefined) change((now) => { now.overall[overall] = Number(event.target.value) || null; });
  if (flag !== undefined) change((now) => {
    const rest = now.flags[flag].filter((one) => one !== event.target.value);
    now.flags[flag] = event.target.checked ? [...rest, event.target.value] : rest;
  });
});
$("comment").addEventListener("input", () => { state.comment = $("comment").value; draft(); });

// --- dragging a letter onto a rank: mouse, pen and finger alike -----------------------------------

document.addEventListener("pointerdown", (event) => {
  const letter = event.target.closest("[data-letter]");
  if (!letter || busy || event.button) return;
  event.preventDefault();
  const n = Number(letter.dataset.letter);
  const flying = element("span", { class: "letter flying" }, LETTERS[n]);
  document.body.append(flying);
  letter.classList.add("dragged");
  focusCard(n);
  const under = (at) => document.elementsFromPoint(at.clientX, at.clientY).find((one) => one.matches(".slot"));
  const move = (at) => {
    flying.style.left = `${at.clientX}px`;
    flying.style.top = `${at.clientY}px`;
    const slot = under(at);
    document.querySelectorAll(".slot").forEach((one) => one.classList.toggle("over", one === slot));
  };
  const end = (at) => {
    for (const [name, heard] of heards) document.removeEventListener(name, heard);
    flying.remove();
    letter.classList.remove("dragged");
    const slot = at.type === "pointerup" ? under(at) : null;
    document.querySelectorAll(".slot").forEach((one) => one.classList.remove("over"));
    if (slot) change((now) => { now.ranks[n] = Number(slot.dataset.rank) || null; });
  };
  const heards = [["pointermove", move], ["pointerup", end], ["pointercancel", end]];
  for (const [name, heard] of heards) document.addEventListener(name, heard);
  move(event);
});

// --- around it -----------------------------------------------------------------------------------

function openGuideline() {
  $("guideline-title").textContent = `Guideline, version ${guideline.version}`;
  $("guideline-text").replaceChildren(markdown(guideline.text));
  keep("guideline", guideline.version);
  if (!$("guideline").open) $("guideline").showModal();
}

async function openHistory() {
  try {
    const told = await ask("/api/history");
    $("history-list").replaceChildren(...told.map((one) => {
      const change = element("button", { type: "button" }, "Change");
      change.addEventListener("click", () => { $("history").close(); edit(one.task); });
      const said = one.kind === "skip" ? "skipped" : one.ranks.join(" ");
      return element("li", {}, element("time", { class: "soft small" }, new Date(1000 * one.time).toLocaleString()),
        element("span", { dir: "auto" }, one.prompt), element("b", {}, said), change);
    }));
    $("history").showModal();
  } catch (error) { notice(error.message); }
}

$("open-guideline").addEventListener("click", openGuideline);
$("open-history").addEventListener("click", openHistory);
$("save").addEventListener("click", save);
$("undo").addEventListener("click", undo);
$("leave").addEventListener("click", () => { keep("draft", null); next().catch(stopped); });
$("skip").addEventListener("click", () => { if (!busy) $("skipping").showModal(); });
$("skipping").addEventListener("close", () => {
  const reason = new FormData($("skip-form")).get("reason");
  if ($("skipping").returnValue === "skip") send("/api/skip", { reason });
  $("skipping").returnValue = "";
});
setInterval(() => { if (task && !busy && document.visibilityState === "visible") state.seconds += 0.5; }, 500);
begin();
