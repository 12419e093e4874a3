// The swarm as it was seen last: tiles, who holds which blocks, curves, contributions, comings and goings.
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300, HEIGHT = 90, TOP = 14, BOTTOM = 78;

const nameOf = (peer) => peer.nickname || peer.peer.slice(-8);

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// A peer's name stands apart from the text around it, whatever direction it is written in.
function named(peer) {
  const name = make("bdi", "", nameOf(peer));
  name.title = `${nameOf(peer)} (${peer.peer})`;
  return name;
}

function count(number) {
  if (number >= 1e6) return `${(number / 1e6).toFixed(1)} M`;
  return number >= 1e4 ? `${(number / 1e3).toFixed(1)} k` : String(Math.round(number));
}

function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (number >= 999.5 && unit < units.length - 1) { number /= 1000; unit += 1; }
  return `${unit && number < 100 ? number.toFixed(1) : Math.round(number)} ${units[unit]}`;
}

function mean(values) {
  return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
}

function showTiles(run) {
  const loss = mean(run.trainers.map((trainer) => trainer.loss));
  const sent = Object.values(run.traffic).reduce((sum, host) => sum + host.sent, 0);
  const tiles = [
    ["Round", String(run.round)],
    ["Loss", loss === null ? "–" : loss.toFixed(3)],
    ["Trained", `${count(run.tokens_per_second)}/s`],
    ["Hosts", String(run.hosts.length)],
    ["Trainers", String(run.trainers.length)],
    ["Sent", bytes(sent)],
  ];
  $("tiles").replaceChildren(...tiles.map(([label, value]) => {
    const tile = make("div");
    tile.append(make("dt", "", label), make("dd", "", value));
    return tile;
  }));
}

function showBlocks(run) {
  const holders = Array(run.blocks).fill(0);
  for (const host of run.hosts) for (let block = host.blocks[0]; block < host.blocks[1]; block += 1) holders[block] += 1;
  for (const block of run.unserved_blocks) holders[block] = 0;
  const none = holders.filter((number) => number === 0).length;
  const one = holders.filter((number) => number === 1).length;
  const words = [];
  if (none) words.push(`${none} held by nobody`);
  if (one) words.push(`${one} by one peer only`);
  if (run.blocks - none - one) words.push(`${run.blocks - none - one} by several`);
  const all = none || one ? words.join(", ") : "all held by several peers";
  $("coverage-words").textContent = `${run.blocks} blocks of ${run.base}: ${all}`;
  $("coverage").setAttribute("aria-label", $("coverage-words").textContent);
  $("coverage").replaceChildren(...holders.map((number, block) => {
    const cell = make("span", number === 0 ? "none" : number === 1 ? "one" : "");
    cell.title = `block ${block}: ${number} ${number === 1 ? "holder" : "holders"}`;
    return cell;
  }));
  const peers = [...run.hosts, ...run.paused].sort((a, b) => a.blocks[0] - b.blocks[0] || (a.peer < b.peer ? -1 : 1));
  $("map").replaceChildren(...peers.map((host) => peerRow(host, run.blocks)));
}

function peerRow(host, blocks) {
  const row = make("div", host.paused_by ? "peer paused" : "peer");
  row.setAttribute("role", "listitem");
  const track = make("div", "track");
  const span = make("div", "span");
  const [start, end] = host.blocks;
  span.style.left = `${(100 * start) / blocks}%`;
  span.style.width = `${(100 * (end - start)) / blocks}%`;
  track.title = `blocks ${start}:${end}`;
  track.append(span);
  const side = make("span", "side", host.paused_by ? "paused" : `${start}:${end}`);
  side.title = `round ${host.round}, ${count(host.tokens_per_second)} tokens/s, ${host.dtype}`;
  row.append(named(host), track, side);
  return row;
}

