// What is shown. Texts of the export reach the page through textContent alone, so that markup in
// them has no effect.

const $ = (id) => document.getElementById(id);
const SHORT_TEXT = { left: "Answer 1", tie: "Equal", right: "Answer 2" }; // on narrow screens
const VERDICT_TEXT = {
  left: "Answer 1 is better",
  tie: "Equally good",
  right: "Answer 2 is better",
  skip: "Skipped",
  ranked: "Ranked",
};
const ROLE_TEXT = { user: "User", assistant: "Assistant", system: "System", tool: "Tool" };
const RATING_TEXT = ["very poor", "poor", "fair", "good", "very good"];

/** An element with attributes (one with the value null is left out) and children: elements or plain
 * text. */
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (value !== null) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function button(label, key, attributes, act) {
  const made = make(
    "button",
    { type: "button", ...attributes },
    label,
    key ? make("kbd", { "aria-hidden": "true" }, key) : null,
  );
  made.addEventListener("click", act);
  return made;
}

/** A text as it is: white space and line breaks are kept, each paragraph has its own direction, and
 * the language is unknown. */
function textBlock(text) {
  const shown = text.replace(/\r\n?/g, "\n");
  if (shown.trim() === "")
    return make(
      "p",
      { class: "none" },
      shown === "" ? "This text is empty." : "This text is nothing but white space.",
    );
  return make("div", { class: "text", dir: "auto", lang: "" }, shown);
}

function showInstructions(target, text) {
  const paragraphs = text
    .replace(/\r\n?/g, "\n")
    .split(/\n[ \t]*\n/)
    .filter((part) => part.trim() !== "");
  target.replaceChildren(
    ...paragraphs.map((part) => make("p", { dir: "auto" }, part.replace(/^\n+|\s+$/g, ""))),
  );
}

/** All that a message says: its reasoning, its text, its calls. */
function saidBy(message) {
  const calls = message.tool_calls ?? [];
  return [
    ...(message.reasoning_content ? [`<think>\n${message.reasoning_content}\n</think>`] : []),
    ...(message.content ? [message.content] : []),
    ...calls.map((call) => `<tool_call>\n${JSON.stringify(call.function ?? call)}\n</tool_call>`),
  ].join("\n");
}

/** Radio buttons 1 to 5; choosing the chosen button again removes the rating. */
function ratingScale(place, rating, rate) {
  const steps = RATING_TEXT.map((meaning, i) => {
    const input = make("input", {
      type: "radio",
      name: `rating-${place}`,
      value: String(i + 1),
      "aria-label": `${i + 1}, ${meaning}`,
    });
    input.checked = rating === i + 1;
    input.addEventListener("change", () => rate(place, i + 1));
    input.addEventListener("click", () => {
      if (rating === i + 1) rate(place, null);
    });
    return make(
      "label",
      { title: meaning },
      input,
      make("span", { "aria-hidden": "true" }, String(i + 1)),
    );
  });
  const legend = make(
    "legend",
    {},
    "Rating",
    make("span", { class: "unseen" }, ` of answer ${place + 1}`),
  );
  return make(
    "fieldset",
    { class: "scale", "data-place": String(place) },
    legend,
    make("div", { class: "steps" }, ...steps),
  );
}

/** Buttons for the places of one answer in a ranking. */
function placeButtons(place, label, setRank) {
  const count = label.ranks.length;
  const steps = label.ranks.map((_, i) => {
    const pressed = label.ranks[place] === i + 1;
    const attributes = {
      "aria-pressed": String(pressed),
      "aria-label": `Place ${i + 1} of ${count}`,
      "data-rank": String(i + 1),
    };
    return button(String(i + 1), null, attributes, () => setRank(place, pressed ? null : i + 1));
  });
  const caption = make("span", { class: "caption", "aria-hidden": "true" }, "Place");
  return make(
    "div",
    { class: "places", role: "group", "aria-label": `Place of answer ${place + 1}, 1 is the best` },
    caption,
    ...steps,
  );
}

