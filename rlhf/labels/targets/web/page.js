// What the annotator does: keys, buttons, files. One of three views is open: start, work, done.

const data = JSON.parse($("data").textContent);
const store = new Store(data.export);
const clock = new Clock();
// so that the choice is seen before the next task comes, and a second press does not label that one
// unread
const ADVANCE_MS = 200;
const SAVE_MS = 400;
let state = null; // of the annotator who labels now
let view = "start";
let advancing = null; // timer of the way to the next task
let saving = null; // timer of a save while a comment is typed
let pointed = false; // whether a pointer was used last, not a key
let tying = false; // the next answer of a ranking gets the place of the one before
let lastRank = null; // the rank that was given last in this ranking

// ---- state ----

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = text === "";
}

function announce(text) {
  $("announcement").textContent = text;
}

function task() {
  return data.tasks[state.at];
}

function labelHere() {
  const { id, shown } = task();
  if (!state.labels.has(id)) state.labels.set(id, blank(shown.length));
  return state.labels.get(id);
}

/** Saves now. Where the browser can't keep labels, a message says so; the download still works. */
function save() {
  clearTimeout(saving);
  saving = null;
  if (state === null) return;
  if (data.server) send();
  try {
    store.write(state.annotator, stateText(state));
    if (!data.server) problem("");
  } catch (error) {
    problem(
      `This browser does not keep your labels (${error.name}: ${error.message}). ` +
        "Download them often, and before you close this page.",
    );
  }
}

/** Adds the time measured so far to the task in view. */
function countTime() {
  const seconds = clock.take();
  if (view === "work") labelHere().seconds += seconds;
}

function setClock() {
  const runs =
    view === "work" &&
    document.visibilityState === "visible" &&
    document.querySelector("dialog[open]") === null;
  if (runs) clock.start();
  else clock.stop();
}

/** A label changed: it is newer than any file. */
function touch(label) {
  if (label.verdict === null) return;
  label.time = new Date().toISOString();
  state.changed = true;
}

function snapshot(label) {
  const { verdict, ranks, took, time } = label;
  return { verdict, ranks: [...ranks], took, time };
}

/** Changes the verdict or ranks of the label in view by `change`, so that it can be undone. */
function decide(change) {
  countTime();
  const label = labelHere();
  const before = snapshot(label);
  change(label);
  if (
    JSON.stringify([before.verdict, before.ranks]) !== JSON.stringify([label.verdict, label.ranks])
  ) {
    state.undo.push({ task: task().id, before });
    state.undo.splice(0, state.undo.length - UNDO_STEPS);
    state.changed = true;
  }
  label.took = label.seconds;
  touch(label);
  save();
  refresh();
}

// ---- views ----

function show(name) {
  view = name;
  for (const id of ["start", "work", "done"]) $(id).hidden = id !== name;
  $("bar").hidden = name === "start";
  $("actions").hidden = name !== "work";
  setClock();
}

/** Draws the task in view again; the focus stays on the control that has it. */
function refresh() {
  const held = document.activeElement;
  const root = ["answers", "buttons"].map($).find((part) => part.contains(held));
  const place = root ? controls(root).indexOf(held) : -1;
  showWork(data, state, acts);
  showProgress(data, state);
  if (place >= 0) controls(root)[place].focus({ preventScroll: true });
}

function controls(root) {
  return [...root.querySelectorAll("button, input")];
}

