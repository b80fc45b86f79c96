// What scrolls sideways can be reached and moved by keyboard
const scrolling = () => {
  for (const e of document.querySelectorAll("article pre, article .table-wrapper, div.math, div.cell_output")) {
    if (e.scrollWidth > e.clientWidth) e.tabIndex = 0;
    else e.removeAttribute("tabindex");
  }
};
addEventListener("load", scrolling);
addEventListener("resize", scrolling);
addEventListener("toggle", scrolling, true);
