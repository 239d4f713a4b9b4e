// The conversation: sends it whole each time, shows the answer as it comes.

import { Refused, postStream } from "./api.js";
import { colourOf } from "./colours.js";

const find = (id) => document.getElementById(id);

export class Chat {
  constructor() {
    this.messages = [];
    this.running = null;
    find("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    find("text").addEventListener("keydown", (event) => {
      // While an input method composes a character, Enter is its own.
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    find("stop").addEventListener("click", () => this.running?.abort());
    find("clear").addEventListener("click", () => this.clear());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.running?.abort();
    });
  }

  clear() {
    this.running?.abort();
    this.messages = [];
    find("log").replaceChildren(find("welcome") ?? "");
    find("text").focus();
  }

  async send() {
    const text = find("text").value.trim();
    if (!text || this.running) return;
    find("text").value = "";
    find("welcome")?.remove();
    const messages = this.messages;
    const question = { role: "user", content: text };
    this.addTurn("user", "You").said.textContent = text;
    const turn = this.addTurn("assistant", find("model").value || "Model");
    this.setRunning(new AbortController());
    const clock = new Clock();
    let answer = "";
    try {
      for await (const event of postStream("v1/chat/completions", this.body(question), this.running.signal)) {
        turn.setId(event.id);
        const delta = event.choices[0]?.delta?.content ?? "";
        if (delta) clock.piece();
        if (event.usage) clock.numTokens = event.usage.completion_tokens;
        answer += delta;
        this.append(turn.said, delta);
      }
      turn.hint.textContent = clock.summary("");
    } catch (error) {
      if (error.name === "AbortError") {
        turn.hint.textContent = clock.summary("stopped");
      } else {
        turn.fail(error instanceof Refused ? error.message : `No answer: ${error.message}`);
        // What failed before its first word was not said.
        if (!answer) find("text").value ||= text;
      }
    }
    if (answer) messages.push(question, { role: "assistant", content: answer });
    this.setRunning(null);
  }

  body(question) {
    const system = find("system").value.trim();
    const temperature = find("temperature").valueAsNumber;
    const maxTokens = find("max-tokens").valueAsNumber;
    return {
      model: find("model").value,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...this.messages, question],
      stream: true,
      stream_options: { include_usage: true },
      ...(Number.isFinite(temperature) && { temperature }),
      ...(Number.isFinite(maxTokens) && { max_tokens: maxTokens }),
    };
  }

  setRunning(controller) {
    this.running = controller;
    find("send").hidden = controller !== null;
    find("stop").hidden = controller === null;
    find("log").setAttribute("aria-busy", String(controller !== null));
  }

  /** Adds text and stays at the end, unless the reader has scrolled up. */
  append(element, text) {
    const log = find("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    element.append(text);
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  addTurn(role, name) {
    const turn = document.createElement("article");
    turn.className = `turn ${role}`;
    const [who, said, hint] = ["who", "said", "hint"].map((kind) => {
      const element = document.createElement("div");
      element.className = kind;
      return element;
    });
    who.textContent = name;
    turn.append(who, said, hint);
    this.append(find("log"), turn);
    find("log").scrollTop = find("log").scrollHeight;
    return {
      said,
      hint,
      setId(id) {
        if (!id || turn.dataset.id) return;
        turn.dataset.id = id;
        const swatch = document.createElement("i");
        swatch.style.background = colourOf(id);
        who.prepend(swatch);
        who.title = id;
      },
      fail(message) {
        hint.className = "note";
        hint.setAttribute("role", "alert");
        hint.textContent = message;
      },
    };
  }
}

/** When the pieces of an answer came, and how many tokens they were. */
class Clock {
  constructor() {
    this.start = performance.now();
    this.first = null;
    this.last = null;
    this.numPieces = 0;
    this.numTokens = null;
  }

  piece() {
    this.last = performance.now();
    this.first ??= this.last;
    this.numPieces += 1;
  }

  summary(end) {
    const tokens = this.numTokens ?? this.numPieces;
    const parts = end ? [end] : [];
    if (this.first !== null) {
      parts.push(`first token after ${((this.first - this.start) / 1000).toFixed(2)} s`);
    }
    const seconds = (this.last - this.first) / 1000;
    parts.push(tokens === 1 ? "1 token" : `${tokens} tokens`);
    if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    return parts.join(", ");
  }
}
