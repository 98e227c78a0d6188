"use strict";
// The labels of one annotator: in memory, in this browser, and in the labels file. Nothing here
// touches the page.

const FORMAT = "rlhf-labels"; // as rlhf/labels/targets/page.py reads it
const VERSION = 1;
const IDLE_SECONDS = 60; // a pause counts for no more
const UNDO_STEPS = 200;
const CHOICES = { pair: ["left", "tie", "right", "skip"], ranking: ["ranked", "skip"] };

/** The empty label of a task with `count` answers. verdict: null while it is not labelled; ranks,
 * ratings: by place as shown; seconds: spent on the task so far; took: those until the verdict. */
function blank(count) {
  return {
    verdict: null,
    ranks: Array(count).fill(null),
    ratings: Array(count).fill(null),
    comment: "",
    seconds: 0,
    took: null,
    time: null,
  };
}

/** Places grouped by rank, the best first: [null, 1, 1, 3] -> [[1, 2], [3]]. */
function grouped(ranks) {
  const used = [...new Set(ranks.filter((rank) => rank !== null))].sort((a, b) => a - b);
  return used.map((rank) => ranks.flatMap((given, place) => (given === rank ? [place] : [])));
}

/** The inverse: ranks without gaps. */
function ranksOf(groups, count) {
  const ranks = Array(count).fill(null);
  groups.forEach((group, i) =>
    group.forEach((place) => {
      ranks[place] = i + 1;
    }),
  );
  return ranks;
}

/** The lowest rank that no answer has. */
function freeRank(ranks) {
  let rank = 1;
  while (ranks.includes(rank)) rank += 1;
  return rank;
}

function highestRank(ranks) {
  return Math.max(0, ...ranks) || null;
}

/** Seconds between start() and stop(), pauses between two mark()s cut at IDLE_SECONDS. */
class Clock {
  constructor() {
    this.last = null; // when time was last counted; null while the clock is stopped
    this.ms = 0;
  }
  start() {
    if (this.last === null) this.last = performance.now();
  }
  mark() {
    if (this.last === null) return;
    const now = performance.now();
    this.ms += Math.min(now - this.last, IDLE_SECONDS * 1000);
    this.last = now;
  }
  stop() {
    this.mark();
    this.last = null;
  }
  /** What was measured since the last take(). */
  take() {
    this.mark();
    const seconds = this.ms / 1000;
    this.ms = 0;
    return seconds;
  }
}

/** One annotator's work. at: the task in view; labels: by task id; undo: what can be undone;
 * changed: whether a label is in no file yet; advance, keys, fixed: the settings. */
function newState(data, annotator) {
  const advance = data.kind === "pair" && !data.ratings;
  return {
    annotator,
    at: 0,
    labels: new Map(),
    undo: [],
    changed: false,
    advance,
    keys: true,
    fixed: false,
  };
}

function stateText(state) {
  return JSON.stringify({ ...state, labels: [...state.labels] });
}

/** Throws where `text` is not what stateText wrote for this page. */
function stateOf(data, annotator, text) {
  const known = new Map(data.tasks.map((task) => [task.id, task]));
  const read = JSON.parse(text);
  const labels = new Map(read.labels);
  const fits = ([id, label]) =>
    known.has(id) &&
    label.ranks.length === known.get(id).shown.length &&
    typeof label.comment === "string";
  const whole =
    Number.isInteger(read.at) &&
    Array.isArray(read.undo) &&
    read.undo.every((step) => labels.has(step.task));
  if (!whole || ![...labels].every(fits)) throw new Error("it does not fit this page");
  return { ...newState(data, annotator), ...read, annotator, labels };
}

/** The browser's storage, a key for each annotator of this export. It may be full, forbidden or
 * emptied: every call can throw. */
class Store {
  constructor(exportId) {
    this.prefix = `rlhf-labels ${exportId} `;
  }
  key(annotator) {
    return this.prefix + annotator;
  }
  annotators() {
    const keys = Array.from({ length: localStorage.length }, (_, i) => localStorage.key(i));
    return keys
      .filter((key) => key.startsWith(this.prefix))
      .map((key) => key.slice(this.prefix.length))
      .sort();
  }
  read(annotator) {
    return localStorage.getItem(this.key(annotator));
  }
  write(annotator, text) {
    localStorage.setItem(this.key(annotator), text);
  }
  /** What can't be read is kept under another name, since the next write would destroy it. */
  putAside(annotator, text) {
    localStorage.setItem(`unreadable ${this.key(annotator)} ${new Date().toISOString()}`, text);
  }
}

