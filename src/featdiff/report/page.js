"use strict";
// Plots are drawn in the colours of the current theme: those near the window at once, the other visible ones one
// by one after that, those behind a tab when it is opened.
(() => {
  const style = () => getComputedStyle(document.documentElement);

  function coloured(value, css) {
    if (typeof value === "string") {
      return value.replace(/var\((--[a-z-]+)\)/g, (_, name) => css.getPropertyValue(name).trim());
    }
    if (Array.isArray(value)) return value.map((item) => coloured(item, css));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, css)]));
    }
    return value;
  }

  function draw(plot) {
    const source = document.querySelector(`script[data-for="${plot.dataset.plot}"]`);
    const css = style();
    const { data, layout } = coloured(JSON.parse(source.textContent), css);
    layout.font = { family: css.getPropertyValue("--text"), size: 12, color: css.getPropertyValue("--ink").trim() };
    layout.hoverlabel = {
      bgcolor: css.getPropertyValue("--surface").trim(),
      bordercolor: css.getPropertyValue("--hair").trim(),
      font: { color: css.getPropertyValue("--ink").trim(), size: 12 },
    };
    layout.autosize = true;
    Plotly.react(plot, data, layout, { displayModeBar: false });
    plot.dataset.drawn = "yes";
  }

  const sized = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.dataset.drawn && target.offsetParent) Plotly.Plots.resize(target);
    }
  });

  const near = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting && !target.dataset.drawn) draw(target);
      }
    },
    { rootMargin: "600px" },
  );
  const plots = [...document.querySelectorAll(".plot")];
  plots.forEach((plot) => (near.observe(plot), sized.observe(plot)));

  function drawNext() {
    const plot = plots.find((candidate) => !candidate.dataset.drawn && candidate.offsetParent);
    if (!plot) return;
    draw(plot);
    setTimeout(drawNext);
  }
  setTimeout(drawNext, 50);

  const redraw = (all) => plots.filter((plot) => all || plot.dataset.drawn).forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw(false));
  addEventListener("beforeprint", () => redraw(true));

  const links = new Map([...document.querySelectorAll("nav a[href^='#']")].map((link) => [link.hash.slice(1), link]));
  const reading = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        links.get(target.id)?.classList.toggle("here", isIntersecting);
      }
    },
    { rootMargin: "-25% 0px -70% 0px" },
  );
  document.querySelectorAll("section").forEach((section) => reading.observe(section));

  // A card that is folded away opens when its address is asked for, or when it holds what is sought.
  const unfold = (card) => {
    for (let above = card.parentElement; above; above = above.parentElement) {
      if (above.tagName === "DETAILS") above.open = true;
    }
  };
  function visit() {
    const card = document.getElementById(location.hash.slice(1));
    if (card?.classList.contains("feature")) (unfold(card), card.scrollIntoView());
  }
  addEventListener("hashchange", visit);
  visit();

  const form = document.getElementById("find-feature");
  if (form) {
    const cards = [...document.querySelectorAll(".feature")];
    const first = document.getElementById("features");
    const order = [...first.children];
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => {
      const wanted = form.elements.text.value.toLowerCase();
      const holds = cards.filter((card) => card.textContent.toLowerCase().includes(wanted));
      cards.forEach((card) => (card.hidden = Boolean(wanted) && !holds.includes(card)));
      if (wanted) holds.forEach(unfold);
      form.querySelector("[role=status]").textContent = wanted ? `${holds.length} of ${cards.length} features` : "";
      const by = form.elements.order.value;
      first.append(...(by ? [...order].sort((a, b) => b.dataset[by] - a.dataset[by]) : order));
    });
  }
})();
