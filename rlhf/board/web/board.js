// The board's one script. Every page works without it; it keeps figures and pictures fresh, and
// shows beside a form what the form stands for. Texts reach the page through textContent alone.
"use strict";

// <section data-live="/runs/x/live" data-every="2"> gets {field: text} from there and puts each
// text into the element with data-field=field. "pictures" is a number that grows with the
// pictures (img[data-picture]), which are then loaded again; "ended" stops the asking.
function live(area) {
  const every = 1000 * Number(area.dataset.every || 2);
  let pictures = null;
  async function ask() {
    let values;
    try {
      const answer = await fetch(area.dataset.live, { headers: { accept: "application/json" } });
      if (!answer.ok) throw new Error(String(answer.status));
      values = await answer.json();
    } catch {
      return later(4 * every); // the board may come back
    }
    for (const element of area.querySelectorAll("[data-field]")) {
      const text = values[element.dataset.field];
      if (text !== undefined && element.textContent !== text) element.textContent = text;
    }
    for (const element of area.querySelectorAll("[data-shown-if]")) {
      element.hidden = !values[element.dataset.shownIf];
    }
    if (pictures !== null && values.pictures !== pictures) {
      for (const picture of area.querySelectorAll("img[data-picture]")) {
        picture.src = picture.dataset.picture + "&version=" + values.pictures;
      }
    }
    pictures = values.pictures;
    if (values.ended) {
      if (area.dataset.reload === "ended" && area.dataset.was !== "ended") location.reload();
      return;
    }
    later(every);
  }
  function later(wait) {
    setTimeout(ask, wait);
  }
  ask();
}

// <form data-preview="/new/sft/preview"> is sent there as it is typed; {field: text} goes where
// data-field says, as above.
function preview(form) {
  let timer = null;
  let asked = 0;
  async function ask() {
    const number = ++asked;
    let values;
    try {
      const answer = await fetch(form.dataset.preview, {
        method: "POST",
        body: new URLSearchParams(new FormData(form)),
      });
      values = await answer.json();
    } catch {
      return; // the page as it is stays right: the server looks again at every start
    }
    if (number !== asked) return; // a later answer is on its way
    for (const element of document.querySelectorAll("[data-field]")) {
      const text = values[element.dataset.field];
      if (text !== undefined) element.textContent = text;
    }
  }
  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(ask, 400);
  });
}

for (const area of document.querySelectorAll("[data-live]")) live(area);
for (const form of document.querySelectorAll("form[data-preview]")) preview(form);
