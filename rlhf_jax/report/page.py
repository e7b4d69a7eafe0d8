"""The page itself: its style and its template. No script, no font, no address: nothing that a browser would fetch."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #1c2128; --soft: #57606a; --grid: #e3e7ec; --edge: #dde2e8;
  --tint: #f1f4f8; --accent: #0b62a8;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b3589a; --c4: #d99000; --c5: #45a5de; --c6: #555f6b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f1318; --card: #171c23; --ink: #e6eaf0; --soft: #9da8b5; --grid: #2a323c; --edge: #2c343f;
    --tint: #1e252e; --accent: #74b8f2;
    --c0: #4fa9e6; --c1: #ff8a4c; --c2: #2bc49a; --c3: #e59cc6; --c4: #f2b93b; --c5: #9bd6f7; --c6: #b5bdc7;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55; overflow-wrap: anywhere;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
  -webkit-text-size-adjust: 100%; text-size-adjust: 100%;
}
header, main { max-width: 70rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 2.5rem; padding-bottom: 1.5rem; }
h1 { font-size: clamp(1.6rem, 1.2rem + 2vw, 2.3rem); line-height: 1.2; letter-spacing: -.02em; margin: 0; }
h2 { font-size: 1.1rem; line-height: 1.35; letter-spacing: -.005em; margin: 0 0 .75rem; }
h3 { font-size: .8rem; font-weight: 600; color: var(--soft); margin: 0 0 .35rem; }
.subtitle { color: var(--soft); font-size: 1.05rem; max-width: 52rem; text-wrap: pretty; margin: .6rem 0 0; }
main { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem; padding-bottom: 4rem; }
section {
  background: var(--card); border: 1px solid var(--edge); border-radius: 12px; padding: 1.1rem .9rem; min-width: 0;
}
section > p { max-width: 48rem; text-wrap: pretty; margin: .6rem 0 0; white-space: pre-line; }
section > h2 + p { margin-top: 0; }
section > p.note { color: var(--soft); font-size: .875rem; margin-top: .8rem; }
h1, h2, h3, p, td, th, li, .text, pre { unicode-bidi: isolate; }

.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible, .text:focus-visible, summary:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px;
}
table { border-collapse: collapse; min-width: 100%; font-size: .92rem; }
th, td { padding: .5rem .75rem; text-align: left; vertical-align: top; overflow-wrap: break-word; max-width: 26rem; }
thead th { color: var(--soft); font-weight: 600; font-size: .82rem; vertical-align: bottom; }
thead th { border-bottom: 1.5px solid var(--edge); }
tbody tr + tr > * { border-top: 1px solid var(--grid); }
tbody th { font-weight: 600; min-width: min(13rem, 36vw); }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
thead .number { white-space: normal; }
tr > :first-child { padding-left: 0; position: sticky; left: 0; background: var(--card); max-width: min(26rem, 45vw); }

.plot { display: block; width: 100%; height: auto; max-width: 31rem; margin: 0 auto; overflow: hidden; }
.plot svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; }
svg text { font-family: inherit; }
ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin: .6rem 0 0; padding: 0; }
li { display: flex; align-items: center; gap: .4rem; font-size: .875rem; min-width: 0; overflow: hidden; }
li svg { flex: none; width: 34px; height: 14px; }
details { margin-top: .8rem; font-size: .875rem; }
summary { color: var(--accent); cursor: pointer; width: max-content; }
details .scroll { margin-top: .4rem; }

article { padding-top: 1rem; }
article + article { border-top: 1px solid var(--edge); margin-top: 1rem; }
.columns { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.columns > div { min-width: 0; border: 1px solid var(--edge); border-radius: 8px; padding: .7rem .8rem; }
.columns h3 { display: flex; justify-content: space-between; gap: .75rem; }
.score { font-variant-numeric: tabular-nums; white-space: nowrap; color: var(--ink); }
.text { white-space: pre-wrap; overflow: hidden; font-size: .92rem; tab-size: 4; }
.prompt { background: var(--tint); border-radius: 8px; padding: .7rem .8rem; margin-bottom: .75rem; }
.empty { color: var(--soft); font-style: italic; }
pre {
  margin: 0; padding: .8rem .9rem; overflow: auto; background: var(--tint); border-radius: 8px; tab-size: 4;
  font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre; overflow-wrap: normal;
}
@media (min-width: 60rem) {
  header, main { padding-left: 2rem; padding-right: 2rem; }
  section { padding: 1.4rem 1.5rem; }
  main { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.25rem; }
  section:not(.half) { grid-column: 1 / -1; }
}
@media print {
  body { background: none; }
  section { break-inside: avoid; border-color: #ccc; }
  section.samples { break-inside: auto; }
}
"""

TEMPLATE = """
{%- macro grid(columns, rows, right, label) %}
<div class="scroll" role="region" tabindex="0" aria-label="{{ label }}"><table>
<thead><tr>{% for name in columns %}<th scope="col"
{%- if right[loop.index0] %} class="number"{% endif %}>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows -%}
<tr>{% for cell in row %}{% if loop.first and not right[0] %}<th scope="row">{{ cell }}</th>{% else %}<td
{%- if right[loop.index0] %} class="number"{% endif %}>{{ cell }}</td>{% endif %}{% endfor %}</tr>
{% endfor -%}
</tbody></table></div>
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<header>
<h1 dir="auto">{{ title }}</h1>
{% if subtitle %}<p class="subtitle" dir="auto">{{ subtitle }}</p>
{% endif -%}
</header>
<main>
{% for view in views -%}
{% set block = view.block -%}
<section class="{{ view.kind }}{% if view.half %} half{% endif %}" aria-labelledby="b{{ loop.index }}">
<h2 id="b{{ loop.index }}" dir="auto">{{ block.title }}</h2>
{% if view.kind == "table" -%}
{{ grid(block.columns, view.rows, view.right, block.title) }}
{% elif view.kind == "picture" -%}
<div class="plot">{{ view.drawing.svg }}</div>
{% if view.drawing.legend %}<ul>{% for swatch, name in view.drawing.legend -%}
<li>{{ swatch }}<span dir="auto">{{ name }}</span></li>{% endfor %}</ul>
{% endif -%}
{% if view.rows %}<details><summary>In numbers</summary>
{{- grid(view.drawing.columns, view.rows, view.right, block.title) }}</details>
{% endif -%}
{% elif view.kind == "samples" -%}
{% for prompt, texts in block.rows -%}
<article aria-label="Sample {{ loop.index }}">
<h3>Prompt {{ loop.index }}</h3>
<div class="text prompt" dir="auto">{{ prompt }}</div>
<div class="columns">
{% for text, score in texts -%}
<div><h3><span dir="auto">{{ block.columns[loop.index0] }}</span>
{%- if score is not none %}<span class="score">{{ score | number }}</span>{% endif %}</h3>
{% if text %}<div class="text" dir="auto">{{ text }}</div>{% else %}<div class="empty">nothing</div>{% endif %}</div>
{% endfor -%}
</div>
</article>
{% endfor -%}
{% elif view.kind == "code" -%}
<pre tabindex="0"><code>{{ block.text }}</code></pre>
{% else -%}
{% for paragraph in block.paragraphs %}<p dir="auto">{{ paragraph }}</p>
{% endfor -%}
{% endif -%}
{% for line in view.omitted %}<p class="note" dir="auto">{{ line }}</p>
{% endfor -%}
{% if block.note %}<p class="note" dir="auto">{{ block.note }}</p>
{% endif -%}
</section>
{% endfor -%}
</main>
</body>
</html>
"""
