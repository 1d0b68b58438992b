// The page: reads what toy/explore.py wrote into it, and opens one view at a time.

const TABS = ["step", "sampling", "pictures"];

/** Show the view of this name. A view is mounted when it is opened for the first time. */
function open_view(name, mounts) {
  for (const tab of TABS) {
    const button = document.querySelector(`#tab-${tab}`), chosen = tab === name;
    button.setAttribute("aria-selected", chosen);
    button.tabIndex = chosen ? 0 : -1;
    document.querySelector(`#${tab}`).hidden = !chosen;
  }
  mounts[name]?.();
  mounts[name] = null;
}

/** Tabs as assistive technology expects them: one stop in the order of focus, arrow keys between them. */
function bind_tabs(mounts) {
  const tabs = TABS.filter((name) => mounts[name]);
  for (const name of TABS) {
    const button = document.querySelector(`#tab-${name}`);
    button.hidden = !tabs.includes(name);
    button.addEventListener("click", () => open_view(name, mounts));
    button.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const next = tabs[(tabs.indexOf(name) + move + tabs.length) % tabs.length];
      open_view(next, mounts);
      document.querySelector(`#tab-${next}`).focus();
    });
  }
  open_view(tabs.includes(location.hash.slice(1)) ? location.hash.slice(1) : tabs[0], mounts);
}

document.addEventListener("DOMContentLoaded", () => {
  const world = JSON.parse(document.querySelector("#world").textContent);
  const { command, commit, hardware, date, seed, steps } = world.networks.provenance;
  document.querySelector("#provenance").textContent = `The networks of the second view: made by "${command}" at ` +
    `commit ${commit}, ${date}, ${hardware}; seed ${seed}, ${steps} training steps, weights in half precision.`;
  bind_tabs({
    step: () => mount_plane(world),
    sampling: () => mount_paths(world),
    pictures: typeof mountPictures === "function" ? () => mountPictures(document.querySelector("#pictures")) : null,
  });
});