function draw(svg, label, lines, format) {
  const values = lines.flatMap(({ points }) => points.map(([, y]) => y));
  const parts = [line(TOP), line(BOTTOM)];
  if (values.length < 2) {
    parts.push(words("nothing yet", 8, 50, "start"));
    svg.setAttribute("aria-label", `${label}: nothing yet`);
  } else {
    let low = Math.min(...values), high = Math.max(...values);
    svg.setAttribute("aria-label", `${label}: now ${format(values[lines[0].points.length - 1] ?? values[0])}, between ${format(low)} and ${format(high)}`);
    parts.push(words(format(high), WIDTH, TOP - 3, "end"), words(format(low), WIDTH, BOTTOM + 11, "end"));
    if (high === low) { high += 1; low -= 1; }
    const times = lines.flatMap(({ points }) => points.map(([x]) => x));
    const first = Math.min(...times), length = Math.max(...times) - first || 1;
    for (const { points, className } of lines) {
      const polyline = document.createElementNS(SVG, "polyline");
      polyline.setAttribute("points", points.map(([x, y]) =>
        `${((x - first) / length) * WIDTH},${BOTTOM - ((y - low) / (high - low)) * (BOTTOM - TOP)}`).join(" "));
      if (className) polyline.setAttribute("class", className);
      parts.push(polyline);
    }
  }
  svg.replaceChildren(...parts);
}

function line(y) {
  const element = document.createElementNS(SVG, "line");
  for (const [name, value] of [["x1", 0], ["x2", WIDTH], ["y1", y], ["y2", y]]) element.setAttribute(name, value);
  return element;
}

function words(text, x, y, anchor) {
  const element = document.createElementNS(SVG, "text");
  for (const [name, value] of [["x", x], ["y", y], ["text-anchor", anchor]]) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

function showCurves(run) {
  const curve = (place) => run.points.filter((point) => point[place] !== null).map((point) => [point[0], point[place]]);
  const losses = [{ points: curve(2) }, { points: curve(3), className: "held" }].filter(({ points }) => points.length > 1);
  draw($("loss-chart"), "Loss, with the held-out loss dashed", losses, (value) => value.toFixed(3));
  draw($("speed-chart"), "Tokens trained per second", [{ points: curve(4) }], (value) => count(value));
}

function showContributions(run) {
  const peers = new Map();
  for (const peer of [...run.hosts, ...run.paused, ...run.members, ...run.trainers]) if (!peers.has(peer.peer)) peers.set(peer.peer, peer);
  const rows = [...peers.values()].map((peer) => ({
    peer,
    trained: peer.trained_tokens || 0,
    served: peer.served_tokens || 0,
    sent: run.traffic[peer.peer] ? run.traffic[peer.peer].sent : null,
  }));
  rows.sort((a, b) => b.trained - a.trained || b.served - a.served || (b.sent || 0) - (a.sent || 0));
  $("contributions").replaceChildren(...rows.map(({ peer, trained, served, sent }) => {
    const row = make("tr");
    const name = make("td");
    name.append(named(peer));
    const steps = peer.step === undefined ? count(trained) : `${count(peer.step)} steps`;
    row.append(name, make("td", "", steps), make("td", "", count(served)), make("td", "", sent === null ? "–" : bytes(sent)));
    return row;
  }));
}

function showEvents(run) {
  const items = run.events.map((event) => {
    const item = make("li");
    const at = new Date(event.at * 1000);
    const time = make("time", "", at.toLocaleTimeString());
    time.dateTime = at.toISOString();
    const blocks = event.what === "left" ? "" : ` (blocks ${event.blocks[0]}:${event.blocks[1]})`;
    const verb = event.what === "moved" ? "took other blocks" : event.what;
    item.append(time, named(event), ` ${verb}${blocks}`);
    return item;
  });
  if (!items.length) items.push(make("li", "words", "Nobody came or went since this gateway started."));
  $("events").replaceChildren(...items);
}

export function showSwarm(run) {
  showTiles(run);
  showBlocks(run);
  showCurves(run);
  showContributions(run);
  showEvents(run);
}