function answerCard(data, place, text, label, act) {
  const heading = make("h2", { id: `answer-${place}` }, `Answer ${place + 1}`);
  if (data.kind === "ranking" && place < 9)
    heading.append(" ", make("kbd", { "aria-hidden": "true" }, String(place + 1)));
  const chosen =
    data.kind === "pair" && (label.verdict === ["left", "right"][place] || label.verdict === "tie");
  const badge = chosen
    ? make("span", { class: "badge" }, label.verdict === "tie" ? "Equally good" : "Better")
    : null;
  const places = data.kind === "ranking" ? placeButtons(place, label, act.setRank) : null;
  const head = make("div", { class: "title" }, heading, badge, places);
  const rating = data.ratings ? ratingScale(place, label.ratings[place], act.rate) : null;
  return make(
    "article",
    { class: chosen ? "answer chosen" : "answer", "aria-labelledby": `answer-${place}` },
    head,
    textBlock(text),
    rating,
  );
}

function orderText(ranks) {
  const groups = grouped(ranks);
  return (
    groups.map((group) => group.map((place) => place + 1).join(" = ")).join(" > ") ||
    "Place the best answer first"
  );
}

function choiceButton(verdict, label, key, attributes, act) {
  const pressed = { "aria-pressed": String(label.verdict === verdict), "data-verdict": verdict };
  const made = button(
    make("span", { class: "long" }, VERDICT_TEXT[verdict]),
    key,
    { ...pressed, ...attributes },
    () => act.choose(verdict),
  );
  made.prepend(make("span", { class: "short" }, SHORT_TEXT[verdict]));
  return made;
}

/** The bar of buttons below. */
function showActions(data, state, label, act) {
  const skip = button(
    "Skip",
    "s",
    { "aria-pressed": String(label.verdict === "skip"), "data-verdict": "skip" },
    () => act.choose("skip"),
  );
  const undo = button(
    "Undo",
    "u",
    { "data-act": "undo", disabled: state.undo.length ? null : "" },
    act.undo,
  );
  const back = button(
    "Back",
    "p",
    { "data-act": "back", disabled: state.at ? null : "" },
    act.back,
  );
  const after = make(
    "div",
    { class: "side" },
    skip,
    button("Next", "Enter", { "data-act": "next" }, act.next),
  );
  const main = make("div", { class: "main" });
  if (data.kind === "pair") {
    main.append(
      choiceButton("left", label, "1", { class: "choice" }, act),
      choiceButton("tie", label, "0", {}, act),
    );
    main.append(choiceButton("right", label, "2", { class: "choice" }, act));
  } else {
    const order = make(
      "p",
      { id: "order", "aria-label": `Order, the best first: ${orderText(label.ranks)}` },
      orderText(label.ranks),
    );
    main.append(
      button("All equal", "0", { "data-act": "equal" }, act.equal),
      order,
      button("Clear", "x", { "data-act": "clear" }, act.clear),
    );
  }
  $("buttons").replaceChildren(make("div", { class: "side" }, undo, back), main, after);
}

/** How far a task is, in a word or two; "" where nothing was done. */
function standing(label) {
  if (!label) return "";
  if (label.verdict !== null) return VERDICT_TEXT[label.verdict];
  return label.comment || [...label.ranks, ...label.ratings].some((given) => given !== null)
    ? "Unfinished"
    : "";
}

function showWork(data, state, act) {
  document.body.classList.toggle("fixed", state.fixed);
  const task = data.tasks[state.at];
  const label = state.labels.get(task.id) ?? blank(task.shown.length);
  $("position").textContent = `Task ${state.at + 1} of ${data.tasks.length}`;
  $("state").textContent = standing(label);
  $("answers").replaceChildren(
    ...task.shown.map((text, place) => answerCard(data, place, text, label, act)),
  );
  $("remark").hidden = !data.comments;
  if ($("comment").value !== label.comment) $("comment").value = label.comment;
  showActions(data, state, label, act);
}

function showProgress(data, state) {
  const total = data.tasks.length;
  const done = labelled(state);
  $("progress").max = total;
  $("progress").value = done;
  $("count").replaceChildren(
    `${done} of ${total}`,
    make("span", { class: "long" }, " labelled"),
    `, ${total - done} left`,
  );
  document.title = `${done}/${total} labelled`;
  $("download").disabled = done === 0;
}

function labelled(state) {
  return [...state.labels.values()].filter((label) => label.verdict !== null).length;
}

