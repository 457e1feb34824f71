"use strict";
// Draws the charts; of a live page also asks for what is new, every few seconds, until the training ends.
const OPTIONS = {renderer: "svg", actions: false, ast: true, defaultStyle: false};
const SECONDS = 3;

function draw(charts) {
  for (const [key, spec] of Object.entries(charts)) {
    const place = document.getElementById("chart-" + key);
    if (place) vegaEmbed(place, spec, OPTIONS).catch((error) => console.error(error));
  }
}

function show(found) {
  const main = document.getElementById("main");
  const open = Array.from(main.querySelectorAll("details[open]"), (one) => one.id);
  main.style.minHeight = main.offsetHeight + "px";
  main.innerHTML = found.body; // escaped by the server; the page's policy runs no script of it
  open.forEach((id) => document.getElementById(id)?.setAttribute("open", ""));
  draw(found.charts);
  document.title = found.title;
}

async function follow(ended) {
  let known = "";
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 1000 * SECONDS));
    try {
      const answer = await fetch("now", {cache: "no-store"});
      if (!answer.ok) break;
      const text = await answer.text();
      if (text !== known) show(JSON.parse(text));
      known = text;
    } catch {
      break;
    }
  }
  document.getElementById("live").textContent = ended;
}

draw(JSON.parse(document.getElementById("charts").textContent));
if (document.body.dataset.live) follow(document.body.dataset.live);
