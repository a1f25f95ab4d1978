"""The page's style sheet and its one script; its blue and vermilion are told apart by colour-blind readers."""

LIGHT = """--back:#fff;--text:#1a1f24;--soft:#59646e;--line:#d5dbe0;--wash:#f4f6f8;
--kept:#0b5c8f;--removed:#b9480e;--map:#6a4c93;--good:#1b7348;"""

CSS = (
    f":root{{color-scheme:light dark;{LIGHT}}}"
    + """
@media (prefers-color-scheme:dark){:root{--back:#12171c;--text:#e3e7eb;--soft:#9ba7b1;--line:#323b44;--wash:#1a2128;
--kept:#6cb4e6;--removed:#f39a5c;--map:#bd9fe0;--good:#6cc79a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--back);color:var(--text);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:67rem;margin:0 auto;padding:0 1.5rem}
header{padding-top:2.75rem}
h1{font-size:clamp(1.6rem,1.1rem + 1.9vw,2.35rem);line-height:1.2;letter-spacing:-.018em;font-weight:650;
margin:.2rem 0 .3rem;
overflow-wrap:anywhere;text-wrap:balance}
h2{font-size:1.25rem;line-height:1.3;letter-spacing:-.008em;font-weight:650;margin:0 0 .5rem}
h3{font-size:1rem;font-weight:650;margin:1.25rem 0 .4rem}
p{margin:.4rem 0}
section{margin-top:2.5rem;padding-top:1.4rem;border-top:1px solid var(--line)}
.eyebrow,.soft,figcaption,.how,footer{color:var(--soft)}
.eyebrow{font-size:.85rem;margin:0}
.subtitle{font-size:1.1rem;color:var(--soft);margin:0 0 .9rem;overflow-wrap:anywhere}
.lede{max-width:52rem;font-size:1.06rem;overflow-wrap:anywhere}
.soft,figcaption,.how{font-size:.88rem}
.how{max-width:26rem}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:.88em;
overflow-wrap:anywhere}
pre{margin:.4rem 0;padding:.75rem 1rem;background:var(--wash);border-radius:6px;white-space:pre-wrap;line-height:1.5}
pre.copy{user-select:all;-webkit-user-select:all;cursor:copy}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:1.2rem 1.75rem;
margin:1.6rem 0 .9rem;padding:0}
.tile{border-top:3px solid var(--kept);padding-top:.6rem;min-width:0}
.tile.bad{border-color:var(--removed)}
.tile.good{border-color:var(--good)}
.tile dt{font-size:.85rem;color:var(--soft)}
.tile dd{margin:0;font-size:.9rem;line-height:1.45;overflow-wrap:anywhere}
.tile dd.big{font-size:1.8rem;line-height:1.2;font-weight:620;letter-spacing:-.02em;margin:.1rem 0 .2rem}
.tile.bad .big,td.bad,p.bad{color:var(--removed)}
.tile.good .big,td.good,p.good{color:var(--good)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;margin:.5rem 0;font-size:.94rem}
th,td{text-align:left;vertical-align:baseline;padding:.45rem 1.1rem .45rem 0;border-bottom:1px solid var(--line);
overflow-wrap:break-word}
th{font-size:.85rem;font-weight:600;color:var(--soft);white-space:nowrap;overflow-wrap:normal}
th:last-child,td:last-child{padding-right:0}
.nb{white-space:nowrap}
.bar{vertical-align:middle}
.name{min-width:11rem;overflow-wrap:anywhere}
.n{text-align:right;white-space:nowrap}
.sub{font-size:.85rem;color:var(--soft);display:block}
tr.chosen td{background:var(--wash);font-weight:600}
table.sortable th button{all:unset;cursor:pointer}
table.sortable th button:focus-visible{outline:2px solid var(--kept);outline-offset:2px}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
.bars{width:9rem;height:22px;display:block}
figure{margin:.6rem 0 0}
figure .scroll svg{min-width:42rem}
svg{overflow:visible}
svg.plot{width:100%;height:auto;display:block;stroke-linejoin:round;stroke-linecap:butt}
.picture{margin:.9rem 0 .2rem}
svg.plan{max-width:100%;height:auto;font-size:12px}
svg.base,svg.order{display:block;margin:.3rem 0}
.label{font-size:.85rem;color:var(--soft);margin:.7rem 0 0}
.narrow{display:none!important}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem 1.3rem;padding:0;margin:.7rem 0 0;font-size:.88rem}
.legend li{display:flex;align-items:center;gap:.45rem}
.plan .kept{fill:var(--kept)}.plan .hollow{fill:none;stroke:var(--line);stroke-width:1.2}
.plan .drop{fill:none;stroke:var(--removed);stroke-width:1.2;stroke-dasharray:none}
.plan .cross{stroke:var(--removed);stroke-width:1;opacity:.55;fill:none}
.plan .map{fill:var(--map)}.plan .gate{fill:none;stroke:var(--text);stroke-width:1.1;stroke-dasharray:3 2}
.plan .corner{fill:var(--back);stroke:var(--kept);stroke-width:1}
.plan .bracket{stroke:var(--text);stroke-width:1.6;fill:none}
.plan .arc{stroke:var(--text);stroke-width:1.3;fill:none}.plan .tip,.plan .pennant{fill:var(--text)}
.plan .exit{stroke:var(--text);stroke-width:1.5}
.plan text{fill:currentColor;font-variant-numeric:tabular-nums}
.plan .on,.plan .onmap{fill:var(--back)}.plan .small{font-size:10.5px}
.plan .note{font-size:10.5px}
.plan .gone{fill:var(--removed);paint-order:stroke;stroke:var(--back);stroke-width:4px;stroke-linejoin:round}
svg.heat{width:100%;max-width:34rem;height:auto;display:block;font-size:11px}
.heat .alike{fill:var(--kept)}.heat .better{fill:var(--good)}.heat .worse{fill:var(--removed)}
.heat text{fill:currentColor;font-variant-numeric:tabular-nums}
.heat .frame{fill:none;stroke:var(--line);stroke-width:1}.heat .chosen{fill:none;stroke:var(--text);stroke-width:2}
.pairs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:0 1.25rem}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.5rem;margin:.6rem 0}
.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere}
details{margin:.5rem 0}summary{cursor:pointer}
footer{margin-top:3rem;padding-top:1rem;padding-bottom:3rem;font-size:.85rem}
footer p{border-top:1px solid var(--line);padding-top:1rem}
@media screen and (max-width:45rem){table{font-size:.88rem}th,td{padding-right:.8rem}.bars{width:6rem}
.wide{display:none!important}svg.narrow,p.narrow{display:block!important}
main,header,footer{padding-left:1rem;padding-right:1rem}header{padding-top:1.5rem}
.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.5rem}.tiles{grid-template-columns:1fr 1fr;
gap:1.1rem 1.1rem}
.tile dd.big{font-size:1.45rem}section{margin-top:2rem}}
@media print{:root{--back:#fff;--text:#000;--soft:#444;--line:#bbb;--wash:#f4f4f4;--kept:#0b5c8f;
--removed:#b9480e;--map:#6a4c93;
--good:#1b7348}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}body{font-size:10pt}
header{padding-top:0}section{margin-top:1.2rem;padding-top:.8rem}tr,figure,.picture,.tiles,pre{break-inside:avoid}
h2,h3{break-after:avoid}.scroll{overflow:visible}figure .scroll svg{min-width:0}}
"""
)

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable"))
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const words = (a, b) => isNaN(a) - isNaN(b) || a.localeCompare(b) * down;
      const order = (a, b) => (isNaN(a) || isNaN(b) ? words(a, b) : (a - b) * down);
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => order(key(a), key(b))));
    };
  });
"""
