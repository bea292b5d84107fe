"""Style sheet and script of the report page.

The six line colours keep a contrast of at least 4.5 to 1 with the ground of their scheme; no reader needs them, since
each of the six also has its own dash.
"""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2127;--soft:#59636e;--line:#d5dbe1;--card:#f5f7f9;
--c0:#4b5563;--c1:#0063a8;--c2:#b84a00;--c3:#007d5a;--c4:#96479f;--c5:#8a6400}
@media (prefers-color-scheme:dark){:root{--bg:#14181d;--fg:#e6eaee;--soft:#a3adb8;--line:#363e47;--card:#1d232a;
--c0:#b6c0cb;--c1:#64b5f6;--c2:#ff9a5c;--c3:#43d1a2;--c4:#dd9be6;--c5:#e3c14f}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1160px;margin:0 auto;padding:24px 16px 48px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:36px 0 8px}
h3{font-size:1rem;margin:16px 0 4px}
.lead{font-size:1.12rem;margin:0;max-width:60em;overflow-wrap:anywhere}
.note,.notes,small{color:var(--soft);font-size:.875rem}
.note{margin:6px 0;max-width:70em}
.notes{padding-left:20px;margin:4px 0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:6px}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--c1);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{font-weight:600;color:var(--soft);vertical-align:bottom;min-width:5.5em;background:var(--card)}
tbody th{font-weight:600;white-space:nowrap}
tbody tr:last-child>*{border-bottom:0}
td{min-width:4em;max-width:32em;overflow-wrap:break-word}
.results td,.facts td{white-space:nowrap}
.results thead th{white-space:nowrap;color:var(--fg)}
.results th:first-child{position:sticky;left:0;background:var(--card);white-space:normal;min-width:7.5em}
.results tbody th{font-weight:400}
td small{display:block}
.tag{border:1px solid var(--line);border-radius:4px;padding:0 4px;font-weight:400}
code{font:.85rem ui-monospace,Menlo,Consolas,monospace}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;padding:0;margin:8px 0}
.legend li{overflow-wrap:anywhere}
.swatch{width:30px;height:14px;vertical-align:-2px;margin-right:7px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:20px 24px}
figure{margin:0;min-width:0}
figcaption{font-weight:600;font-size:.95rem;margin-bottom:2px;display:flex;flex-wrap:wrap;
justify-content:space-between;gap:0 14px}
figcaption small{font-weight:400}
.chart{display:block;width:100%;height:auto;touch-action:pan-y}
.chart text{font-size:13px;fill:var(--soft)}
.mid{text-anchor:middle}
.end{text-anchor:end}
.chart .halo{fill:var(--fg);paint-order:stroke;stroke:var(--bg);stroke-width:4px;stroke-linejoin:round}
.grid{stroke:var(--line);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1;fill:none}
.level{stroke:var(--fg);stroke-width:1.3;stroke-dasharray:6 4;fill:none}
.line{fill:none;stroke-linejoin:round}
.bold{stroke-width:2.4}
.thin{stroke-width:1;opacity:.5}
.line.a0,.tick.a0{stroke:var(--c0)}.line.a1,.tick.a1{stroke:var(--c1)}.line.a2,.tick.a2{stroke:var(--c2)}
.line.a3,.tick.a3{stroke:var(--c3)}.line.a4,.tick.a4{stroke:var(--c4)}.line.a5,.tick.a5{stroke:var(--c5)}
.bold.a1{stroke-dasharray:14 3}.bold.a2{stroke-dasharray:6 3}.bold.a3{stroke-dasharray:2.5 2}.bold.a4{stroke-dasharray:10 3 2 3}
.bold.a5{stroke-dasharray:6 2 2 2 2 2}
.mark.a0{fill:var(--c0)}.mark.a1{fill:var(--c1)}.mark.a2{fill:var(--c2)}
.mark.a3{fill:var(--c3)}.mark.a4{fill:var(--c4)}.mark.a5{fill:var(--c5)}
.tick{stroke-width:2.4}
.cursor{fill:none;stroke:var(--fg);stroke-width:1.6}
#tip{position:fixed;z-index:2;pointer-events:none;background:var(--fg);color:var(--bg);font-size:.85rem;
padding:4px 8px;border-radius:4px;max-width:min(320px,90vw)}
details{margin-top:16px}
summary{cursor:pointer}
details .scroll{max-height:420px;overflow-y:auto;margin-top:8px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:14px}
.card{display:grid;grid-template-columns:minmax(96px,auto) 1fr;gap:12px;background:var(--card);border-radius:6px;
padding:12px;align-items:start}
.card>div{min-width:0;overflow-wrap:anywhere}
.card img{max-width:100%;height:auto;border-radius:3px}
.missing{width:120px;min-height:90px;border:1px dashed var(--soft);color:var(--soft);font-size:.8rem;padding:6px;
overflow-wrap:anywhere}
dl{margin:0;font-size:.92rem;line-height:1.35}
dt{font-weight:600;font-size:.82rem;color:var(--soft)}
dd{margin:0 0 6px}
.human{margin:0;font-size:.82rem;line-height:1.35;color:var(--soft)}
p.human{font-weight:600}
ul.human{padding-left:16px}
@media (max-width:480px){.card img{max-width:110px}th,td{padding:6px 8px}.results thead th{white-space:normal}
.results th:first-child{min-width:6.5em}.chart text{font-size:16px}}
@media print{#tip{display:none}.scroll{overflow:visible}}
"""

SCRIPT = """
(function () {
  var tip = document.getElementById("tip");
  function points(svg) {
    if (!svg.nearby) {
      svg.nearby = [];
      svg.querySelectorAll("[data-tips]").forEach(function (line) {
        JSON.parse(line.dataset.tips).forEach(function (p) {
          svg.nearby.push([p[0], p[1], line.dataset.label + " · " + p[2]]);
        });
      });
      svg.querySelectorAll("[data-mark]").forEach(function (tick) {
        var box = tick.getBBox(), text = tick.dataset.label + " · " + tick.dataset.mark;
        svg.nearby.push([box.x + box.width / 2, box.y + box.height / 2, text]);
      });
    }
    return svg.nearby;
  }
  function hide(svg) {
    tip.hidden = true;
    svg.querySelector(".cursor").setAttribute("cx", -20);
  }
  function show(svg, event) {
    var box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    var x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale, best = null, least = 60 * 60;
    points(svg).forEach(function (p) {
      var far = (p[0] - x) * (p[0] - x) + (p[1] - y) * (p[1] - y);
      if (far < least) { least = far; best = p; }
    });
    if (!best) { hide(svg); return; }
    var cursor = svg.querySelector(".cursor");
    cursor.setAttribute("cx", best[0]);
    cursor.setAttribute("cy", best[1]);
    tip.textContent = best[2];
    tip.hidden = false;
    var left = box.left + best[0] / scale + 12, top = box.top + best[1] / scale - tip.offsetHeight - 10;
    tip.style.left = Math.max(4, Math.min(left, window.innerWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = Math.max(4, top) + "px";
  }
  document.querySelectorAll("svg.chart").forEach(function (svg) {
    ["pointermove", "pointerdown"].forEach(function (name) {
      svg.addEventListener(name, function (event) { show(svg, event); });
    });
    svg.addEventListener("pointerleave", function () { hide(svg); });
  });
})();
"""
