// The preferences panel of the demo page: a form over GET and PUT /api/notifications/preferences.
//
// The document is replaced as a whole, so members that have no control here travel back as they came. A change is
// saved at once; if the server refuses it, the form shows again what holds, and says why.

const TYPES = { demo: "Events of the form above" };

/** Sets the panel up. `root`: the form; `say(text, bad)`: shows a line; `token()`: the present user's token. */
export function preferencesPanel(root, { say, token }) {
  const field = (name) => root.elements.namedItem(name);
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone || "UTC";
  let kept = null;   // the document as the server told it last
  let version = null; // its ETag: another device's change is not overwritten unseen
  let round = 0;     // answers for a user who is not shown any more are dropped

  root.querySelector("[data-types]").replaceChildren(...Object.entries(TYPES).map(([type, label]) => {
    const input = Object.assign(document.createElement("input"), { type: "checkbox", name: `type.${type}` });
    const line = document.createElement("label");
    line.className = "check";
    line.append(input, label);
    return line;
  }));

  async function call(method, body) {
    const response = await fetch("/api/notifications/preferences", {
      method,
      headers: { Authorization: `Bearer ${await token()}`, ...(body && { "Content-Type": "application/json", "If-Match": version }) },
      body: body && JSON.stringify(body),
    });
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) {
      throw Object.assign(new Error(answer.detail || answer.title || `HTTP ${response.status}`), { status: response.status });
    }
    return { document: answer, etag: response.headers.get("ETag") };
  }

  /** Make the controls show a document. */
  function show({ document: doc, etag }) {
    kept = doc;
    version = etag;
    field("global").checked = doc.global;
    for (const channel of ["in_app", "push"]) field(channel).checked = isOn(doc.channels[channel]);
    for (const type of Object.keys(TYPES)) field(`type.${type}`).checked = isOn(doc.types[type]);
    field("sound").checked = doc.sound !== false;
    const quiet = doc.quietHours;
    field("quiet").checked = Boolean(quiet && quiet.enabled !== false);
    field("start").value = quiet?.start ?? "22:00";
    field("end").value = quiet?.end ?? "07:00";
    const digest = typeof doc.digest === "string" ? { frequency: doc.digest } : doc.digest;
    field("digest").value = digest.frequency === "instant" ? "off" : digest.frequency;
    field("at").value = digest.at ?? "08:00";
    const until = doc.doNotDisturbUntil && Date.parse(doc.doNotDisturbUntil) > Date.now() ? new Date(doc.doNotDisturbUntil) : null;
    root.querySelector("[data-dnd]").textContent = until ? `on until ${until.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })}` : "off";
    root.querySelector("[data-zone]").textContent = quiet?.timezone ?? doc.timezone ?? zone;
    enable();
  }

  /** Controls that mean nothing while another is off cannot be used. */
  function enable() {
    const on = field("global").checked;
    for (const control of root.elements) control.disabled = !kept || (!on && control.name !== "global");
    for (const name of ["start", "end"]) field(name).disabled ||= !field("quiet").checked;
    field("at").disabled ||= !["daily", "weekly"].includes(field("digest").value);
  }

  /** The document that the controls mean. */
  function read() {
    const doc = structuredClone(kept);
    doc.global = field("global").checked;
    for (const channel of ["in_app", "push"]) doc.channels[channel] = switched(doc.channels[channel], field(channel).checked);
    for (const type of Object.keys(TYPES)) doc.types[type] = switched(doc.types[type], field(`type.${type}`).checked);
    if (!field("sound").checked) doc.sound = false;
    else if (doc.sound === false) doc.sound = true;
    if (field("quiet").checked) {
      doc.quietHours = { timezone: zone, ...doc.quietHours, enabled: true, start: field("start").value, end: field("end").value };
    } else if (doc.quietHours) doc.quietHours.enabled = false;
    const frequency = field("digest").value;
    doc.digest = ["daily", "weekly"].includes(frequency)
      ? { ...(typeof doc.digest === "object" ? doc.digest : {}), frequency, at: field("at").value } : frequency;
    if (typeof doc.digest === "object") doc.timezone ??= zone;
    return doc;
  }

  let wanted = null, saving = false;

  /** Save a document; while one is being saved only the newest waits. */
  async function save(doc) {
    wanted = doc;
    if (saving) return;
    saving = true;
    while (wanted) {
      const next = wanted;
      wanted = null;
      await put(next);
    }
    saving = false;
  }

  async function put(doc) {
    const mine = round;
    say("saving …");
    try {
      const answer = await call("PUT", doc);
      if (mine !== round) return;
      version = answer.etag;
      if (wanted) return; // the form is ahead of the answer
      show(answer);
      say("saved: it holds for the next event");
    } catch (error) {
      if (mine !== round) return;
      wanted = null;
      if (error.status === 412) {
        await load();
        say("changed elsewhere meanwhile: this is how it is now", true);
        return;
      }
      show({ document: kept, etag: version });
      say(error.message, true);
    }
  }

  root.addEventListener("change", () => { enable(); save(read()); });
  root.addEventListener("submit", (event) => event.preventDefault());
  root.addEventListener("click", ({ target }) => {
    const hours = target.dataset?.hours;
    if (hours === undefined) return;
    const doc = read();
    doc.doNotDisturbUntil = Number(hours) ? new Date(Date.now() + hours * 3_600_000).toISOString() : null;
    save(doc);
  });

  /** Show the present user's preferences. */
  async function load() {
    const mine = ++round;
    kept = wanted = null;
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

const isOn = (rule) => (rule && typeof rule === "object" ? rule.enabled !== false : rule !== false);

/** A switch of a channel or type, keeping what else is said of it. */
const switched = (rule, on) => (rule && typeof rule === "object" ? { ...rule, enabled: on } : on);
