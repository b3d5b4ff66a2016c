"""Chat templates: the built-in formats, transformers as reference, and templates that misbehave."""

import json

import pytest

from puna.errors import TokenizerError
from puna.tokenizer import load_tokenizer
from puna.tokenizer.chat import LLAMA2_TEMPLATE, LLAMA3_TEMPLATE, render_chat

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " Hi 😀 "}
ANSWER = {"role": "assistant", "content": "Yes?"}
MORE = {"role": "user", "content": "2 + 2\n"}
CHATS = [[USER], [SYSTEM, USER], [USER, ANSWER, MORE], [SYSTEM, USER, ANSWER, MORE]]

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}"""


def render(template, messages, add_generation_prompt=True):
    return render_chat(
        template,
        messages,
        bos_token="<s>",
        eos_token="</s>",
        add_generation_prompt=add_generation_prompt,
    )


def test_llama2_format():
    assert render(LLAMA2_TEMPLATE, CHATS[3]) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi 😀 [/INST] Yes? </s><s>[INST] 2 + 2 [/INST]"
    )
    assert render(LLAMA2_TEMPLATE, [USER]) == "<s>[INST] Hi 😀 [/INST]"


def test_llama2_format_has_two_roles():
    with pytest.raises(TokenizerError, match="no place for a message of role tool"):
        render(LLAMA2_TEMPLATE, [{"role": "tool", "content": ""}])


def test_llama3_format():
    head = "<|start_header_id|>{}<|end_header_id|>\n\n{}"
    expected = "<s>" + head.format("system", "Be brief.<|eot_id|>")
    expected += head.format("user", "Hi 😀<|eot_id|>")
    assert render(LLAMA3_TEMPLATE, [SYSTEM, USER], add_generation_prompt=False) == expected
    assert render(LLAMA3_TEMPLATE, [SYSTEM, USER]) == expected + head.format("assistant", "")


@pytest.fixture(scope="module", params=["llama2", "llama3"])
def model_directory(request, shared_data, tmp_path_factory):
    """tokenizer.json with a stated BOS and EOS, without a chat template."""
    directory = tmp_path_factory.mktemp(request.param)
    source = shared_data / "tokenizers" / request.param
    (directory / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    bos, eos = ("<s>", "</s>") if request.param == "llama2" else ("<|begin_of_text|>", "<|eot_id|>")
    config = {"bos_token": bos, "eos_token": eos}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("template", [CHATML, LLAMA2_TEMPLATE, LLAMA3_TEMPLATE])
def test_equals_transformers(model_directory, template):
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(str(model_directory))
    tok = load_tokenizer(model_directory, chat_template=template)
    for messages in CHATS:
        for add_generation_prompt in (True, False):
            expected = reference.apply_chat_template(
                messages,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                return_dict=False,
            )
            assert tok.apply_chat_template(messages, add_generation_prompt) == list(expected)


def test_one_bos_from_the_template(model_directory):
    tok = load_tokenizer(model_directory, chat_template=LLAMA3_TEMPLATE)
    assert tok.apply_chat_template([USER]).count(tok.bos_token_id) == 1


def test_no_template(model_directory):
    with pytest.raises(TokenizerError, match="pass one with --chat-template"):
        load_tokenizer(model_directory).apply_chat_template([USER])


def test_where_templates_come_from(shared_data, tmp_path):
    model = shared_data / "stories260K" / "meta" / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    assert load_tokenizer(tmp_path).chat_template == LLAMA2_TEMPLATE  # as Meta publishes it
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"bos_token": "<s>"}')
    assert load_tokenizer(tmp_path).chat_template is None
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_tokenizer(tmp_path).chat_template == "J"
    assert load_tokenizer(tmp_path, chat_template="A").chat_template == "A"


def test_what_templates_may_use():
    template = (
        "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}"
        "{% if loop.first %}{% continue %}{% endif %}{% break %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ bos_token }}{{ tools is none }}{{ 3 * 2 ** 2 }}"
        "{{ '-' * 3 }}"
    )
    message = '{"role": "user", "content": " Hi 😀 "}'
    assert render(template, [USER] * 3) == message + message + "4<s>True12---"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "Expected"),
        ("{{ messages[9].content.strip() }}", "no element 9"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10**6) %}x{% endfor %}", "Range too big"),
        ("{{ 'x' * 10**9 }}", "repetition"),
        ("{{ ([0] * 99999) * 99999 }}", "repetition"),
        ("{{ 9 ** 9 ** 9 }}", "too large"),
        ("{{ 'x' * 'y' }}", "can't multiply"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        (
            "{% for i in range(99999) %}{% for j in range(99) %}{{ 'x' * 999 }}{% endfor %}"
            "{% endfor %}",
            "writes more than",
        ),
    ],
)
def test_templates_that_fail(template, message):
    with pytest.raises(TokenizerError, match=message) as caught:
        render(template, [USER])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", [[], ["Hi"], [{"role": "user"}], [{"content": "Hi"}], "Hi"])
def test_messages_that_are_none(messages):
    with pytest.raises(TokenizerError, match="message"):
        render(LLAMA3_TEMPLATE, messages)
