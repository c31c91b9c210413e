"""Chat templates that do what those of Llama 4 and of the servers that run it do, in words of their own."""

from transformers.models.llama4 import processing_llama4

FULL = """{{- bos_token }}
{%- if extra_tools is defined %}{% set tools = extra_tools %}{% endif %}
{%- if tools_in_user_message is not defined %}{% set tools_in_user_message = true %}{% endif %}
{%- if date_string is not defined %}{% set date_string = strftime_now('%d %B %Y') %}{% endif %}
{%- if messages[0].role == 'system' %}
    {%- set said = messages[0].content if messages[0].content is string else messages[0].content[0].text %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set said, rest = '', messages %}
{%- endif %}
{%- if said or tools %}
    {{- '<|header_start|>system<|header_end|>\\n\\n' }}
    {{- 'Environment: ipython\\n' if tools }}{{ 'Today: ' + date_string + '\\n' }}
    {%- if tools and not tools_in_user_message %}
        {%- for tool in tools %}{{ tool | tojson(indent=4) + '\\n' }}{% endfor %}
    {%- endif %}
    {{- said | trim + '<|eot|>' }}
{%- endif %}
{%- if tools and tools_in_user_message %}
    {%- if not rest %}{{ raise_exception('tools need a message of the user') }}{% endif %}
    {{- '<|header_start|>user<|header_end|>\\n\\nAnswer with JSON for one of these functions:\\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=2) }}{{ '\\n' }}{% endfor %}
    {{- rest[0].content | trim + '<|eot|>' }}
    {%- set rest = rest[1:] %}
{%- endif %}
{%- macro body(content) %}
    {%- if content is string %}{{ content }}{% else %}
        {%- for part in content %}
            {{- '<|image|>' if part.type == 'image' else part.text if part.type == 'text' }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- for message in rest %}
    {%- if message.role in ('tool', 'ipython') %}
        {{- '<|header_start|>ipython<|header_end|>\\n\\n' }}
        {%- set content = message.content %}
        {{- content | tojson if content is mapping or content is iterable else content }}
    {%- elif 'tool_calls' in message and message.tool_calls | length %}
        {{- '<|header_start|>assistant<|header_end|>\\n\\n<|python_start|>' }}{{ body(message.content) }}<|python_end|>
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "parameters": ' }}
            {{- call.function.arguments | tojson }}{{ '}' }}
        {%- endfor %}
    {%- else %}
        {{- '<|header_start|>' + message.role + '<|header_end|>\\n\\n' }}{{ body(message.content) }}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif %}"""

PYTHONIC = """{{- bos_token }}
{%- macro signature(tool) %}
    {%- set function = tool.function if tool.function is defined else tool %}
    {{- function.name }}(
    {%- for name, of in ((function.parameters or {}).properties or {}).items() %}
        {{- name }}: {{ {'string': 'str', 'integer': 'int'}.get(of.type, 'Any') }}{{ ', ' if not loop.last }}
    {%- endfor %}){{ ' — ' ~ function.description if function.description }}
{%- endmacro %}
{%- if tools %}<|header_start|>system<|header_end|>

Call functions as in [f(x=1)].
    {%- for tool in tools %}{{ '\\n' }}{{ signature(tool) }}{% endfor %}<|eot|>{% endif %}
{%- for message in messages %}
    {{- '<|header_start|>' ~ message['role'] ~ '<|header_end|>\\n\\n' }}
    {%- if message.tool_calls is defined %}
        {{- '[' }}
        {%- for call in message.tool_calls %}
            {{- call.function.name }}(
            {%- for name, value in call.function.arguments.items() -%}
                {{ name }}={{ value | tojson }}{% if not loop.last %}, {% endif %}
            {%- endfor %}){{ ', ' if not loop.last }}
        {%- endfor %}
        {{- ']<|eom|>' }}
    {%- else %}
        {{- message['content'] | default('', true) | trim }}<|eot|>
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|header_start|>assistant<|header_end|>

{% endif %}"""

JSON_TOOLS = """{{- bos_token }}{% set ns = namespace(calls=0, seen='') %}
{%- if tools is not none %}<|header_start|>system<|header_end|>

{{ tools | tojson(sort_keys=true, separators=(',', ':')) }}
{{ tools | tojson(ensure_ascii=False, indent=1) }}
{{ tools[:1] | tojson(ensure_ascii=true) }}<|eot|>{% endif %}
{%- for message in messages %}
    {%- set ns.seen = ns.seen ~ message.role[:1] %}
    {{- '<|header_start|>' + message.role + '<|header_end|>\\n\\n' }}
    {%- if message.content is string %}{{ message.content }}
    {%- elif message.content is defined %}
        {%- for part in message.content %}{{ part.text if part is mapping and part.type == 'text' }}{% endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- set ns.calls = ns.calls + 1 %}
        {%- set arguments = call.function.arguments %}
        {{- {'id': call.id or 'c%d' % ns.calls, 'name': call.function.name} | tojson }}
        {{- arguments if arguments is string else arguments | tojson(indent=4) }}
    {%- endfor %}
    {{- '<|eot|>' }}
{%- endfor %}
{{- '<|header_start|>assistant<|header_end|>\\n\\n' ~ ns.seen ~ ns.calls if add_generation_prompt }}"""

