// Formulas are rendered in the reader's browser, by the KaTeX that lies beside this file.
document.querySelectorAll(".arithmatex").forEach((element) => {
  const text = element.textContent.trim();
  const display = text.startsWith("\\[");
  katex.render(text.replace(/^\\[[(]|\\[\])]$/g, ""), element, { displayMode: display, throwOnError: false });
});
