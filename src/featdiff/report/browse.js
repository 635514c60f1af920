"use strict";
// Answers of one task are a script that calls featdiffPart; it is asked for when the task is chosen.
(() => {
  const index = JSON.parse(document.getElementById("index").textContent);
  const form = document.getElementById("choose");
  const box = document.querySelector("#columns div");
  const [head, body] = document.querySelectorAll("#answers thead, #answers tbody");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const AT_ONCE = 50;
  const CHOICES = ["task", "which", "text", "feature"].filter((name) => form.elements[name]);
  const parts = new Map();
  let shown = 0;

  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };

  index.columns.forEach((column, number) => {
    const input = element("input", { type: "checkbox", name: "column", value: number, checked: column.shown });
    box.append(element("label", {}, input, " ", column.label));
  });

  const chosen = () => [...form.querySelectorAll("[name=column]:checked")].map((input) => Number(input.value));

  function fromAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const name of CHOICES) {
      if (given.has(name)) form.elements[name].value = given.get(name);
    }
    if (form.elements.task.selectedIndex < 0) form.elements.task.selectedIndex = 0;
    if (form.elements.which.selectedIndex < 0) form.elements.which.selectedIndex = 0;
    if (form.elements.feature?.selectedIndex < 0) form.elements.feature.selectedIndex = 0;
    if (given.has("columns")) {
      const numbers = given.get("columns").split(",");
      for (const input of form.querySelectorAll("[name=column]")) input.checked = numbers.includes(input.value);
    }
  }

  function toAddress() {
    const address = new URLSearchParams(CHOICES.map((name) => [name, form.elements[name].value]));
    address.set("columns", chosen().join(","));
    history.replaceState(null, "", `#${address}`);
  }

  window.featdiffPart = (number, part) => {
    parts.set(number, part);
    if (number === Number(form.elements.task.value)) draw();
  };

  function fetchPart(number) {
    if (parts.has(number)) return;
    parts.set(number, null);
    document.body.append(element("script", { src: `browse/${number}.js`, onerror: () => (count.textContent = `browse/${number}.js: not found beside this page`) }));
  }

  // What differs from the answer before: all between the beginning and the end that both have.
  function difference(text, before) {
    let start = 0;
    while (start < Math.min(text.length, before.length) && text[start] === before[start]) start++;
    let end = 0;
    while (end < Math.min(text.length, before.length) - start && text[text.length - 1 - end] === before[before.length - 1 - end]) end++;
    return [text.slice(0, start), text.slice(start, text.length - end), text.slice(text.length - end)];
  }

  function cell(answer, before) {
    if (!answer) return element("td", {}, element("small", { textContent: "not asked" }));
    const [text, right, unread] = answer;
    const kind = right ? "right" : unread ? "unread" : "wrong";
    const pre = element("pre");
    const [start, middle, end] = before && before[0] !== text ? difference(text, before[0]) : [text, "", ""];
    pre.append(element("span", { className: "mark", title: kind === "unread" ? "unreadable" : kind, textContent: right ? "✓" : unread ? "?" : "✕" }), start);
    if (before && before[0] !== text) pre.append(element("mark", { textContent: middle || "…" }), end);
    return element("td", { className: kind }, pre);
  }

  // The question, and the tuned model's answer to it, token by token: the stronger the feature, the darker. Null where it is silent.
  function shade(part, question) {
    const feature = index.features.findIndex(([id]) => String(id) === form.elements.feature?.value);
    const values = feature >= 0 && part.shades[feature][question];
    if (!values) return null;
    const [answerFrom, tokens] = part.tokens[question];
    const said = (percent) => ((percent * index.features[feature][1]) / 100).toPrecision(2);
    return element("pre", { className: "shaded" }, ...tokens.map((token, place) => {
      const [tuned, original] = values.map((each) => each[place]);
      const span = element("span", { textContent: token, title: `tuned ${said(tuned)}, original ${said(original)}`, className: place === answerFrom ? "answer" : "" });
      span.style.setProperty("--value", `${Math.min(70, 0.7 * tuned)}%`);
      return span;
    }));
  }

  function keeps(part, question, numbers) {
    const answer = (number) => part.answers[number][question];
    const right = (number) => answer(number) && answer(number)[1];
    const edits = numbers.filter((number) => index.columns[number].before !== undefined && answer(number));
    const wanted = form.elements.text.value.toLowerCase();
    if (wanted) {
      const [, prompt, options, reference] = part.questions[question];
      const texts = [prompt, ...options, reference, ...numbers.map((number) => (answer(number) ? answer(number)[0] : ""))];
      if (!texts.some((text) => text.toLowerCase().includes(wanted))) return false;
    }
    switch (form.elements.which.value) {
      case "flipped":
        return !right(index.original) && Boolean(right(index.tuned));
      case "changed":
        return edits.some((number) => right(number) !== right(index.columns[number].before));
      case "broken":
        return edits.some((number) => answer(number)[2]);
      case "returned":
        return edits.some((number) => {
          const toward = answer(index.columns[number].toward);
          return toward && toward[0] === answer(number)[0];
        });
      default:
        return true;
    }
  }

  function draw(further = false) {
    const number = Number(form.elements.task.value);
    fetchPart(number);
    const part = parts.get(number);
    if (!part) return;
    const numbers = chosen();
    const found = [...part.questions.keys()].filter((question) => keeps(part, question, numbers));
    shown = further ? shown + AT_ONCE : AT_ONCE;
    head.replaceChildren(
      element("tr", {}, element("th", { scope: "col", textContent: "question, and its answer" }), ...numbers.map((each) => {
        const title = element("th", { scope: "col", textContent: index.columns[each].label });
        title.style.borderBottom = `3px solid ${index.columns[each].colour}`;
        return title;
      })),
    );
    body.replaceChildren(
      ...found.slice(0, shown).map((question) => {
        const [id, prompt, options, reference] = part.questions[question];
        const asked = element("td", { id }, shade(part, question) ?? element("pre", { textContent: prompt }));
        for (const option of options) asked.append(element("div", {}, element("small", { textContent: option })));
        asked.append(element("small", { textContent: `→ ${reference}` }));
        return element("tr", {}, asked, ...numbers.map((each) => {
          const before = index.columns[each].before;
          return cell(part.answers[each][question], before === undefined ? null : part.answers[before][question]);
        }));
      }),
    );
    count.textContent = `${found.length} of ${part.questions.length} questions${found.length > shown ? `, the first ${shown} shown` : ""}`;
    more.hidden = found.length <= shown;
    document.body.dataset.drawn = "yes";
  }

  form.addEventListener("input", () => (toAddress(), draw()));
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => draw(true));
  addEventListener("hashchange", () => (fromAddress(), draw()));
  fromAddress();
  draw();
})();
