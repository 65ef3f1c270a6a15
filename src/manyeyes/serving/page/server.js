// Asks the server, and for its token.
"use strict";

class Problem extends Error {
  constructor(title, detail = "", status = 0) { super(title); Object.assign(this, {detail, status}); }
  /** Whether the same request may succeed later. */
  get mayPass() { return this.status === 0 || this.status >= 500; }
}

let tokenAsked = null;
function askToken(isWrong) {
  element("wrong").textContent = isWrong ? "The server did not take this token." : "";
  tokenAsked ??= new Promise(resolve => {
    element("entry").hidden = false;
    element("token").focus();
    element("entry").onsubmit = event => {
      event.preventDefault();
      sessionStorage.setItem(TOKEN_KEY, element("token").value.trim());
      element("entry").hidden = true;
      element("token").value = "";
      tokenAsked = null;
      resolve();
    };
  });
  return tokenAsked;
}

/** Ask the server; when it is busy or wants a token, wait and ask again. Throws Problem, or AbortError. */
async function ask(path, {body, signal} = {}) {
  for (let tries = 1; ; tries++) {
    const token = sessionStorage.getItem(TOKEN_KEY);
    const headers = {...(token && {Authorization: "Bearer " + token}), ...(body && {"Content-Type": "application/octet-stream"})};
    let response;
    try {
      response = await fetch(path, {method: body ? "POST" : "GET", headers, body, signal});
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw navigator.onLine ? new Problem("No answer from the server.", "Is it still running?")
        : new Problem("This device is offline.", "The server can't be reached until it is online again.");
    }
    if (response.status === 401) {
      if (token === sessionStorage.getItem(TOKEN_KEY)) await askToken(token !== null);
      continue;
    }
    if (response.status === 503 && tries < TRIES_WHEN_BUSY) {
      const told = await response.json().catch(() => ({})), seconds = Number(response.headers.get("Retry-After")) || 1;
      showNotice(`${told.error ?? "The server is busy"}. Trying again in ${plural(seconds, "second")} …`);
      await pause(seconds);
      showNotice("");
      if (signal?.aborted) throw new DOMException("", "AbortError");
      continue;
    }
    if (response.ok) return response;
    const told = await response.json().catch(() => ({error: `The server answered ${response.status}`}));
    const why = [told.reason?.replaceAll("_", " "), told.detail].filter(Boolean).join(", ");
    throw new Problem(told.error + (why ? ":" : "."), why && why + ".", response.status);
  }
}