/** The labels file. Tasks without a verdict are not in it. */
function labelsFile(data, state) {
  const labels = [];
  for (const task of data.tasks) {
    const label = state.labels.get(task.id);
    if (!label || label.verdict === null) continue;
    labels.push({
      task: task.id,
      verdict: label.verdict,
      ranking: label.verdict === "ranked" ? grouped(label.ranks) : [],
      ratings: label.ratings.some((rating) => rating !== null) ? label.ratings : [],
      comment: label.comment,
      seconds: Math.round(label.took * 100) / 100,
      time: label.time,
      prompt: task.prompt,
      ...(task.tools ? { tools: task.tools } : {}),
      shown: task.shown,
    });
  }
  return {
    format: FORMAT,
    version: VERSION,
    export: data.export,
    annotator: state.annotator,
    saved: new Date().toISOString(),
    labels,
  };
}

function fileName(data, annotator) {
  const name = annotator.replace(/[^\p{L}\p{N}_-]+/gu, "-").replace(/^-+|-+$/g, "");
  return `labels-${data.export}-${name || "annotator"}.json`;
}

/** {annotator, labels: Map, refused} of a labels file's text; refused: how many labels don't fit
 * this page. Throws an error whose message is for the annotator. */
function readFile(data, text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch (error) {
    throw new Error(`This is no labels file: ${error.message}`);
  }
  if (file === null || typeof file !== "object" || file.format !== FORMAT)
    throw new Error("This is no labels file of such a page.");
  if (file.version !== VERSION)
    throw new Error(
      `This labels file has version ${file.version}, this page reads version ${VERSION}.`,
    );
  if (file.export !== data.export)
    throw new Error(
      `This labels file belongs to the tasks ${file.export}, this page holds ${data.export}.`,
    );
  const annotator = tidyName(file.annotator);
  if (!annotator || !Array.isArray(file.labels))
    throw new Error("This labels file is damaged: it has no name or no labels.");
  const known = new Map(data.tasks.map((task) => [task.id, task]));
  const labels = new Map();
  for (const entry of file.labels) {
    const task = known.get(entry?.task);
    const label = task && labelOf(data, task, entry);
    if (label) labels.set(task.id, label);
  }
  return { annotator, labels, refused: file.labels.length - labels.size };
}

/** A label of the file, or null where it does not fit the task. */
function labelOf(data, task, entry) {
  const count = task.shown.length;
  const same =
    JSON.stringify([entry.prompt, entry.tools, entry.shown]) ===
    JSON.stringify([task.prompt, task.tools, task.shown]);
  if (!same || !CHOICES[data.kind].includes(entry.verdict)) return null;
  const label = blank(count);
  if (entry.verdict === "ranked") {
    const places =
      Array.isArray(entry.ranking) && entry.ranking.every(Array.isArray)
        ? entry.ranking.flat()
        : [];
    if (places.length !== count || !label.ranks.every((_, place) => places.includes(place)))
      return null;
    label.ranks = ranksOf(entry.ranking, count);
  }
  const ratings =
    Array.isArray(entry.ratings) && entry.ratings.length ? entry.ratings : label.ratings;
  const rated = (rating) =>
    rating === null || (Number.isInteger(rating) && rating >= 1 && rating <= 5);
  if (ratings.length !== count || !ratings.every(rated)) return null;
  if (
    typeof entry.comment !== "string" ||
    typeof entry.time !== "string" ||
    !Number.isFinite(entry.seconds)
  )
    return null;
  return {
    ...label,
    verdict: entry.verdict,
    ratings: [...ratings],
    comment: entry.comment,
    seconds: entry.seconds,
    took: entry.seconds,
    time: entry.time,
  };
}

/** Takes labels that are newer than those of `state` into it; returns how many. */
function merge(state, labels) {
  let taken = 0;
  for (const [id, label] of labels) {
    const own = state.labels.get(id);
    if (own && own.verdict !== null && own.time >= label.time) continue;
    state.labels.set(id, label);
    taken += 1;
  }
  return taken;
}

/** One spelling of a name, however its spaces and accents were typed; "" where there is none. */
function tidyName(name) {
  return typeof name === "string" ? name.normalize("NFC").replace(/\s+/gu, " ").trim() : "";
}
