// The times of the page's own loops, for `python toy/explore.py --measure`: an expression that playwright evaluates.
// A number of frames of each moving figure, {script: ms to compute and draw, frame: ms from frame to frame}, and pictures.

async (frames) => {
  const times = {};
  const film = async (name, draw) => {
    const script = times[`${name}: computing and drawing a frame`] = [], frame = times[`${name}: from frame to frame`] = [];
    let before = await new Promise(requestAnimationFrame);
    for (let i = 0; i < frames; i++) {
      const start = performance.now();
      draw(i);
      script.push(performance.now() - start);
      const now = await new Promise(requestAnimationFrame);
      frame.push(now - before);
      before = now;
    }
  };
  const around = (i) => [1.5 * Math.cos(i / 20), 1.5 * Math.sin(i / 20)];
  for (const k of [1, 0.9]) {
    figures.step.change({ layout: "between", t: 0.8, s: 0.3, k, part: 6 }, true).scrollIntoView({ block: "center" });
    await film(`x_t dragged, k = ${k}`, (i) => {
      step.now.eps = around(i);
      draw_step(step);
    });
  }
  for (const k of [1, 0.9]) {
    find("#follow").scrollIntoView();
    figures.follow.change({ k }, true);
    await film(`follow the target, k = ${k}`, () => {
      if (!finished(following.run)) one_round(following.run);
      draw_follow(following);
    });
  }
  find("#sampling").scrollIntoView();
  await make_runs(sampling);
  await film("eight steps of sampling", (i) => {
    sampling.set.steps = 8;
    sampling.at = (8 * i) / frames;
    draw_paths(sampling);
  });
  find("#pictures").scrollIntoView();
  while (!pictures.models) await new Promise((done) => setTimeout(done, 100));
  pictures.drawing += 1; // what the page draws stops
  const drawn = times["a picture in four guided steps"] = [];
  for (let seed = 0; seed < 10; seed++) {
    const start = performance.now(), choices = { ...pictures.models.self_e.config, seed, steps: 4 };
    for await (const frame of draw_picture(pictures.models.self_e, "a photo of a red circle", choices)) frame;
    drawn.push(performance.now() - start);
  }
  return times;
};
