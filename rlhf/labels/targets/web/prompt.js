// The prompt in its box: functions, then the turns of a chat or the text.

function turnOf(message) {
  const role = make("p", { class: "role" }, ROLE_TEXT[message.role] ?? message.role);
  return make(
    "div",
    { class: message.role === "user" ? "turn user" : "turn" },
    role,
    textBlock(saidBy(message)),
  );
}

/** The functions that the answers may call, as the template shows them: before all turns. */
function functionsOf(tools) {
  const role = make("p", { class: "role" }, "Functions that the answers may call");
  return make("div", { class: "turn" }, role, textBlock(JSON.stringify(tools, null, 2)));
}

/** A long prompt gets a box of its own; a chat starts at its last turn. */
function showPrompt({ prompt, tools }) {
  const turns = $("turns");
  turns.replaceChildren(
    ...(tools ? [functionsOf(tools)] : []),
    ...(typeof prompt === "string" ? [textBlock(prompt)] : prompt.map(turnOf)),
  );
  unfold(false);
  turns.scrollTop = typeof prompt === "string" ? 0 : turns.scrollHeight;
}

function unfold(whole) {
  const turns = $("turns");
  turns.classList.toggle("whole", whole);
  const long = whole || turns.scrollHeight > turns.clientHeight + 1;
  const control = $("unfold");
  control.hidden = !long;
  control.textContent = whole ? "Show less of the prompt" : "Show the whole prompt";
  control.setAttribute("aria-expanded", String(whole));
  if (long && !whole) turns.setAttribute("tabindex", "0");
  else turns.removeAttribute("tabindex");
}
