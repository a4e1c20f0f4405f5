"use strict";
// Draws each film: training error v depth, frame by frame, from the JSON beside it. Errors are fractions.
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const MARKS = {
    plain: { sign: "■", path: "M-5,-5h10v10h-10z" },
    residual: { sign: "●", path: "M-5.5,0a5.5,5.5 0 1 0 11,0a5.5,5.5 0 1 0 -11,0z" },
    preact: { sign: "▲", path: "M0,-6.5l6,11h-12z" },
  };
  const PLAYTIME = 10000; // milliseconds from the first frame to the last

  const percent = (error) => `${(100 * error).toFixed(2)} %`;
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

  function add(parent, name, attributes, text) {
    const element = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  // From 0; logarithmic where the errors span more than a factor of 30, as in the static figure.
  function scale(film, top, bottom) {
    const all = film.nets.flatMap((net) => net.errors.flat());
    const positive = all.filter((error) => error > 0);
    const [low, high] = [Math.min(...positive), Math.max(...positive, 0.01)];
    const chance = high > 0.6 * film.chance;
    if (positive.length && high > 30 * low) {
      const min = 0.8 * low;
      const max = Math.max(1.08 * high, chance ? film.chance * (film.chance / min) ** 0.08 : 0); // room for the word
      const ticks = [];
      for (let power = -5; power < 0; power++) for (const digit of [1, 2, 5]) ticks.push(digit * 10 ** power);
      const y = (error) => bottom - (bottom - top) * Math.log(Math.max(error, min) / min) / Math.log(max / min);
      return { y, chance, ticks: ticks.filter((tick) => tick >= min && tick <= max) };
    }
    const max = Math.max(1.08 * high, chance ? 1.08 * film.chance : 0);
    const step = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2].find((size) => max / size <= 6);
    const ticks = Array.from({ length: Math.floor(max / step) + 1 }, (_, i) => i * step);
    return { y: (error) => bottom - (bottom - top) * error / max, chance, ticks };
  }

  function start(root) {
    const film = JSON.parse(document.getElementById(root.dataset.film).textContent);
    const [svg, slider, button, label, body] =
      ["svg", "input", "button", "output", "tbody"].map((name) => root.querySelector(name));
    const blocks = [...new Set(film.nets.map((net) => net.block))];
    const depths = [...new Set(film.nets.map((net) => net.depth))].sort((a, b) => a - b);
    const of = (block) => film.nets.filter((net) => net.block === block);
    const end = film.steps.length - 1;
    let timer = 0;

    function draw() {
      const frame = Number(slider.value);
      const error = (net) => mean(net.errors.map((seed) => seed[frame]));
      const width = Math.max(260, Math.min(svg.getBoundingClientRect().width, 736));
      const height = Math.max(230, Math.min(0.52 * width, 360));
      const [left, right, top, bottom] = [52, width - 18, 12, height - 44];
      const { y, chance, ticks } = scale(film, top, bottom);
      const [first, last] = [depths[0], depths[depths.length - 1]];
      const inner = (right - left - 40) / Math.max(last - first, 1);
      const x = (depth) => (first === last ? (left + right) / 2 : left + 20 + (depth - first) * inner);
      svg.replaceChildren();
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.setAttribute("height", height);
      for (const tick of ticks) {
        add(svg, "line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) });
        const text = `${Number((100 * tick).toPrecision(3))}%`;
        add(svg, "text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, text);
      }
      if (chance) {
        add(svg, "line", { class: "chance", x1: left, x2: right, y1: y(film.chance), y2: y(film.chance) });
        add(svg, "text", { x: right, y: y(film.chance) - 10, "text-anchor": "end" }, "chance");
      }
      let free = -Infinity;
      for (const depth of depths) {
        if (x(depth) - free < 22) continue; // no room for its label
        add(svg, "text", { x: x(depth), y: bottom + 18, "text-anchor": "middle" }, depth);
        free = x(depth);
      }
      add(svg, "text", { x: (left + right) / 2, y: height - 8, "text-anchor": "middle" }, "depth (weight layers)");
      const words = [];
      for (const block of blocks) {
        const group = add(svg, "g", { class: block });
        const points = of(block).map((net) => `${x(net.depth)},${y(error(net))}`).join(" ");
        add(group, "polyline", { class: "line", points });
        for (const net of of(block)) {
          for (const seed of net.errors) add(group, "circle", { class: "seed", cx: x(net.depth), cy: y(seed[frame]), r: 3 });
          const [cx, cy] = [x(net.depth), y(error(net))];
          add(group, "path", { class: "mean", d: MARKS[block].path, transform: `translate(${cx} ${cy})` });
          words.push(`${block} ${net.depth} layers ${percent(error(net))}`);
        }
      }
      const when = `epoch ${film.epochs[frame]}, step ${film.steps[frame].toLocaleString("en")}`;
      label.textContent = `${when} of ${film.last.toLocaleString("en")}`;
      slider.setAttribute("aria-valuetext", when);
      svg.setAttribute("aria-label", `Training error v depth at ${when}: ${words.join("; ")}.`);
      body.replaceChildren(...blocks.map((block) => {
        const row = document.createElement("tr");
        const head = document.createElement("th");
        head.scope = "row";
        head.className = block;
        head.textContent = `${MARKS[block].sign} ${block}`;
        row.append(head, ...depths.map((depth) => {
          const cell = document.createElement("td");
          const net = of(block).find((candidate) => candidate.depth === depth);
          cell.className = "right";
          cell.textContent = net ? percent(error(net)) : "-";
          return cell;
        }));
        return row;
      }));
    }

    function pause() {
      clearInterval(timer);
      timer = 0;
      button.textContent = "Play";
    }

    function play() {
      if (Number(slider.value) === end) slider.value = 0;
      button.textContent = "Pause";
      draw();
      timer = setInterval(() => {
        slider.value = Number(slider.value) + 1;
        draw();
        if (Number(slider.value) === end) pause();
      }, Math.max(40, Math.min(PLAYTIME / end, 700)));
    }

    const head = root.querySelector("thead tr");
    for (const depth of depths) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.className = "right";
      cell.textContent = `${depth} layers`;
      head.append(cell);
    }
    slider.max = end;
    slider.value = end;
    slider.addEventListener("input", () => { pause(); draw(); });
    button.addEventListener("click", () => (timer ? pause() : play()));
    root.hidden = false;
    draw();
    new ResizeObserver(draw).observe(root);
  }

  document.querySelectorAll("[data-film]").forEach(start);
})();
