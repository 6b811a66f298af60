// What the tests of the report ask the page: evaluated in it after it has loaded.
var probes = (() => {
  const all = (selector) => [...document.querySelectorAll(selector)].filter((element) => element.checkVisibility());

  const numbers = (text) => {
    const found = text.match(/[\d.]+/g).map(Number);
    return found.length > 3 ? found : [...found, 1];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const ground = (element) => {
    if (!element) return [255, 255, 255, 1];
    const color = numbers(getComputedStyle(element).backgroundColor);
    return color[3] === 1 ? color : over(color, ground(element.parentElement));
  };
  // Relative luminance and contrast ratio as WCAG 2.2 defines them.
  const linear = (part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const contrast = (color, element) => {
    const below = ground(element);
    const [a, b] = [luminance(over(numbers(color), below)), luminance(below)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };

  // Contrast of every visible text, and of marks that carry a meaning, with what they are painted on.
  function contrasts() {
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const element = walker.currentNode.parentElement, what = walker.currentNode.data.trim().slice(0, 40);
      if (!what || !element.checkVisibility() || element.closest("script, title")) continue;
      const style = getComputedStyle(element), size = parseFloat(style.fontSize), chart = element.closest("svg");
      const large = !chart && (size >= 24 || (size >= 18.66 && style.fontWeight >= 700));
      found.push({kind: large ? "large" : "text", what, ratio: contrast(chart ? style.fill : style.color, element)});
    }
    const marks = {
      ".bar, .dot": "fill",
      ".interval, .path, .mark": "stroke",
      "button, select": "borderTopColor",
      ".key, .share span": "backgroundColor",
    };
    for (const [what, property] of Object.entries(marks))
      for (const element of all(what)) {
        const ratio = contrast(getComputedStyle(element)[property], element.closest("section, header, dialog"));
        found.push({kind: "graphics", what, ratio});
      }
    return found;
  }

  // Text that is cut off where nothing says so.
  function cut() {
    return all("main *").filter((element) => {
      const style = getComputedStyle(element);
      if (element.closest("svg") || element.clientWidth === 0 || style.overflowX !== "hidden") return false;
      const says = style.textOverflow === "ellipsis" || style.webkitLineClamp !== "none";
      const more = element.scrollWidth > element.clientWidth + 1 || element.scrollHeight > element.clientHeight + 1;
      return more && !says;
    }).map((element) => element.outerHTML.slice(0, 200));
  }

  // Labels that run out of their chart or into each other.
  function crowdedLabels() {
    return all("svg").flatMap((svg) => {
      const frame = svg.getBoundingClientRect();
      const labels = [...svg.querySelectorAll("text")].map((text) => ({
        name: text.textContent,
        box: text.getBoundingClientRect(),
      }));
      const inside = ({box}) =>
        box.left > frame.left - 1 && box.right < frame.right + 1 && box.top > frame.top - 1 && box.bottom < frame.bottom + 1;
      const touch = (one, two) =>
        one.left < two.right - 1 && two.left < one.right - 1 && one.top < two.bottom - 3 && two.top < one.bottom - 3;
      const crowded = labels.flatMap((one, i) => labels.slice(i + 1).filter((two) => touch(one.box, two.box)).map((two) => one.name + " and " + two.name));
      return [...labels.filter((label) => !inside(label)).map(({name}) => name), ...crowded];
    });
  }

  // What a keyboard must reach, in the order of the page.
  const focusable = () => all("button, select, summary, [tabindex='0']");

  // The last cell of the matrix, scrolled to: where its headers are, and what a touch on it says.
  function lastCell() {
    const box = document.querySelector(".box"), row = document.querySelector(".matrix tbody tr:last-child");
    box.scrollTo({left: box.scrollWidth, top: box.scrollHeight, behavior: "instant"});
    box.scrollIntoView({behavior: "instant"});
    const frame = box.getBoundingClientRect(), header = row.querySelector("th").getBoundingClientRect();
    const column = document.querySelector(".matrix thead tr").lastElementChild.getBoundingClientRect();
    const cell = row.lastElementChild, place = cell.getBoundingClientRect();
    const touched = document.elementFromPoint(place.x + place.width / 2, place.y + place.height / 2);
    touched.click();
    return {
      header_left: header.left - frame.left,
      header_share: header.width / frame.width,
      column_top: column.top - frame.top,
      touched: touched === cell,
      text: document.getElementById("cell").textContent,
    };
  }

  function choose(value) {
    const select = document.getElementById("class-filter");
    select.value = value;
    select.dispatchEvent(new Event("change"));
  }

  const unnamed = () => all("svg, img, select, button, dialog, [role=region]").filter((element) =>
    !(element.getAttribute("aria-label") || element.alt || element.textContent.trim() || element.labels?.length)).length;

  return {all, contrasts, cut, crowdedLabels, focusable, lastCell, choose, unnamed};
})();
