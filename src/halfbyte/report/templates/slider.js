for (const slider of document.querySelectorAll("input.cut")) {
  const pair = slider.closest(".pair");
  slider.hidden = false;
  slider.addEventListener("input", () => {
    pair.style.setProperty("--cut", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${slider.value} % float, the rest ${slider.dataset.recipe}`);
  });
}
if (matchMedia("(max-width: 40rem)").matches) {
  document.querySelector(".reading").open = false;  // on phones, pictures come before small print
}
