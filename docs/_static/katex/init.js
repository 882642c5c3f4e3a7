// Sphinx marks up the mathematics, KaTeX draws it.
document.addEventListener('DOMContentLoaded', () => {
  const delimiters = [{left: '\\[', right: '\\]', display: true}, {left: '\\(', right: '\\)', display: false}];
  document.querySelectorAll('.math').forEach(o => renderMathInElement(o, {delimiters, throwOnError: false}));
});
