"""The layout of runtime/data/chat.py in the languages of other programs."""

from __future__ import annotations

# jinja2, for transformers, vLLM and llama.cpp. What is between the generation marks is the answer:
# transformers makes the assistant's mask from them.
JINJA = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'developer', 'user', 'assistant'] %}
        {{- raise_exception('role must be one of system, developer, user, assistant') }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '<|message|>' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|message|>' }}
{%- endif %}
"""

# Go's text/template, for Ollama, which puts the start token before it and a Modelfile's SYSTEM
# among the messages.
GO = (
    "{{ range .Messages }}<|start|>{{ .Role }}<|message|>{{ .Content }}<|end|>{{ end }}"
    "<|start|>assistant<|message|>"
)
