// Where a server gave the page to an annotator: the labels go there as they grow, so that they can
// be continued on another computer. data.server: {annotator, post, kept}.

const POST_MS = 500;
const RETRY_MS = 5000;
const KEEPALIVE_BYTES = 60_000; // what browsers send of a page that is closed
let due = null; // timer of the next sending
let posting = false;
let grown = false; // while one was on its way
let known = data.server.kept === null ? "" : data.server.kept.saved; // what the server has

/** Sends the labels soon. */
function send() {
  grown = true;
  clearTimeout(due);
  due = setTimeout(post, POST_MS);
}

async function post() {
  clearTimeout(due);
  due = null;
  if (posting || state === null) return;
  posting = true;
  grown = false;
  const file = labelsFile(data, state);
  const body = JSON.stringify(file);
  try {
    const answer = await fetch(`${data.server.post}?known=${encodeURIComponent(known)}`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      keepalive: body.length < KEEPALIVE_BYTES,
      body,
    });
    if (answer.status === 409) takeOver((await answer.json()).kept);
    else if (!answer.ok) throw new Error((await answer.text()).slice(0, 300));
    else known = file.saved;
    if (!grown && state !== null) {
      state.changed = false;
      problem("");
    }
  } catch (error) {
    problem(
      `The labels could not be saved on the server (${error.message}). This browser keeps them ` +
        "and tries again; don't close the page.",
    );
    grown = true;
    due = setTimeout(post, RETRY_MS);
  }
  posting = false;
  if (grown && due === null) due = setTimeout(post, POST_MS);
}

/** Another computer saved since: its newer labels count, then all go there together. */
function takeOver(kept) {
  merge(state, readFile(data, JSON.stringify(kept)).labels);
  known = kept.saved;
  grown = true;
  if (view === "work") refresh();
}

/** The labels that the server has; none where they don't fit this page. */
function serverLabels() {
  if (data.server.kept === null) return new Map();
  try {
    return readFile(data, JSON.stringify(data.server.kept)).labels;
  } catch (error) {
    problem(`The labels on the server can't be read (${error.message}).`);
    return new Map();
  }
}

/** The first view: the name is the link's. */
function startServed() {
  $("name").value = data.server.annotator;
  $("name").readOnly = true;
  $("kept").hidden = true;
  $("elsewhere").hidden = true;
}

document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "hidden" && due !== null) post();
});
