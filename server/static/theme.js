// The theme: light, dark, or the system's. Not a module, so that it runs before the first paint and nothing flashes.
"use strict";

const THEMES = ["system", "light", "dark"];
const root = document.documentElement;
root.dataset.theme = localStorage.getItem("mmlora-theme") ?? "system";

document.addEventListener("DOMContentLoaded", () => {
  const toggle = document.getElementById("theme-toggle");

  function updateLabel() {
    toggle.title = `Theme: ${root.dataset.theme}`;
    toggle.setAttribute("aria-label", toggle.title);
  }

  toggle.addEventListener("click", () => {
    root.dataset.theme = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
    localStorage.setItem("mmlora-theme", root.dataset.theme);
    updateLabel();
  });
  updateLabel();
});
