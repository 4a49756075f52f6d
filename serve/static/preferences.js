// The preferences panel of the demo page: a form over GET and PATCH /api/notifications/preferences.
//
// It shows what holds, the tenant's defaults included, and sends of each change that change alone (a JSON merge patch): what
// the user does not touch stays the tenant's to decide. A change is saved at once; if the server refuses it, the form
// shows again what holds, and says why.

const TYPES = { demo: "Events of the form above" };
const CHANNELS = { in_app: "In this page", push: "Push to phones", email: "E-mail", sms: "SMS", webhook: "Webhook", chat: "Chat" };
/** Channels whose look the panel offers, and what of it. */
const LOOKS = { in_app: ["sound", "vibration"], push: ["sound", "vibration", "badge"] };
const SOUNDS = { true: "Sound", bell: "Bell", chime: "Chime", false: "No sound" };
const CATEGORIES = ["social", "marketing", "security"];
/** Channels that a category has switches for. */
const OF_CATEGORY = { in_app: "Page", push: "Push", email: "E-mail", sms: "SMS" };
const PRIORITIES = { "": "as sent", low: "low", normal: "normal", high: "high", urgent: "urgent" };
const DAYS = { mon: "Mo", tue: "Tu", wed: "We", thu: "Th", fri: "Fr", sat: "Sa", sun: "Su" };

