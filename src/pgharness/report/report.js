"use strict";
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[head.cellIndex].dataset.sort;
      const isNumber = head.classList.contains("number");
      const order = (a, b) => {
        const one = key(a), two = key(b);
        if (one === "" || two === "") return (one === "") - (two === "");
        const sign = isNumber ? one - two : one.localeCompare(two, undefined, { numeric: true });
        return up ? sign : -sign;
      };
      body.append(...[...body.rows].sort(order));
    });
  }
}
