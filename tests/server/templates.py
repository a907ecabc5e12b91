"""Chat templates that know tools, as Qwen 2.5 and Llama 3.1 have them, for the tiny models."""

from __future__ import annotations

import copy
from dataclasses import replace

from steering.models import LanguageModel
from tests.conftest import make_model

HERMES = r"""
{%- if tools %}<|system|>Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
Answer with <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|user|><tool_response>
{{ m.content }}
</tool_response><|end|>
{%- elif m.tool_calls %}<|assistant|>{{ m.content }}
{%- for call in m.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>
{%- else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
"""
LLAMA3 = r"""
{%- if not tools is none %}<|system|>Respond in the format {"name": function name, "parameters":
dictionary of argument name and its value}.{% for t in tools %}
{{ t | tojson(indent=4) }}{% endfor %}<|end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|user|>{{ m.content | tojson }}<|end|>
{%- elif 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}
{{- raise_exception("This model only supports single tool-calls at once!") }}{% endif %}
{%- set call = m.tool_calls[0].function %}<|assistant|>{"name": "{{ call.name }}", {# -#}
"parameters": {{ call.arguments | tojson }}}<|end|>
{%- else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
"""
# Known to nobody here: Mistral's list, Qwen3-Coder's XML.
MISTRAL = r"""
{%- for m in messages %}
{%- if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}
{"name": "{{ c.function.name }}", {# -#}
"arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}{% endfor %}]</s>
{%- elif m.role == 'user' %}[AVAILABLE_TOOLS]{{ tools | tojson }}[INST]{{ m.content }}[/INST]
{%- elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]
{%- else %}{{ m.content }}</s>{% endif %}
{%- endfor %}"""
QWEN3_CODER = r"""
{%- if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}
{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call><function={{ c.function.name }}>
{%- for k, v in c.function.arguments.items() %}<parameter={{ k }}>{{ v }}</parameter>{% endfor -%}
</function></tool_call>{% endfor %}<|end|>
{%- endfor %}"""


def with_template(template: str | None, family: str = "llama") -> LanguageModel:
    """A tiny model with another chat template."""
    lm = make_model(family)
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = template
    return replace(lm, tokenizer=tokenizer)