/** Sets the panel up. `root`: the form; `say(text, bad)`: shows a line; `token()`: the present user's token. */
export function preferencesPanel(root, { say, token }) {
  const field = (name) => root.elements.namedItem(name);
  const part = (name) => root.querySelector(`[data-${name}]`);
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone || "UTC";
  let kept = null;   // what holds, as the server told it last
  let added = [];    // categories that have a line and no word yet
  let round = 0;     // answers for a user who is not shown any more are dropped

  part("types").replaceChildren(...Object.entries(TYPES).map(([type, label]) => check(`type.${type}`, label)));
  part("days").replaceChildren(...Object.entries(DAYS).map(([day, label]) => {
    const one = check(`day.${day}`, label);
    one.classList.add("day");
    return one;
  }));
  part("channels").replaceChildren(...Object.entries(CHANNELS).map(([channel, label]) => {
    const looks = (LOOKS[channel] ?? []).map((look) => look === "sound"
      ? select(`${channel}.sound`, SOUNDS, `Sound: ${label}`)
      : check(`${channel}.${look}`, { vibration: "Vibration", badge: "Badge" }[look]));
    if (channel === "sms") looks.push(check("sms.emergencyOnly", "Urgent ones only"));
    return make("div", "row line", check(channel, label), make("span", "row looks", ...looks));
  }));

  async function call(method, body) {
    const response = await fetch("/api/notifications/preferences", {
      method,
      headers: { Authorization: `Bearer ${await token()}`, ...(body && { "Content-Type": "application/merge-patch+json" }) },
      body: body && JSON.stringify(body),
    });
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) throw new Error(answer.detail || answer.title || `HTTP ${response.status}`);
    return answer;
  }

  /** Make the controls show a document. */
  function show(doc) {
    kept = doc;
    field("global").checked = doc.global;
    for (const channel of Object.keys(CHANNELS)) {
      field(channel).checked = isOn(doc.channels[channel]);
      for (const look of LOOKS[channel] ?? []) {
        const word = long(doc.channels[channel])[look] ?? doc[look];
        if (look === "sound") choose(field(`${channel}.sound`), String(word));
        else field(`${channel}.${look}`).checked = word;
      }
    }
    field("sms.emergencyOnly").checked = Boolean(long(doc.channels.sms).emergencyOnly);
    const { durationMs, autoDismiss } = long(doc.channels.in_app);
    field("in_app.durationMs").value = durationMs === undefined ? "" : durationMs / 1000;
    field("in_app.autoDismiss").checked = autoDismiss ?? true;
    for (const type of Object.keys(TYPES)) field(`type.${type}`).checked = isOn(doc.types[type]);
    showCategories(doc);
    const quiet = doc.quietHours;
    field("quiet").checked = Boolean(quiet && quiet.enabled !== false);
    field("start").value = quiet?.start ?? "22:00";
    field("end").value = quiet?.end ?? "07:00";
    for (const day of Object.keys(DAYS)) field(`day.${day}`).checked = quiet?.days?.includes(day) ?? true;
    const digest = typeof doc.digest === "string" ? { frequency: doc.digest } : doc.digest;
    field("digest").value = digest.frequency === "instant" ? "off" : digest.frequency;
    field("at").value = digest.at ?? "08:00";
    field("on").value = digest.day ?? "mon";
    const until = doc.doNotDisturbUntil && Date.parse(doc.doNotDisturbUntil) > Date.now() ? new Date(doc.doNotDisturbUntil) : null;
    part("dnd").textContent = until ? `on until ${until.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })}` : "off";
    part("zone").textContent = quiet?.timezone ?? doc.timezone ?? zone;
    enable();
  }

  /** A line for each category: on or off, its channels, its priority. Lines that stay keep their controls, and the focus. */
  function showCategories(doc) {
    const body = part("categories");
    const names = [...new Set([...CATEGORIES, ...Object.keys(doc.categories), ...added])];
    const lines = new Map([...body.children].map((line) => [line.dataset.category, line]));
    names.forEach((name, at) => {
      if (!lines.has(name)) lines.set(name, categoryLine(name));
      if (body.children[at] !== lines.get(name)) body.insertBefore(lines.get(name), body.children[at] ?? null);
      const entry = long(doc.categories[name]);
      const of = controlsOf(lines.get(name));
      of[""].checked = entry.enabled !== false;
      for (const channel of Object.keys(OF_CATEGORY)) {
        of[channel].checked = entry.channels?.[channel] ?? entry[channel] ?? isOn(doc.channels[channel]);
      }
      of.priority.value = entry.priority === "critical" ? "urgent" : entry.priority ?? "";
    });
    for (const [name, line] of lines) if (!names.includes(name)) line.remove();
  }

  function categoryLine(name) {
    const line = make("tr", "");
    line.dataset.category = name;
    const cells = Object.entries(OF_CATEGORY).map(([channel, label]) => {
      const box = ofCategory(input(`category.${name}.${channel}`), name, channel);
      box.setAttribute("aria-label", `${name}: ${label}`);
      return make("td", "", box);
    });
    const whole = check(`category.${name}`, name);
    ofCategory(whole.querySelector("input"), name);
    const priority = ofCategory(select(`category.${name}.priority`, PRIORITIES, `${name}: priority`), name, "priority");
    line.append(make("th", "", whole), ...cells, make("td", "", priority));
    return line;
  }

  /** Controls that mean nothing while another is off cannot be used. */
  function enable() {
    const on = field("global").checked;
    for (const control of root.elements) control.disabled = !kept || (!on && control.name !== "global");
    const need = (name, needed) => { field(name).disabled ||= !field(needed).checked; };
    for (const name of ["start", "end", ...Object.keys(DAYS).map((day) => `day.${day}`)]) need(name, "quiet");
    for (const [channel, looks] of Object.entries(LOOKS)) for (const look of looks) need(`${channel}.${look}`, channel);
    for (const name of ["in_app.durationMs", "in_app.autoDismiss"]) need(name, "in_app");
    need("in_app.durationMs", "in_app.autoDismiss");
    need("sms.emergencyOnly", "sms");
    for (const line of part("categories").children) {
      const of = controlsOf(line);
      for (const control of Object.values(of)) control.disabled ||= control !== of[""] && !of[""].checked;
    }
    field("at").disabled ||= !["daily", "weekly"].includes(field("digest").value);
    field("on").hidden = field("digest").value !== "weekly";
  }

  /** What a change of one control says, as a patch of the user's words; null: nothing yet. */
  function said(control) {
    const { name, checked, value } = control;
    const [first, ...rest] = name.split(".");
    if (name === "global") return { global: checked };
    if (name in CHANNELS) return { channels: { [name]: { enabled: checked } } };
    if (first === "type") return { types: { [rest[0]]: { enabled: checked } } };
    if (first === "category") return { categories: saidOfCategory(control) };
    if (name === "in_app.durationMs") {
      return control.checkValidity() ? { channels: { in_app: { durationMs: value === "" ? null : Math.round(value * 1000) } } } : null;
    }
    if (first in CHANNELS) return { channels: { [first]: { [rest[0]]: rest[0] === "sound" ? soundOf(value) : checked } } };
    if (["quiet", "start", "end", "day"].includes(first)) {
      const days = Object.keys(DAYS).filter((day) => field(`day.${day}`).checked);
      if (!field("start").value || !field("end").value) return null; // half typed
      return {
        quietHours: {
          timezone: kept.timezone ?? zone, ...kept.quietHours, enabled: field("quiet").checked,
          start: field("start").value, end: field("end").value, days,
        },
      };
    }
    if (["digest", "at", "on"].includes(name)) {
      const frequency = field("digest").value;
      if (!["daily", "weekly"].includes(frequency)) return { digest: frequency };
      if (!field("at").value) return null;
      const digest = { frequency, at: field("at").value, ...(frequency === "weekly" && { day: field("on").value }) };
      return { digest, ...(!kept.timezone && { timezone: zone }) };
    }
    return null;
  }

  function saidOfCategory({ dataset: { category, inside }, checked, value }) {
    const word = !inside ? { enabled: checked } : inside === "priority" ? { priority: value || null } : { channels: { [inside]: checked } };
    return { [category]: word };
  }

  let wanted = [], saving = false;

  /** Save a change; what is changed while another is saved follows in its order: two merge patches are not always one. */
  async function save(patch) {
    wanted.push(patch);
    if (saving) return;
    saving = true;
    while (wanted.length) await send(wanted.shift());
    saving = false;
  }

  async function send(patch) {
    const mine = round;
    say("saving …");
    try {
      const answer = await call("PATCH", patch);
      if (mine !== round) return; // another user's
      kept = answer;
      if (wanted.length) return;  // the form is ahead of the answer
      show(answer);
      say("saved: it holds for the next event");
    } catch (error) {
      if (mine !== round) return;
      wanted = [];
      show(kept);
      say(error.message, true);
    }
  }

  root.addEventListener("change", ({ target }) => {
    const patch = target.name ? said(target) : null;
    enable();
    if (patch) save(patch);
  });
  root.addEventListener("submit", (event) => {
    event.preventDefault();
    const name = field("new").value.trim();
    if (!name || name.length > 64) return;
    field("new").value = "";
    added.push(name);
    showCategories(kept);
    enable();
    controlsOf([...part("categories").children].find((line) => line.dataset.category === name))[""].focus();
  });
  root.addEventListener("click", ({ target }) => {
    const { hours, reset } = target.dataset ?? {};
    if (hours !== undefined) save({ doNotDisturbUntil: Number(hours) ? new Date(Date.now() + hours * 3_600_000).toISOString() : null });
    // Null takes a word out: what is left is the tenant's.
    if (reset !== undefined) save(Object.fromEntries(Object.keys(kept).map((name) => [name, null])));
  });

  /** Show the present user's preferences. */
  async function load() {
    const mine = ++round;
    kept = null;
    wanted = [];
    added = [];
    enable();
    say("");
    try {
      const answer = await call("GET");
      if (mine === round) show(answer);
    } catch (error) {
      if (mine === round) say(error.message, true);
    }
  }
  return load;
}

