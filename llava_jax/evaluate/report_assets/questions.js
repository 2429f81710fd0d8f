
const form = document.querySelector("form"), articles = [...document.querySelectorAll("article")];
function show() {
  const group = form.group.value, words = form.words.value.toLowerCase();
  const points = form.differ.checked ? Math.max(Number(form.points.value), Number.MIN_VALUE) : 0;
  let shown = 0;
  for (const article of articles) {
    const visible = Number(article.dataset.spread) >= points && article.textContent.toLowerCase().includes(words)
      && (!group || JSON.parse(article.dataset.groups).includes(group));
    article.hidden = !visible;
    shown += visible;
  }
  document.querySelector("output").textContent = `${shown} of ${articles.length} questions`;
}
form.addEventListener("input", show);
form.addEventListener("submit", (event) => event.preventDefault());
show();
