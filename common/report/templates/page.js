"use strict";
// Draws the charts; a live page also takes what is new, until the training ends.
const OPTIONS = {renderer: "svg", actions: false, ast: true, defaultStyle: false};
let drawn = []; // each holds on to the window until it is finalized

function draw(charts) {
  drawn.forEach((one) => one.then((found) => found?.finalize()));
  drawn = Object.entries(charts).map(([key, spec]) => {
    const place = document.getElementById("chart-" + key);
    return place ? vegaEmbed(place, spec, OPTIONS).catch((error) => console.error(error)) : Promise.resolve();
  });
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

function follow(ended) {
  const news = new EventSource("now");
  const end = () => {
    news.close();
    document.getElementById("live").textContent = ended;
  };
  news.onmessage = (found) => show(JSON.parse(found.data));
  news.onerror = end;
  news.addEventListener("end", end);
}

draw(JSON.parse(document.getElementById("charts").textContent));
if (document.body.dataset.live) follow(document.body.dataset.live);
