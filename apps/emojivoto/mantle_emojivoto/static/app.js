// The page: a grid to vote on, what came of a vote, and the leaderboard. Everything shown comes from /api.
"use strict";

const main = document.getElementById("main");
const REFRESH_MS = 2000;

/** An element with a class, text, and children. */
function element(tag, className, ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

async function api(path) {
  const response = await fetch(path, { cache: "no-store" });
  const text = await response.text();
  const body = text ? JSON.parse(text) : null;
  if (!response.ok) throw Object.assign(new Error(body ? body.error : response.statusText), { status: response.status });
  return body;
}

function card(kind, face, title, lines, again) {
  const actions = element("div", "actions");
  const first = element("button", "first", again ? "Vote again" : "Pick another one");
  first.onclick = showVote;
  const board = element("a", "", "View the leaderboard");
  board.href = "/leaderboard";
  actions.append(first, board);
  main.replaceChildren(
    element("section", "card " + kind, element("div", "big", face), element("h1", "", title), ...lines.map((l) => element("p", "", ...l)), actions));
  first.focus();
}

async function castVote(emoji) {
  try {
    await api("/api/vote?choice=" + encodeURIComponent(emoji.shortcode));
    card("good", emoji.unicode, "Your vote counts", [["You voted for ", element("code", "", emoji.shortcode)]], true);
  } catch (error) {
    card("bad", emoji.unicode, "That vote failed", failure(emoji, error), false);
  }
}

function failure(emoji, error) {
  const what = ["web answered ", element("code", "", String(error.status ?? "nothing")), ": " + error.message];
  if (emoji.shortcode !== ":doughnut:") return [what];
  return [what, ["This one is on purpose. Voting for the doughnut always fails, so that there is an error to find: look for ",
    element("code", "", "VoteDoughnut"), " in ", element("code", "", "mantle tap deploy/web -n emojivoto"), "."]];
}

async function showVote() {
  current("vote");
  try {
    const grid = element("div", "grid");
    for (const emoji of await api("/api/list")) {
      const button = element("button", "emoji", emoji.unicode);
      button.title = button.ariaLabel = emoji.shortcode;
      button.onclick = () => castVote(emoji);
      grid.append(button);
    }
    main.replaceChildren(element("h1", "", "Tap your favourite"), element("p", "lead", "A hundred emojis, one vote a tap."), grid);
  } catch (error) {
    broken(error);
  }
}

async function showLeaderboard() {
  current("leaderboard");
  try {
    const rows = await api("/api/leaderboard");
    const most = Math.max(1, ...rows.map((row) => Number(row.votes)));
    const board = element("ol", "board");
    for (const row of rows) {
      const bar = element("div", "bar");
      bar.style.width = (100 * Number(row.votes)) / most + "%";
      const face = element("span", "face", row.unicode);
      face.title = row.shortcode;
      board.append(element("li", "", face, bar, element("span", "votes", row.votes)));
    }
    main.replaceChildren(element("h1", "", "Leaderboard"), element("p", "lead", rows.length ? "Votes since voting started." : "Nobody has voted yet."), board);
  } catch (error) {
    broken(error);
  }
}

function broken(error) {
  main.replaceChildren(element("section", "card bad", element("div", "big", "🫥"), element("h1", "", "Nothing to show"),
    element("p", "", "web answered: " + error.message)));
}

function current(page) {
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.page === page) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

if (location.pathname === "/leaderboard") {
  showLeaderboard();
  setInterval(showLeaderboard, REFRESH_MS);
} else {
  showVote();
}
