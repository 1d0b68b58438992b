// The page: reads what toy/explore.py wrote into it, and starts the figures from top to bottom.

typeset(document.body); // at once: what follows in the page is long

document.addEventListener("DOMContentLoaded", () => {
  const world = JSON.parse(find("#world").textContent);
  const { command, commit, hardware, date, seed, steps } = world.networks.provenance;
  find("#provenance").textContent = `The plane's networks: made by "${command}" at commit ${commit}, ${date}, ` +
    `${hardware}; seed ${seed}, ${steps} training steps. ${world.pictures.note}`;
  for (const mount of [mount_problem, mount_why, mount_step, mount_follow, mount_sampling, mount_pictures]) mount(world);
  addEventListener("hashchange", follow_address);
  follow_address();
});