STRICT = """{{ bos_token }}{% for message in messages -%}
{% if message['role'] == 'system' and not loop.first %}
{{ raise_exception('the system speaks first, not as number ' ~ loop.index) }}
{% endif %}
{% if message['role'] not in ['system', 'user', 'assistant'] %}{% continue %}{% endif %}
{% if loop.index > 6 %}{% break %}{% endif %}
<|header_start|>{{ message['role'] }}<|header_end|>

{{ message['content'] | trim }}{{ eos_token }}
{%- endfor %}
{% if add_generation_prompt %}
<|header_start|>assistant<|header_end|>

{% endif %}"""

THINKING = """{{ bos_token }}{% for message in messages %}
{%- set content = message.content if message.content is string else '' %}
<|header_start|>{{ message.role }}<|header_end|>
{% if message.role == 'assistant' %}{% generation %}
{%- if message.reasoning_content is defined and enable_thinking is not false %}
<think>{{ message.reasoning_content | trim }}</think>
{%- elif '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- content }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ content.strip() }}<|eot|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|header_start|>assistant<|header_end|>
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""

DOCUMENTS = """{{ bos_token }}{% if documents %}<|header_start|>documents<|header_end|>
{% for document in documents %}
{{ loop.index0 }}. {{ document['title'] | upper }} ({{ document.get('year', '?') }}): {{ document.text | truncate(80) }}
{% else %}none{% endfor %}<|eot|>{% endif %}
{%- macro frame(kind) %}<|header_start|>{{ kind }}<|header_end|>{{ caller() }}<|eot|>{% endmacro %}
{%- for message in messages %}
{%- call frame(message.role) %}{{ message.content | default('-') }}{% endcall %}{% endfor %}
{%- for role, of in messages | groupby('role') %}{{ role }}×{{ of | length }} {% endfor %}
{%- if add_generation_prompt %}<|header_start|>assistant<|header_end|>{% endif %}"""

TEXTS_ONLY = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif %}"""

PARTS_ONLY = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
    {%- for part in message['content'] %}
        {%- if part['type'] == 'image' %}<|image|>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
    {%- endfor %}<|eot|>
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif %}"""

PIECES = """{% macro token(name) %}{{ '<|' ~ name ~ '|>' }}{% endmacro %}{{ bos_token }}
{%- for message in messages %}{{ token('header_start') }}{{ message.role }}{{ token('header_end') }}
{%- if message.content is string %}{{ message.content }}{% else %}
    {%- for part in message.content %}{{ '<|' + part.type + '|>' if part.type == 'image' else part.text }}{% endfor %}
{%- endif %}{{ '<|' + 'eot' + '|>' }}{% endfor %}{% if add_generation_prompt %}{{ token('header_start') }}{% endif %}"""

NAMES = """{% for name in ['bos', 'eos'] %}{{ name }}{% endfor %}{{ bos_token }}{{ eos_token }}{{ pad_token }}
{%- if unk_token is defined %}unk {{ unk_token }}{% else %}no unk{% endif %}{{ sep_token }}{{ cls_token is none }}
{%- if image_token is defined %}{{ image_token }}{% endif %}{{ mask_token or 'no mask' }}
{%- for message in messages %}{{ message.role }}: {{ message.content }}{{ tool_token }}{% endfor %}"""

METHODS = """{% set d = dict(a=1, b='x') %}{{ d | tojson }}{{ dict.fromkeys(['k'], 0) }}{{ bos_token }}
{%- for message in messages | rejectattr('content', 'undefined') if message.content is string %}
{%- set words = message.content.replace('\\t', ' ').split(' ') %}
[{{ message.role | title }}|{{ words | map('lower') | join('_') }}|{{ words | length }}|{{ message.content[:7] }}]
{%- if message.content.startswith('<') or message.content.endswith('.') %}!{% endif %}
{%- set n = namespace(last=words | last) %}{{ n.last }}{{ '%s:%d' | format(message.role, loop.index) }}
{%- endfor %}{{ messages | map(attribute='role') | unique | join(',') }}<|eot|>"""

OFFICIAL: str = processing_llama4.chat_template
"""The template of Llama 4 that `transformers` gives a processor that has none."""

TEMPLATES = {
    "official": OFFICIAL,
    "full": FULL,
    "pythonic": PYTHONIC,
    "json_tools": JSON_TOOLS,
    "strict": STRICT,
    "thinking": THINKING,
    "documents": DOCUMENTS,
    "texts_only": TEXTS_ONLY,
    "parts_only": PARTS_ONLY,
    "pieces": PIECES,
    "names": NAMES,
    "methods": METHODS,
}
