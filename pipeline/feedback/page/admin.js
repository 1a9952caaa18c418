// The admin's view: what the server tells, as tables.
import { element } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const share = (value) => value == null ? "–" : `${(100 * value).toFixed(0)} %`;
const cell = (value, name = "td", kind = "num") => element(name, { class: kind, scope: name === "th" ? "col" : null }, `${value ?? "–"}`);

async function ask(path, body) {
  const sent = body && { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(path, sent);
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error);
  return told;
}

const doing = (work) => work().catch((error) => { $("notice").textContent = error.message; $("notice").hidden = false; });

async function look() {
  const { progress, agreement, people, disagreements, next } = await ask("/api/admin");
  const skipped = Object.entries(progress.skips).map(([why, n]) => `${n} ${why}`).join(", ");
  const figures = [
    [`${progress.labelled} of ${progress.tasks}`, "tasks have a label"],
    [`${progress.labels} of ${progress.wanted}`, "labels wanted"],
    [share(agreement.share), `of ${agreement.pairs} doubly judged pairs agree`],
    [agreement.alpha ?? "–", "Krippendorff's α, ordinal"],
    [Object.values(progress.skips).reduce((a, b) => a + b, 0), `skipped ${skipped}`],
  ];
  $("figures").replaceChildren(...figures.map(([number, text]) =>
    element("div", { class: "card" }, element("b", {}, `${number}`), element("span", { class: "soft small" }, text))));
  const names = ["labels", "skips", "median seconds", "agreement", "reliable", "checks passed"];
  const rows = people.map((one) => element("tr", {}, cell(one.name + (one.admin ? " (admin)" : ""), "td", ""),
    ...[one.labels, one.skips, one.seconds, share(one.agreement), share(one.reliability), one.checks.join(" of ")].map((value) => cell(value)),
    element("td", {}, one.invited ? ending(one.name) : null)));
  $("people").replaceChildren(element("thead", {}, element("tr", {}, cell("name", "th", ""), ...names.map((name) => cell(name, "th")), element("td"))),
    element("tbody", {}, ...rows));
  $("disagreements").replaceChildren(...disagreements.map(dispute));
  if (!disagreements.length) $("disagreements").append(element("p", { class: "soft" }, "None yet."));
  const titles = { disagreement: "by disagreement", margin: "by the reward model's margin" };
  $("next").replaceChildren(...Object.entries(next).map(([by, tasks]) => element("div", { class: "card" },
    element("h3", {}, titles[by]), ...(tasks.length ? [] : [element("p", { class: "soft" }, "Nothing to go by yet.")]),
    element("ol", {}, ...tasks.slice(0, 8).map((one) => element("li", { dir: "auto" }, `${one.worth} · ${one.prompt.slice(0, 80)}`))))));
}

function dispute(one) {
  const answers = one.responses.map((text, n) => element("li", { class: "prose", dir: "auto" }, text || "(empty)"));
  const rows = one.rankings.map((said) => element("tr", {}, cell(said.name, "td", ""), cell(said.ranks.join(" ")), cell(share(said.probability)), cell(said.comment, "td", "")));
  return element("details", { class: "card" },
    element("summary", { dir: "auto" }, `${share(one.difficulty)} unsure · ${one.prompt.slice(0, 120)}`),
    element("ol", { type: "A" }, ...answers),
    element("table", {}, element("thead", {}, element("tr", {}, cell("who", "th", ""), cell("ranks", "th"), cell("likely right", "th"), cell("remark", "th", ""))), element("tbody", {}, ...rows)));
}

function ending(name) {
  const button = element("button", { type: "button", "aria-label": `End the link of ${name}` }, "End link");
  button.addEventListener("click", () => doing(async () => { await ask("/api/admin/revoke", { name }); await look(); }));
  return button;
}

$("invite").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = new FormData(event.target);
  doing(async () => {
    const told = await ask("/api/admin/invite", { name: given.get("name"), admin: given.has("admin") });
    $("link").textContent = `${location.origin}/#${told.token} (shown once)`;
    event.target.reset();
    await look();
  });
});
for (const button of document.querySelectorAll("[data-by]")) {
  button.addEventListener("click", () => doing(async () => {
    const by = button.dataset.by;
    const told = await ask("/api/admin/prefer", { by: by || "margin", number: by ? 50 : 0 });
    $("status").textContent = by ? `${told.preferred} tasks come first.` : "The least labelled come first.";
    await look();
  }));
}
doing(look);
