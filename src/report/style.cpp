#include <headfold/report/style.h>

namespace headfold::report {

// Series colours: a colour-blind-safe set (after Okabe and Ito), darkened or lightened to at least 4.5:1 against the
// page; each also has its own marker. Shades: one hue, so that order shows without colour.
const char* const kStyle = R"css(
:root{color-scheme:light dark;
--page:#fff;--raised:#f6f8fa;--text:#1c2128;--muted:#59636e;--rule:#d5dbe1;--grid:#e7ebef;--link:#0a58a8;--mark:#eef5ee;--good:#0a6b46;
--c0:#0067a8;--c1:#b8470b;--c2:#007a5a;--c3:#8a3f98;--c4:#8a6100;--c5:#4b5d73;--cn:#59636e;
--q0:#cfe3f1;--q1:#a9cfe6;--q2:#7fb6d8;--q3:#569bc7;--q4:#357fb1;--q5:#1f6497;--q6:#124a78;--q7:#082f53}
@media (prefers-color-scheme:dark){:root{
--page:#14181d;--raised:#1c2229;--text:#e4e8ec;--muted:#9aa5b1;--rule:#333c46;--grid:#262d35;--link:#74b5f2;--mark:#1b2a23;--good:#5fd0a0;
--c0:#5db2f0;--c1:#f58f57;--c2:#42c79c;--c3:#cf97df;--c4:#dfb348;--c5:#a9b8c9;--cn:#9aa5b1;
--q0:#1f3447;--q1:#27496a;--q2:#30608c;--q3:#3d79ad;--q4:#5394c8;--q5:#77afdb;--q6:#a3cbea;--q7:#d3e7f7}}
@media print{:root{color-scheme:light;
--page:#fff;--raised:#fff;--text:#000;--muted:#444;--rule:#bbb;--grid:#ddd;--link:#000;--mark:#f2f2f2;--good:#0a5a3a;
--c0:#0067a8;--c1:#b8470b;--c2:#007a5a;--c3:#8a3f98;--c4:#8a6100;--c5:#4b5d73;--cn:#555;
--q0:#cfe3f1;--q1:#a9cfe6;--q2:#7fb6d8;--q3:#569bc7;--q4:#357fb1;--q5:#1f6497;--q6:#124a78;--q7:#082f53}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif}
main{max-width:1100px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:1.9rem;line-height:1.2;letter-spacing:-.012em;margin:0 0 .35em;font-weight:650;overflow-wrap:anywhere}
h2{font-size:1.45rem;line-height:1.25;margin:2.6em 0 .5em;padding-top:1.1em;border-top:1px solid var(--rule);font-weight:650;overflow-wrap:anywhere}
h3{font-size:1.08rem;margin:2.1em 0 .5em;font-weight:650}
p,ul,dl{margin:.5em 0 1em;max-width:46em}
a{color:var(--link);text-underline-offset:.15em}
.sub{color:var(--muted);margin-top:0}
.lead{font-size:1.12rem;line-height:1.5;max-width:42em;overflow-wrap:anywhere}
.lead strong,.say strong{font-weight:650}
nav ul{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.3em 1.4em;margin:1.2em 0 0}
.scroll{overflow-x:auto;margin:.4em 0 .5em}
.scroll:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.86rem;line-height:1.4;font-variant-numeric:tabular-nums lining-nums}
th,td{padding:.42em .75em .42em 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
th:last-child,td:last-child{padding-right:.2em}
thead th{font-weight:600;color:var(--muted);vertical-align:bottom;border-bottom-color:var(--muted)}
tbody th{font-weight:600;min-width:13em;max-width:18em;overflow-wrap:anywhere}
.w{min-width:14em}
.n{text-align:right;white-space:nowrap}
td small,th small{display:block;color:var(--muted);font-weight:400;font-size:.92em}
tr.first td,tr.first th{background:var(--raised)}
td.best{font-weight:700}
.pill{display:inline-block;padding:0 .55em;border:1px solid currentColor;border-radius:1em;font-size:.9em;white-space:nowrap;color:var(--muted)}
.pill.yes{color:var(--good)}
.key{width:11px;height:11px;margin-right:.45em;vertical-align:-1px;overflow:visible}
caption,figcaption,.note{color:var(--muted);font-size:.86rem;line-height:1.45;max-width:52em}
figure{margin:1.2em 0 1.8em}
figcaption{margin-top:.5em}
figcaption b{color:var(--text);font-weight:600}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:0 2.4em;align-items:start}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,235px),1fr));gap:1em 1.3em}
.panels svg{width:100%;max-width:300px}.panels.wide svg{max-width:560px}
.panels.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr))}
svg{display:block;max-width:100%;height:auto;font-family:inherit}
.big svg{width:100%;max-width:520px}
dl.facts{display:grid;grid-template-columns:minmax(8em,max-content) 1fr;gap:.35em 1.6em;max-width:none;font-size:.93rem}
dl.facts dt{color:var(--muted)}
dl.facts dd{margin:0;overflow-wrap:anywhere;min-width:0}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace;font-size:.86em}
pre{background:var(--raised);border:1px solid var(--rule);border-radius:6px;padding:.8em 1em;overflow-x:auto;line-height:1.6}
.missing{border-left:3px solid var(--c4);padding:.1em 0 .1em 1em}
.missing ul{margin:.3em 0;padding-left:1.1em}
details{margin:.6em 0}
summary{cursor:pointer;color:var(--link);font-size:.93rem}
dl.words dt{font-weight:600;margin-top:.7em}
dl.words dd{margin:0}
footer{margin-top:3em;padding-top:1em;border-top:1px solid var(--rule);color:var(--muted);font-size:.86rem}
svg text{fill:var(--text);font-size:12px}
svg .tick{fill:var(--muted);font-size:11px;font-variant-numeric:tabular-nums}
svg .at{fill:var(--muted);font-size:11.5px}
svg .th{font-weight:600;font-size:12.5px}
svg .lab{font-size:12px}
svg text.c0,svg text.c1,svg text.c2,svg text.c3,svg text.c4,svg text.c5,svg text.cn{fill:var(--c)}
svg .grid{stroke:var(--grid);stroke-width:1}
svg .axis{stroke:var(--muted);stroke-width:1}
svg .rule{stroke:var(--muted);stroke-width:1;stroke-dasharray:3 3}
svg .halo{stroke:var(--page);stroke-width:4.5}
svg .rule.strong{stroke-dasharray:none;stroke:var(--text);stroke-width:1.5}
svg .lead{stroke:var(--muted);stroke-width:.7;opacity:.7}
svg .ln{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
svg .dash{stroke-dasharray:5 4}
svg .stem{stroke:var(--c);stroke-width:1.4;opacity:.55}
svg .dot{fill:var(--c);stroke:var(--page);stroke-width:.8}
svg .ring{fill:var(--page);stroke:var(--c);stroke-width:1.6}
svg .box{fill:var(--c)}
svg .back{fill:var(--page)}
svg .in{font-size:11px;font-variant-numeric:tabular-nums}
svg .in.far{fill:var(--page)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}.cn{--c:var(--cn)}
.q0{--c:var(--q0)}.q1{--c:var(--q1)}.q2{--c:var(--q2)}.q3{--c:var(--q3)}.q4{--c:var(--q4)}.q5{--c:var(--q5)}.q6{--c:var(--q6)}.q7{--c:var(--q7)}
@media (max-width:600px){main{padding:24px 16px 48px}h1{font-size:1.55rem}.lead{font-size:1.05rem}dl.facts{grid-template-columns:1fr;gap:0}dl.facts dd{margin-bottom:.6em}
table{width:max-content;min-width:100%}tbody th{min-width:0;max-width:9.5em}.w{min-width:9em}}
@media print{body{font-size:10.5pt}main{max-width:none;padding:0}.scroll{overflow:visible}table{font-size:8.5pt}figure,tr,pre,.missing{break-inside:avoid;page-break-inside:avoid}
h2,h3{break-after:avoid;page-break-after:avoid}thead{display:table-header-group}a{text-decoration:none}nav{display:none}
details::details-content{content-visibility:visible;block-size:auto}summary{color:inherit;list-style:none}pre{white-space:pre-wrap}}
)css";

}  // namespace headfold::report
