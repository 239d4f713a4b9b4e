"""Chat templates: helpers that models expect, a sandbox that holds, errors that say why."""

import datetime

import pytest

from jpaged.chat_template import render_chat_template

USER = [{"role": "user", "content": "<hi> & 'bye'"}]


def render(template, messages=USER, **options):
    defaults = {
        "add_generation_prompt": True,
        "continue_final_message": False,
        "tools": None,
        "variables": {},
    }
    return render_chat_template(template, messages, **(defaults | options))


def test_text_is_not_escaped_and_blocks_are_trimmed():
    template = (
        "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}"
    )
    assert render(template) == "<hi> & 'bye'\n"


def test_helpers_of_transformers_are_there():
    tools = [{"name": "größe", "q": "<>"}]
    assert render("{{ tools | tojson }}", tools=tools) == '[{"name": "größe", "q": "<>"}]'
    assert render("{{ tools | tojson(ensure_ascii=true) }}", tools=["ö"]) == '["\\u00f6"]'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}").startswith("{\n")
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().astimezone().year)
    assert (
        render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "1"
    )
    assert render("{{ bos_token }}{{ x }}", variables={"bos_token": "<s>", "x": 1}) == "<s>1"
    assert render("a{% generation %}{{ 1 }}b{% endgeneration %}c") == "a1bc"
    assert render("{% if add_generation_prompt %}go{% endif %}") == "go"
    assert render("{% if tools is none and documents is none %}none{% endif %}") == "none"


def test_templates_may_refuse():
    with pytest.raises(ValueError, match="cannot render these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ('{0.__class__}' | attr('format'))(1) }}",
    ],
)
def test_the_sandbox_refuses_attribute_tricks(attack):
    messages = [dict(USER[0])]
    with pytest.raises(ValueError, match="chat_template cannot render these messages"):
        render("{{ (" + attack[3:-3] + ").x.y }}", messages)
    assert messages == USER


def test_the_sandbox_shows_nothing_of_python():
    assert render("{{ ''.__class__ }}") == ""
    assert render("{{ open }}{{ __import__ }}") == ""


def test_continuing_cuts_what_the_template_closes_with():
    messages = [*USER, {"role": "assistant", "content": "Well, "}]
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(template, messages, **options) == "[<hi> & 'bye'][Well,"
    with pytest.raises(ValueError, match="must not both be true"):
        render(template, messages, continue_final_message=True)
    with pytest.raises(ValueError, match="needs text as the last message's content"):
        render(template, [{"role": "user", "content": None}], **options)
    with pytest.raises(ValueError, match="does not show the last message, got 'Well, '"):
        render("nothing", messages, **options)


def test_bad_messages_and_templates_are_refused():
    with pytest.raises(ValueError, match="messages must hold at least one message"):
        render("x", [])
    with pytest.raises(ValueError, match="messages must be objects with a 'role', got 'hi'"):
        render("x", ["hi"])
    with pytest.raises(ValueError, match="chat_template is not a valid template"):
        render("{% if %}")
    with pytest.raises(ValueError, match="cannot render these messages"):
        render("{{ 1 / 0 }}")