/** Opens task number `index`; after the last one comes the closing view. */
function go(index) {
  stopAdvancing();
  countTime();
  tying = false;
  state.at = Math.max(0, Math.min(index, data.tasks.length));
  save();
  if (state.at === data.tasks.length) {
    show("done");
    showDone(data, state);
    showProgress(data, state);
    $("done-title").focus();
    return;
  }
  lastRank = highestRank(labelHere().ranks);
  show("work");
  showWork(data, state, acts);
  showPrompt(task());
  showProgress(data, state);
  $("position").focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

/** The next task without a label, after the last one from the top again; the number of the closing
 * view where there is none. */
function nextOpen(from) {
  const total = data.tasks.length;
  for (let step = 0; step < total; step += 1) {
    const index = (from + step) % total;
    const label = state.labels.get(data.tasks[index].id);
    if (!label || label.verdict === null) return index;
  }
  return total;
}

function stopAdvancing() {
  clearTimeout(advancing);
  advancing = null;
}

function advance() {
  advancing = setTimeout(() => go(nextOpen(state.at + 1)), ADVANCE_MS);
}

// ---- choices ----

const acts = {
  choose(verdict) {
    if (advancing !== null) return;
    decide((label) => {
      label.verdict = verdict;
      label.ranks.fill(null);
    });
    announce(`Task ${state.at + 1}: ${VERDICT_TEXT[verdict]}`);
    if (state.advance || verdict === "skip") advance();
  },

  setRank(place, rank) {
    if (advancing !== null) return;
    decide((label) => {
      label.ranks[place] = rank;
      label.verdict = label.ranks.includes(null) ? null : "ranked";
    });
    if (rank !== null) lastRank = rank;
    announce(
      rank === null ? `Answer ${place + 1} has no place` : `Answer ${place + 1} has place ${rank}`,
    );
  },

  /** The next place for an answer, or none for one that has a place. */
  place(place) {
    const { ranks } = labelHere();
    const tied = tying && lastRank !== null;
    tying = false;
    if (place < ranks.length)
      acts.setRank(place, ranks[place] !== null ? null : tied ? lastRank : freeRank(ranks));
  },

  equal() {
    decide((label) => {
      label.ranks.fill(1);
      label.verdict = "ranked";
    });
    lastRank = 1;
    announce("All answers are equal");
  },

  clear() {
    decide((label) => {
      label.ranks.fill(null);
      label.verdict = null;
    });
    tying = false;
    lastRank = null;
    announce("The order is empty");
  },

  tie() {
    if (data.kind === "pair") return acts.choose("tie");
    tying = lastRank !== null;
    announce(tying ? "The next answer is as good as the one before" : "Place one answer first");
  },

  undo() {
    stopAdvancing();
    const step = state.undo.pop();
    if (!step) return announce("There is nothing to undo");
    Object.assign(state.labels.get(step.task), step.before);
    state.changed = true;
    const index = data.tasks.findIndex(({ id }) => id === step.task);
    if (view === "work" && index === state.at) {
      save();
      refresh();
    } else {
      go(index);
    }
    lastRank = highestRank(labelHere().ranks);
    announce(`Task ${index + 1}: undone`);
  },

  next() {
    if (advancing !== null) return;
    const label = labelHere();
    if (
      data.kind === "ranking" &&
      label.verdict === null &&
      label.ranks.some((rank) => rank !== null)
    ) {
      return announce("Some answers have no place yet: give each one, or skip the task");
    }
    announce(label.verdict === null ? `Task ${state.at + 1} is left without a label` : "");
    go(state.at + 1);
  },

  back() {
    announce("");
    go(state.at - 1);
  },

  fix() {
    state.fixed = !state.fixed;
    save();
    refresh();
  },

  rate(place, rating) {
    const label = labelHere();
    label.ratings[place] = rating;
    touch(label);
    save();
    refresh();
  },
};

// ---- files ----

function download() {
  if (labelled(state) === 0) return;
  countTime();
  const name = fileName(data, state.annotator);
  const url = URL.createObjectURL(
    new Blob([JSON.stringify(labelsFile(data, state), null, 1)], { type: "application/json" }),
  );
  const link = make("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
  state.changed = false;
  save();
  if (view === "done") showDone(data, state);
  const message = `${labelled(state)} labels went to your downloads as ${name}`;
  announce(message);
  $("done-saved").textContent = message;
}

/** Opens the work of `annotator`: what this browser keeps of it, and `labels` of a file. Throws
 * nothing: problems are shown. */
function begin(annotator, labels = new Map(), note = "") {
  let message = note;
  state = newState(data, annotator);
  let kept = null;
  try {
    kept = store.read(annotator);
    if (kept !== null) state = stateOf(data, annotator, kept);
  } catch (error) {
    const reason = `What this browser kept under your name can't be read (${error.message})`;
    message = `${note} ${reason}; it was put aside.`.trim();
    try {
      if (kept !== null) store.putAside(annotator, kept);
    } catch (failure) {
      message += ` It could not be put aside: ${failure.message}.`;
    }
  }
  const before = labelled(state);
  const taken = merge(state, labels);
  if (taken) state.changed = state.changed || before > 0;
  try {
    sessionStorage.setItem(`rlhf-labels ${data.export}`, annotator);
  } catch (error) {
    message = `${message} A reload will ask for your name again (${error.name}).`.trim();
  }
  go(taken ? nextOpen(0) : Math.min(state.at, data.tasks.length));
  announce(message || (before ? `Welcome back: ${before} labels are here` : ""));
}

async function openFile(file) {
  $("file-error").hidden = true;
  try {
    const { annotator, labels, refused } = readFile(data, await file.text());
    const left = refused ? ` ${refused} did not fit this page and were left out.` : "";
    begin(annotator, labels, `${labels.size} labels were read from the file.${left}`);
  } catch (error) {
    $("file-error").textContent = error.message;
    $("file-error").hidden = false;
  }
}

/** The names under which this browser keeps labels of this export. */
function showKept() {
  let names = [];
  try {
    names = store.annotators();
  } catch (error) {
    problem(
      `This browser does not keep labels (${error.name}: ${error.message}). ` +
        "Download them often, and before you close this page.",
    );
  }
  const rows = names.map((name) =>
    make(
      "li",
      {},
      button(make("bdi", {}, name), "Continue", {}, () => begin(name)),
    ),
  );
  $("kept-names").replaceChildren(...rows);
  $("kept").hidden = names.length === 0;
}

function start() {
  state = null;
  show("start");
  const what = data.kind === "pair" ? "pairs of answers" : "groups of answers to rank";
  $("start-title").textContent = data.title;
  $("bar-title").textContent = data.title;
  $("start-facts").textContent = `${data.tasks.length} ${what}`;
  showInstructions($("start-instructions"), data.instructions);
  showKept();
  document.title = "Labelling";
  if (data.server) startServed();
  $("name").focus();
}