function showDone(data, state) {
  const total = data.tasks.length;
  const left = total - labelled(state);
  const skipped = [...state.labels.values()].filter((label) => label.verdict === "skip").length;
  $("done-title").textContent = left ? "You reached the last task" : "All done, thank you";
  const facts = left
    ? `${left} of ${total} tasks have no label yet.`
    : `All ${total} tasks have a label${skipped ? `, ${skipped} of them skipped` : ""}.`;
  $("done-facts").textContent = facts;
  const handOver =
    "Download your labels file and hand it to the person who gave you this page. " +
    "Until then your labels are in this browser only.";
  $("done-next").textContent = state.changed
    ? handOver
    : "Your labels file holds all of them. Hand it to the person who gave you this page.";
  $("done-open").hidden = left === 0;
  $("done-download").disabled = left === total;
  $("done-saved").textContent = "";
}

const FILTERS = {
  All: () => true,
  "Without a label": (label) => !label || label.verdict === null,
  Skipped: (label) => label?.verdict === "skip",
  "With a comment": (label) => Boolean(label?.comment),
};

/** The rows of the task list that `filter` lets through. */
function showList(data, state, filter) {
  const names = Object.keys(FILTERS).filter((name) => data.comments || name !== "With a comment");
  const filters = names.map((name) =>
    button(name, null, { "aria-pressed": String(name === filter) }, () =>
      showList(data, state, name),
    ),
  );
  $("filters").replaceChildren(...filters);
  const rows = data.tasks.flatMap((task, i) => {
    const label = state.labels.get(task.id);
    if (!FILTERS[filter](label)) return [];
    const last =
      typeof task.prompt === "string" ? task.prompt : saidBy(task.prompt.at(-1) ?? {});
    const what = make(
      "span",
      { class: "what", dir: "auto", lang: "" },
      last.slice(0, 200).replace(/\s+/g, " "),
    );
    const row = make("button", {
      type: "button",
      "data-index": String(i),
      "aria-current": i === state.at ? "true" : null,
    });
    row.append(
      make("span", { class: "number" }, String(i + 1)),
      what,
      make("span", { class: "sign" }, standing(label)),
    );
    return [make("li", {}, row)];
  });
  $("tasks").replaceChildren(...rows);
  $("list-none").hidden = rows.length > 0;
}

const PAIR_KEYS = [
  [["1", "←"], "Answer 1 is better"],
  [["2", "→"], "Answer 2 is better"],
  [["0", "t"], "Equally good"],
];
const RANKING_KEYS = [
  [
    ["1", "2", "…"],
    "Give this answer the next place: press the best first. Press again to take it out",
  ],
  [["t"], "The next answer is as good as the one before"],
  [["0"], "All equal"],
  [["x"], "Clear the order"],
];

/** (keys, what they do) for this export. */
function keyTable(data) {
  const rows = [
    ...(data.kind === "pair" ? PAIR_KEYS : RANKING_KEYS),
    [["s"], "Skip: you looked and can't or won't say"],
  ];
  rows.push(
    [["Enter"], "Next task"],
    [["p"], "Back to the task before"],
    [["u", "⌫"], "Undo the last choice"],
  );
  if (data.ratings) rows.push([["r"], "Rate: then 1 to 5 for each answer"]);
  if (data.comments) rows.push([["c"], "Write a comment; Esc leaves it"]);
  rows.push(
    [["n"], "Next task without a label"],
    [["l"], "List of tasks"],
    [["f"], "Fixed-width letters, for code and tables"],
    [["d"], "Download the labels"],
    [["?"], "This help"],
  );
  return rows;
}

function showHelp(data, state) {
  $("help-instructions-part").hidden = data.instructions.trim() === "";
  showInstructions($("help-instructions"), data.instructions);
  const rows = keyTable(data).flatMap(([keys, meaning]) => [
    make("dt", {}, ...keys.map((key) => make("kbd", {}, key))),
    make("dd", {}, meaning),
  ]);
  $("keys").replaceChildren(...rows);
  $("idle").textContent = String(IDLE_SECONDS);
  $("advance-row").hidden = data.kind !== "pair";
  $("advance").checked = state.advance;
  $("shortcuts").checked = state.keys;
  $("fixed").checked = state.fixed;
  $("help-who").replaceChildren("You label as ", make("bdi", {}, state.annotator), ".");
}
