// Before anything is drawn: the theme that was chosen here, or else the system's.
document.documentElement.dataset.theme = localStorage.getItem("llava_jax.theme") ?? "";
