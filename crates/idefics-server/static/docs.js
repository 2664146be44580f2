// Shows /openapi.json: routes by tag, then types. Everything is set as text, never as markup.
"use strict";

const element = (name, content = [], attributes = {}) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...[content].flat());
  return made;
};

const nameOf = (reference) => reference.split("/").pop();

/** The type of a schema in words, with links to the named ones. */
const typeOf = (schema) => {
  if (!schema) return "";
  if (schema.$ref) return element("a", nameOf(schema.$ref), { href: `#${nameOf(schema.$ref)}` });
  const alternatives = schema.oneOf ?? schema.anyOf ?? schema.allOf;
  if (alternatives) {
    const joint = schema.allOf ? " and " : " or ";
    return element("span", alternatives.flatMap((it, index) => (index ? [joint, typeOf(it)] : [typeOf(it)])));
  }
  if (schema.type === "array") return element("span", ["list of ", typeOf(schema.items)]);
  const types = [schema.type ?? "any"].flat().filter((type) => type !== "null");
  const bounds = [
    schema.minimum !== undefined ? `at least ${schema.minimum}` : "",
    schema.maximum !== undefined ? `at most ${schema.maximum}` : "",
  ].filter(Boolean);
  return types.join(" or ") + (bounds.length ? ` (${bounds.join(", ")})` : "");
};

const propertiesOf = (schema) => {
  const parts = schema.allOf ? schema.allOf.filter((it) => it.properties) : [schema];
  const rows = parts.flatMap((part) =>
    Object.entries(part.properties ?? {}).map(([name, property]) =>
      element("tr", [
        element("td", element("code", name)),
        element("td", [typeOf(property), (part.required ?? []).includes(name) ? "" : element("span", ", optional", { class: "muted" })]),
        element("td", property.description ?? ""),
      ]),
    ),
  );
  if (!rows.length) return element("p", typeOf(schema));
  const head = element("tr", ["Field", "Type", ""].map((title) => element("th", title, { scope: "col" })));
  return element("table", [element("thead", head), element("tbody", rows)]);
};

const show = (description) => {
  document.getElementById("description").textContent = description.info.description;
  const groups = new Map();
  for (const [path, methods] of Object.entries(description.paths)) {
    for (const [method, route] of Object.entries(methods)) {
      const tag = route.tags?.[0] ?? "Other";
      groups.set(tag, [...(groups.get(tag) ?? []), { path, method, route }]);
    }
  }
  for (const [tag, routes] of groups) {
    const id = tag.replaceAll(/\W/g, "-");
    document.getElementById("contents").append(element("a", tag, { href: `#${id}` }));
    const section = element("section", element("h2", tag, { id }));
    for (const { path, method, route } of routes) {
      const title = [element("span", method.toUpperCase(), { class: "method" }), element("code", path)];
      section.append(element("h3", title), element("p", route.summary ?? ""));
      const body = route.requestBody?.content?.["application/json"]?.schema;
      if (body) section.append(element("p", ["Takes ", typeOf(body), "."]));
      for (const [status, response] of Object.entries(route.responses ?? {})) {
        const schema = Object.values(response.content ?? {})[0]?.schema;
        const words = [element("code", status), " ", schema ? typeOf(schema) : "", " ", response.description ?? ""];
        section.append(element("div", words));
      }
    }
    document.getElementById("routes").append(section);
  }
  for (const [name, schema] of Object.entries(description.components.schemas)) {
    document.getElementById("types").append(element("section", [
      element("h3", element("code", name), { id: name }),
      element("p", schema.description ?? ""),
      propertiesOf(schema),
    ]));
  }
};

fetch("/openapi.json")
  .then((response) => (response.ok ? response.json() : Promise.reject(new Error(`status ${response.status}`))))
  .then(show)
  .catch((error) => (document.getElementById("description").textContent = `The document could not be loaded: ${error.message}`));
