// DOM helpers. Text always becomes a text node, so that output of models and file names are never parsed as HTML.

export const byId = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export function drawing(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
  node.append(...children);
  return node;
}

export const icon = (name) => drawing("svg", { "aria-hidden": true }, drawing("use", { href: `#${name}` }));

export function iconButton(name, label, onclick) {
  const button = element("button", { type: "button", className: "round", title: label, onclick }, icon(name));
  button.setAttribute("aria-label", label);
  return button;
}

export const clock = (seconds) =>
  `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
