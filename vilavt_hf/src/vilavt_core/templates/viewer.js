"use strict";
(() => {
  const links = (element) => (element.dataset.r || "").split(" ").filter(Boolean);
  const all = (root, selector) => Array.from(root.querySelectorAll(selector));
  let pinned = null;

  const choose = (figure) => {
    all(figure.parentElement, "figure").forEach((other) => other.classList.toggle("on", other === figure));
  };

  const light = (element) => {
    all(document, ".lit").forEach((lit) => lit.classList.remove("lit"));
    const talk = element && element.closest(".talk");
    if (!talk) return;
    const wanted = new Set(links(element));
    for (const other of all(talk, "[data-r]")) {
      if (links(other).some((link) => wanted.has(link))) other.classList.add("lit");
    }
    if (!element.closest(".stage")) {
      const figure = all(talk, ".stage.many figure").find((one) => one.querySelector(".lit"));
      if (figure) choose(figure);
    }
  };

  const linked = (target) => (target instanceof Element ? target.closest("[data-r]:not([data-r=''])") : null);
  const rest = () => light(pinned || linked(document.activeElement));
  document.addEventListener("mouseover", (event) => {
    const element = linked(event.target);
    if (element) light(element);
    else rest();
  });
  document.addEventListener("mouseout", rest);
  document.addEventListener("focusin", (event) => light(linked(event.target) || pinned));

  const follow = (element) => {
    const talk = element.closest(".talk");
    const from = element.closest(".stage") ? ".turns figure.lit" : ".stage .box.lit";
    const other = talk && talk.querySelector(from);
    if (other) other.scrollIntoView({ block: "nearest", behavior: "smooth" });
  };

  let dialog = null;
  let scale = 1;
  const size = () => {
    const frame = dialog.querySelector(".frame");
    frame.style.width = `${Math.round(scale * Number(frame.dataset.width))}px`;
    dialog.querySelector("output").textContent = `${Math.round(100 * scale)} %`;
  };
  const by = (factor) => {
    scale = Math.min(16, Math.max(0.05, scale * factor));
    size();
  };
  const fit = () => {
    const frame = dialog.querySelector(".frame");
    const room = dialog.querySelector(".pan");
    scale = Math.min(room.clientWidth / frame.dataset.width, room.clientHeight / frame.dataset.height);
    size();
  };
  const button = (label, title, action) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = label;
    made.title = title;
    made.setAttribute("aria-label", title);
    made.addEventListener("click", action);
    return made;
  };
  const enlarge = (figure) => {
    const frame = figure.querySelector(".frame");
    if (!frame || !frame.querySelector("img")) return;
    if (!dialog) {
      dialog = document.createElement("dialog");
      dialog.className = "zoomed";
      const bar = document.createElement("p");
      bar.append(
        button("\u2212", "smaller", () => by(1 / 1.5)),
        document.createElement("output"),
        button("+", "larger", () => by(1.5)),
        button("fit", "fit the window", fit),
        button("\u00d7", "close", () => dialog.close()),
      );
      const pan = document.createElement("div");
      pan.className = "pan";
      pan.tabIndex = 0;
      pan.addEventListener("wheel", (event) => {
        if (!event.ctrlKey) return;
        event.preventDefault();
        by(event.deltaY < 0 ? 1.2 : 1 / 1.2);
      }, { passive: false });
      dialog.addEventListener("keydown", (event) => {
        if (event.key === "+" || event.key === "=") by(1.5);
        else if (event.key === "-") by(1 / 1.5);
        else if (event.key === "0") fit();
      });
      dialog.append(bar, pan);
      document.body.append(dialog);
    }
    const copy = frame.cloneNode(true);
    all(copy, "[id]").forEach((element) => element.removeAttribute("id"));
    dialog.querySelector(".pan").replaceChildren(copy);
    dialog.showModal();
    fit();
  };

  const lay = (select) => {
    const turn = select.closest(".turn");
    for (const other of all(turn, ".attention select")) {
      if (other !== select && select.value) other.value = "";
    }
    for (const heat of all(turn, ".heat")) heat.hidden = heat.dataset.heat !== select.value;
    for (const frame of all(turn, ".images .frame")) {
      frame.classList.toggle("heated", Boolean(frame.querySelector(".heat:not([hidden])")));
    }
  };
  document.addEventListener("change", (event) => {
    if (event.target instanceof Element && event.target.matches(".attention select")) lay(event.target);
  });

  document.addEventListener("click", (event) => {
    if (!(event.target instanceof Element) || event.target.closest("dialog")) return;
    const element = linked(event.target);
    if (event.target.closest(".enlarge")) {
      enlarge(event.target.closest("figure"));
      return;
    }
    const thumbnail = event.target.closest(".stage.many figure:not(.on)");
    if (thumbnail) choose(thumbnail);
    else if (event.target.closest(".frame") && !event.target.closest(".box, .tag")) {
      enlarge(event.target.closest("figure"));
      return;
    }
    pinned = element && element !== pinned ? element : null;
    light(pinned);
    if (pinned) follow(pinned);
  });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.target instanceof Element && event.target.closest("input, select, textarea")) return;
    if (event.key === "Escape") {
      pinned = null;
      light(null);
    } else if (event.key === "j" || event.key === "k") {
      const turns = all(document, ".turn");
      const at = turns.indexOf(document.activeElement && document.activeElement.closest(".turn"));
      const next = turns[event.key === "j" ? at + 1 : Math.max(0, at - 1)];
      if (next) next.focus();
    } else if (event.key === "a" || event.key === "A") {
      const turn = document.activeElement && document.activeElement.closest(".turn");
      const select = (turn && turn.querySelector(".attention select")) || document.querySelector(".attention select");
      if (!select) return;
      const count = select.options.length;
      select.selectedIndex = (select.selectedIndex + (event.key === "a" ? 1 : count - 1)) % count;
      lay(select);
      if (!turn || !turn.contains(select)) select.closest(".turn").scrollIntoView({ block: "nearest" });
    } else if (event.key === "n" || event.key === "p") {
      const link = document.querySelector(event.key === "n" ? "a[rel=next]" : "a[rel=prev]");
      if (link) link.click();
    } else if ((event.key === "Enter" || event.key === " ") && event.target.matches(".stage.many figure")) {
      event.preventDefault();
      choose(event.target);
    }
  });
})();
