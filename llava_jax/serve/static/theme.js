// Before anything is drawn: the theme that was chosen here, or else the system's.
try {
  document.documentElement.dataset.theme = localStorage.getItem("llava_jax.theme") ?? "";
} catch {
  // The browser keeps nothing for this site.
}
