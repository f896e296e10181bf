/* Read-outs of charts, and sortable tables; starts everything. */

/* The read-out of a chart: what a dot stands for, or the values of all lines where the pointer is. */
function listenToChart(svg, tip) {
  const lines = svg.dataset.lines ? JSON.parse(svg.dataset.lines) : null;
  const ruler = svg.querySelector(".ruler");
  const hide = () => {
    tip.hidden = true;
    ruler?.setAttribute("visibility", "hidden");
  };
  const read = (event) => {
    const dot = event.target.closest("[data-tip]");
    const scale = svg.viewBox.baseVal.width / svg.getBoundingClientRect().width;
    const x = (event.clientX - svg.getBoundingClientRect().left) * scale;
    if (dot) tip.textContent = dot.dataset.tip;
    else if (lines) {
      const at = lines.px.reduce((best, place, index) => (Math.abs(place - x) < Math.abs(lines.px[best] - x) ? index : best), 0);
      const values = lines.series.flatMap(([name, values]) => (values[at] === null ? [] : `${name} ${values[at]}`));
      tip.textContent = [`step ${lines.x[at]}`, ...values].join("\n");
      for (const end of ["x1", "x2"]) ruler.setAttribute(end, lines.px[at]);
      ruler.setAttribute("visibility", "visible");
    } else return hide();
    tip.hidden = false;
    tip.style.left = `${clamp(event.clientX + 14, 0, window.innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${event.clientY + 14}px`;
  };
  svg.addEventListener("pointermove", read);
  svg.addEventListener("pointerleave", hide);
}

/* A click on a heading sorts by it, a second one the other way round; cells without a value stay last. */
function listenToTable(table) {
  const buttons = [...table.querySelectorAll("thead button")];
  buttons.forEach((button, column) => {
    button.addEventListener("click", () => {
      const heading = button.closest("th");
      const down = heading.getAttribute("aria-sort") === "ascending";
      buttons.forEach((each) => each.closest("th").removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const compare = (a, b) => {
        if (!value(a) || !value(b)) return Number(!value(a)) - Number(!value(b));
        return value(a).localeCompare(value(b), "en", { numeric: true }) * (down ? -1 : 1);
      };
      const numeric = heading.classList.contains("number");
      const byNumber = (a, b) => {
        if (!value(a) || !value(b)) return Number(!value(a)) - Number(!value(b));
        return (Number(value(a)) - Number(value(b))) * (down ? -1 : 1);
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(numeric ? byNumber : compare));
    });
  });
}

const viewers = [...document.querySelectorAll(".viewer")].map((root) => new Viewer(root));
const tip = document.querySelector(".tip");
document.querySelectorAll("svg.chart").forEach((svg) => listenToChart(svg, tip));
document.querySelectorAll("table.sortable").forEach(listenToTable);
window.addEventListener("beforeprint", () => viewers.forEach((viewer) => viewer.draw()));
