// The picture of the moment: shown, acknowledged and forgotten.
// The kernel's side is `Picture` in nbs/06b_browser_parts.ipynb.

function render({model, el}) {
  el.classList.add("fer-picture");
  el.innerHTML = `<img alt="" hidden><div class="blank">press Start</div>`;
  const [img, blank] = el.children;
  let urls = [];

  function forget(keep) {
    urls.filter(url => url !== keep).forEach(url => URL.revokeObjectURL(url));
    urls = keep ? [keep] : [];
  }

  function heard(message, buffers) {
    if (!["picture", "blank"].includes(message.kind)) return;
    img.hidden = message.kind === "blank";
    blank.hidden = !img.hidden;
    if (img.hidden) {
      img.removeAttribute("src");
      return forget();
    }
    const url = URL.createObjectURL(new Blob([buffers[0]], {type: "image/jpeg"}));
    urls.push(url);
    img.onload = () => { forget(url); model.send({kind: "seen", index: message.index}); };
    img.src = url;
  }

  model.on("msg:custom", heard);
  return () => { model.off("msg:custom", heard); forget(); };
}

export default {render};
