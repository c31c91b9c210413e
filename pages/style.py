"""The pages' style sheet, and the colours that pages and pictures share, in light and in dark."""

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1d2126",
    "faint": "#5c6570",
    "line": "#d9dde2",
    "soft": "#f3f5f7",
    "good": "#1a7f37",
    "bad": "#c0341d",
    "open": "#8a6100",
    "c1": "#33669c",
    "c2": "#2f8fb3",
    "c3": "#228833",
    "c4": "#a58b00",
    "c5": "#d1495b",
    "c6": "#8e3b86",
    "c7": "#5b6270",
}
DARK = {
    "paper": "#14171b",
    "ink": "#e6e9ed",
    "faint": "#9aa4af",
    "line": "#343a42",
    "soft": "#1e2329",
    "good": "#4cc06a",
    "bad": "#ff7b66",
    "open": "#e0b040",
    "c1": "#7aa9dc",
    "c2": "#6cc6e6",
    "c3": "#5dbd6c",
    "c4": "#d9c24a",
    "c5": "#f28a98",
    "c6": "#d58acb",
    "c7": "#aab2bd",
}


def _variables(colours: dict[str, str]) -> str:
    return "; ".join(f"--{name}: {value}" for name, value in colours.items())


STYLE = f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
@media print {{ :root {{ {_variables(LIGHT)} }} }}
* {{ box-sizing: border-box }}
body {{ font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; margin: 0;
  background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100% }}
main {{ max-width: 64rem; margin: 0 auto; padding: 1.25rem 1rem 3rem }}
h1, h2 {{ font-weight: 650; line-height: 1.25; overflow-wrap: anywhere; text-wrap: balance }}
h1 {{ font-size: 1.5rem; margin: .25rem 0 .5rem }} h2 {{ font-size: 1.15rem; margin: 2.25rem 0 .5rem }}
p {{ margin: .5rem 0; max-width: 48rem }} .lead {{ color: var(--faint); overflow-wrap: anywhere }}
.pass {{ color: var(--good) }} .regressed {{ color: var(--bad) }} .undecided {{ color: var(--open) }}
.wide {{ overflow-x: auto; max-width: 100%; background:
  linear-gradient(to right, var(--paper) 30%, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 30%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to right, var(--line), transparent) left / .75rem 100% no-repeat scroll,
  linear-gradient(to left, var(--line), transparent) right / .75rem 100% no-repeat scroll }}
table {{ border-collapse: collapse; font-size: .875rem; min-width: 100% }}
td, th {{ padding: .35rem .9rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }}
th {{ color: var(--faint); font-weight: 600; white-space: nowrap }} td:last-child, th:last-child {{ padding-right: 0 }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
td.t {{ white-space: nowrap }} td.t code {{ white-space: pre }}
td.b {{ overflow-wrap: anywhere; min-width: 9rem }}
small {{ display: block; color: var(--faint) }}
code {{ font: .8125rem ui-monospace, "DejaVu Sans Mono", monospace; background: var(--soft); padding: .1rem .25rem;
  border-radius: .2rem; white-space: pre-wrap; overflow-wrap: anywhere }}
.box {{ border-left: 4px solid var(--bad); background: var(--soft); padding: .25rem 1rem; overflow-wrap: anywhere }}
dl {{ display: grid; grid-template-columns: 1fr; gap: 0 1.5rem; margin: .5rem 0 }}
dt {{ color: var(--faint) }} dd {{ margin: 0 0 .5rem; overflow-wrap: anywhere }}
figure {{ margin: .75rem 0 }} figure svg {{ display: block; width: 100%; height: auto }}
figure .desk {{ display: none }} .panels {{ display: grid; gap: 1rem 1.25rem }}
figure ul {{ list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; margin: .5rem 0; padding: 0;
  font-size: .8125rem }}
figure i {{ display: inline-block; width: 1.1rem; height: .2rem; margin-right: .4rem; vertical-align: middle;
  background: var(--mark) }}
figure i.area {{ height: .8rem; width: .8rem }} figure i.dots {{ height: 0; border-top: .2rem dotted var(--mark);
  background: none }} figure i.dash {{ height: 0; border-top: .15rem dashed var(--mark); background: none }}
figure i.empty {{ height: .8rem; width: .8rem; background: none; border: 1px solid var(--faint) }}
figcaption {{ color: var(--faint); font-size: .875rem }}
summary {{ cursor: pointer; color: var(--faint) }}
footer {{ margin-top: 3rem; border-top: 1px solid var(--line); color: var(--faint); font-size: .875rem }}
footer p {{ overflow-wrap: anywhere }}
@media (max-width: 43.99rem) {{
  table {{ font-size: .8125rem }} td, th {{ padding-right: .5rem }} td.b {{ min-width: 7.5rem }}
}}
@media (min-width: 44rem) {{
  main {{ padding: 2rem 1.5rem 4rem }} h1 {{ font-size: 1.875rem }}
  figure .desk {{ display: block }} figure .phone {{ display: none }}
  .p2 {{ grid-template-columns: 1fr 1fr }} .p3 {{ grid-template-columns: 1fr 1fr 1fr }}
  dl {{ grid-template-columns: max-content 1fr }} dd {{ margin: 0 }}
}}
@media print {{ .wide {{ overflow: visible; background: none }} }}
"""