// ---------------------------------------------------------------- words

/** A switch in its long form. */
const long = (rule) => (rule && typeof rule === "object" ? rule : rule === undefined ? {} : { enabled: rule });
const isOn = (rule) => long(rule).enabled !== false;
const soundOf = (value) => ({ true: true, false: false })[value] ?? value;

// ---------------------------------------------------------------- controls

function make(tag, className, ...children) {
  const node = Object.assign(document.createElement(tag), { className });
  node.append(...children);
  return node;
}

const input = (name) => Object.assign(document.createElement("input"), { type: "checkbox", name });

/** The name of a category may have dots in it, and look like that of a channel: a control knows whose it is. */
function ofCategory(control, category, inside = "") {
  Object.assign(control.dataset, { category, inside });
  return control;
}

/** The controls of a category's line by what they are about; "": all of it. */
const controlsOf = (line) => Object.fromEntries([...line.querySelectorAll("input, select")].map((one) => [one.dataset.inside, one]));

const check = (name, label) => make("label", "check", input(name), label);

function select(name, options, label) {
  const node = Object.assign(make("select", "time"), { name });
  node.append(...Object.entries(options).map(([value, text]) => Object.assign(document.createElement("option"), { value, textContent: text })));
  node.setAttribute("aria-label", label);
  return node;
}

/** Choose a value; one that is not among the options is added to them. */
function choose(node, value) {
  if (![...node.options].some((option) => option.value === value)) node.append(new Option(value, value));
  node.value = value;
}
