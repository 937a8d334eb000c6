// For MathJax 3.2.2 (npm package mathjax, es5/tex-svg.js, licence beside it): one file that holds all glyphs, so that
// pages show their formulas without a network. Only what arithmatex marks as a formula is one.
window.MathJax = {
  tex: {
    inlineMath: [["\\(", "\\)"]],
    displayMath: [["\\[", "\\]"]],
  },
  options: {
    ignoreHtmlClass: ".*",
    processHtmlClass: "arithmatex",
  },
};
