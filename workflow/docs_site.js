// Search over what search-index.js holds: no server, no network, also from file://.
const field = document.querySelector("input[type=search]"), list = document.getElementById("found");
const up = document.body.dataset.up;

function rank(row, words) {
  const name = row[0].toLowerCase(), about = row[2].toLowerCase();
  let score = 0;
  for (const word of words) {
    const at = name.indexOf(word);
    if (at < 0 && !about.includes(word)) return 0;
    score += at === 0 ? 4 : at > 0 ? 3 : 1;
    if (name === word) score += 4;
  }
  return score - name.length / 1000;
}

field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = words.length ? FOUND.map(r => [rank(r, words), r]).filter(h => h[0] > 0).sort((a, b) => b[0] - a[0]).slice(0, 12) : [];
  list.replaceChildren(...hits.map(([, [name, url, about]]) => {
    const item = document.createElement("li"), link = document.createElement("a"), said = document.createElement("small");
    link.href = `${up}/${url}`;
    link.textContent = name;
    said.textContent = about;
    item.append(link, said);
    return item;
  }));
  if (words.length && !hits.length) list.textContent = "nothing found";
});
field.addEventListener("keydown", e => { if (e.key === "Enter" && list.querySelector("a")) list.querySelector("a").click(); });
document.querySelector("aside [aria-current]")?.scrollIntoView({ block: "center" });
if (innerWidth <= 1150) document.querySelector(".toc details")?.removeAttribute("open");
