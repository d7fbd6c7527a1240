"""Style sheet of the page."""

from omnigrpo.report.theme import DARK, LIGHT, css_variables

STYLE = (
    f":root {{ color-scheme: light dark; {css_variables(LIGHT)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {css_variables(DARK)} }} }}\n"
    """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 6px; }
h3 { font-size: 0.95rem; margin: 22px 0 8px; color: var(--muted); font-weight: 600; }
p { margin: 0 0 10px; }
section { margin-top: 36px; }
.note, .sub { color: var(--muted); max-width: 75ch; }
.missing, .problem { border-left: 3px solid var(--orange); padding: 6px 12px; color: var(--muted);
  background: var(--panel); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr));
  gap: 10px; margin: 18px 0; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 1.4rem; line-height: 1.3; white-space: nowrap;
  font-variant-numeric: tabular-nums; font-weight: 650; }
.tile span { display: block; color: var(--muted); font-size: 0.82rem; line-height: 1.35; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 0 0 12px;
  font-size: 0.9rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 14px; }
.wide { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 14px; align-items: start; }
.pairs { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; align-items: start; }
.pairs svg { max-width: 480px; margin: 0 auto; }
figure { margin: 0; background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 12px 6px; min-width: 0; }
figcaption { font-weight: 600; font-size: 0.92rem; margin-bottom: 2px; }
figure svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 0.82rem; color: var(--muted); }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.scroll { overflow-x: auto; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
.num { text-align: right; white-space: nowrap; }
.gain td { color: var(--muted); }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--muted); }
details > .charts { margin-top: 10px; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  overflow-x: auto;  font-size: 0.8rem; line-height: 1.45; }
.rollouts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); gap: 14px;
  align-items: start; }
article { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  min-width: 0; }
.strip { display: flex; gap: 4px; margin-bottom: 8px; }
.strip img { flex: 1 1 0; min-width: 0; max-width: 25%; height: auto; border-radius: 4px; display: block; }
.meta { color: var(--muted); font-size: 0.82rem; margin: 0 0 8px; overflow-wrap: anywhere; }
.completion { border-top: 1px solid var(--line); padding: 8px 0 2px; }
.completion .head { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline;
  font-size: 0.88rem; }
.completion .head .reward { margin-left: auto; color: var(--muted); font-variant-numeric: tabular-nums; }
.completion p { margin: 2px 0 6px; font-size: 0.88rem; overflow-wrap: anywhere; white-space: pre-wrap; }
.right { color: var(--green); font-weight: 650; }
.wrong { color: var(--rose); font-weight: 650; }
@media (max-width: 720px) {
  main { padding: 18px 12px 40px; }
  .wide, .pairs { grid-template-columns: minmax(0, 1fr); }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  th, td { padding: 5px 8px; }
}
@media print { body { background: none; } section { break-inside: avoid-page; } }
"""
)
