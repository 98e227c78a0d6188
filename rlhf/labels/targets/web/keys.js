// Keys, dialogs, and which event calls what.

// ---- dialogs ----

function openDialog(id) {
  countTime();
  save();
  if (id === "help") showHelp(data, state);
  else showList(data, state, "All");
  $(id).showModal();
  $(`${id}-title`).focus();
  $(id).scrollTop = 0;
  setClock();
  if (id === "list")
    document.querySelector("#tasks [aria-current]")?.scrollIntoView({ block: "center" });
}

// ---- keys ----

const KEYS = {
  s: () => acts.choose("skip"),
  t: () => acts.tie(),
  u: () => acts.undo(),
  Backspace: () => acts.undo(),
  Enter: () => acts.next(),
  p: () => acts.back(),
  n: () => go(nextOpen(state.at + 1)),
  c: () => data.comments && $("comment").focus(),
  r: () => data.ratings && focusScale(0),
  f: () => acts.fix(),
  l: () => openDialog("list"),
  d: () => download(),
  "?": () => openDialog("help"),
};
const PAIR_ACTS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", 0: "tie" };
const DONE_KEYS = ["u", "Backspace", "p", "n", "l", "d", "?"];

function focusScale(place) {
  const scale = document.querySelector(`.scale[data-place="${place}"]`);
  if (scale) (scale.querySelector("input:checked") ?? scale.querySelector("input")).focus();
  else leaveField();
}

function leaveField() {
  $("position").focus({ preventScroll: true });
}

/** A key inside a scale of ratings; whether it was used. */
function rateByKey(scale, key) {
  if (key === "Escape") leaveField();
  else if (!/^[1-5]$/.test(key)) return key.startsWith("Arrow") || key === " ";
  else {
    const place = Number(scale.dataset.place);
    acts.rate(place, Number(key));
    focusScale(place + 1);
  }
  return true;
}

/** The function of a key, or undefined. */
function actOf(key) {
  if (view === "done") return DONE_KEYS.includes(key) ? KEYS[key] : undefined;
  if (data.kind === "pair" && Object.hasOwn(PAIR_ACTS, key))
    return () => acts.choose(PAIR_ACTS[key]);
  if (data.kind === "ranking" && key === "0") return acts.equal;
  if (data.kind === "ranking" && key === "x") return acts.clear;
  if (data.kind === "ranking" && /^[1-9]$/.test(key)) return () => acts.place(Number(key) - 1);
  return Object.hasOwn(KEYS, key) ? KEYS[key] : undefined;
}

/** After a click no control keeps the focus: else Enter, a space and digits would work on the
 * control again instead of on the task. */
function onClick(event) {
  if (!pointed || view !== "work" || document.querySelector("dialog[open]") !== null) return;
  if (event.target.closest("button, .scale")) leaveField();
}

function onKey(event) {
  clock.mark();
  pointed = false;
  if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (state === null || document.querySelector("dialog[open]") !== null) return;
  const { target, key } = event;
  if (target.matches("textarea, input[type='text']")) {
    if (key === "Escape") leaveField();
    return;
  }
  if (!state.keys) return;
  const scale = target.closest(".scale");
  if (scale && rateByKey(scale, key)) {
    if (/^[1-5]$/.test(key)) event.preventDefault();
    return;
  }
  if (target.matches("button") && (key === "Enter" || key === " ")) return;
  const act = actOf(key.length === 1 ? key.toLowerCase() : key);
  if (!act) return;
  event.preventDefault();
  act();
}

// ---- wiring ----

function onComment() {
  const label = labelHere();
  label.comment = $("comment").value;
  touch(label);
  clearTimeout(saving);
  saving = setTimeout(save, SAVE_MS);
}

/** Another tab of the same annotator wrote: both go on with the same labels. */
function onStorage(event) {
  if (state === null || event.key !== store.key(state.annotator) || event.newValue === null) return;
  const { at, advance, keys, fixed } = state;
  try {
    state = { ...stateOf(data, state.annotator, event.newValue), at, advance, keys, fixed };
  } catch (error) {
    problem(
      `Another tab saved labels that this one can't read (${error.message}). Close one of the two.`,
    );
    return;
  }
  if (view === "work") refresh();
  if (view === "done") showDone(data, state);
  announce("Labels were changed in another tab");
}

function wireDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", setClock);
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close();
    });
  }
  $("tasks").addEventListener("click", (event) => {
    const row = event.target.closest("button");
    if (!row) return;
    $("list").close();
    go(Number(row.dataset.index));
  });
  $("advance").addEventListener("change", () => {
    state.advance = $("advance").checked;
    save();
  });
  $("shortcuts").addEventListener("change", () => {
    state.keys = $("shortcuts").checked;
    save();
  });
  $("fixed").addEventListener("change", acts.fix);
  $("leave").addEventListener("click", () => {
    $("help").close();
    countTime();
    save();
    start();
  });
}

function wire() {
  $("who").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = tidyName($("name").value);
    $("name-error").textContent = "Please give your name: each label needs one.";
    $("name-error").hidden = name !== "";
    $("name").setAttribute("aria-invalid", String(name === ""));
    if (name && data.server) begin(data.server.annotator, serverLabels());
    else if (name) begin(name);
    else $("name").focus();
  });
  $("file").addEventListener("change", () => {
    if ($("file").files.length)
      openFile($("file").files[0]).then(() => {
        $("file").value = "";
      });
  });
  $("open-list").addEventListener("click", () => openDialog("list"));
  $("open-help").addEventListener("click", () => openDialog("help"));
  for (const id of ["download", "done-download"]) $(id).addEventListener("click", download);
  $("done-open").addEventListener("click", () => go(nextOpen(0)));
  $("done-list").addEventListener("click", () => openDialog("list"));
  $("unfold").addEventListener("click", () => unfold(!$("turns").classList.contains("whole")));
  $("comment").addEventListener("input", onComment);
  $("comment").addEventListener("blur", () => {
    if (saving !== null) save();
  });
  wireDialogs();
  document.addEventListener("keydown", onKey);
  document.addEventListener(
    "pointerdown",
    () => {
      pointed = true;
    },
    { capture: true },
  );
  document.addEventListener("click", onClick);
  for (const name of ["pointerdown", "pointermove", "wheel", "scroll"]) {
    document.addEventListener(name, () => clock.mark(), { passive: true, capture: true });
  }
  document.addEventListener("visibilitychange", () => {
    setClock();
    if (state === null) return;
    countTime();
    save();
  });
  window.addEventListener("pagehide", () => {
    if (state !== null) {
      countTime();
      save();
    }
  });
  window.addEventListener("resize", () => {
    if (view === "work") unfold($("turns").classList.contains("whole"));
  });
  window.addEventListener("storage", onStorage);
  window.addEventListener("beforeunload", (event) => {
    if (state === null || !state.changed || labelled(state) === 0) return;
    event.preventDefault();
    event.returnValue = true; // older browsers ask only with it
  });
}

/** In the tab in which they worked, a reload puts annotators back to their task. */
function resume() {
  start();
  let annotator = null;
  try {
    annotator = sessionStorage.getItem(`rlhf-labels ${data.export}`);
    if (annotator !== null && store.read(annotator) === null) annotator = null;
    if (data.server && annotator !== data.server.annotator) annotator = null;
  } catch (error) {
    problem(
      `This browser does not keep labels (${error.name}: ${error.message}). ` +
        "Download them often, and before you close this page.",
    );
  }
  if (annotator !== null) begin(annotator, data.server ? serverLabels() : undefined);
}

wire();
resume();
