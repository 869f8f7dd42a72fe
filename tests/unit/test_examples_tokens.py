"""Rows as tokens: the model's template, the end of a turn, no second beginning, and what is cut."""

from __future__ import annotations

import pytest

from rayalign.data.groups import fit
from rayalign.data.tokens import Turns
from rayalign.errors import DataError
from tests.tiny_models import EOS_ID, build_tokenizer
from tests.unit.examples_data import CHATML, PAIRS, bytes_tokenizer, load, one, texts, write

ROW = {"prompt": "hi", "completion": "  yes "}
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
PLAIN_TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501


def test_the_turn_ends_where_the_template_ends_it_and_begins_once(tmp_path):
    tokenizer = bytes_tokenizer()
    group = one(tokenizer, tmp_path, ROW)
    assert texts(tokenizer, group) == ["<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "yes<|im_end|>"]
    assert group.texts == ("  yes ",)
    assert group.completions[0].finish_reason == "stop"
    assert (group.completions[0].logps, group.completions[0].version) == ((), -1)
    assert load(tokenizer, str(tmp_path / "one.jsonl")).end == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


@pytest.mark.parametrize(
    ("template", "prompt", "answer"),
    [
        (MISTRAL, "<s>[INST] hi [/INST]", "  yes </s>"),
        (PLAIN_TURNS, "user: hi\nassistant: ", "  yes </s>"),
        # The generation prompt is no beginning of what the template renders: the text itself, and the turn's end.
        (THINKING, "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n", "  yes <|im_end|>"),
    ],
)
def test_other_templates(tmp_path, template, prompt, answer):
    tokenizer = bytes_tokenizer(template)
    assert texts(tokenizer, one(tokenizer, tmp_path, ROW)) == [prompt, answer]


def test_without_template_prompt_and_answer_are_tokenised_apart(tmp_path):
    tokenizer = bytes_tokenizer(None)
    assert texts(tokenizer, one(tokenizer, tmp_path, ROW, chat_template=False)) == ["<s>hi", "  yes </s>"]
    with_begin = one(tokenizer, tmp_path, ROW | {"prompt": "<s>hi"}, chat_template=False)
    assert texts(tokenizer, with_begin)[0] == "<s>hi"


def test_without_template_a_prompt_is_one_text(tmp_path):
    tokenizer = bytes_tokenizer(None)
    talk = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    path = str(write(tmp_path / "a.jsonl", [ROW, ROW | {"prompt": talk}]))
    with pytest.raises(DataError, match="a.jsonl:2: without a chat template a prompt is one text") as error:
        load(tokenizer, path, chat_template=False)
    assert "user, assistant, user" in str(error.value)
    with pytest.raises(DataError, match="a.jsonl:1: without a chat template") as error:
        load(tokenizer, path, chat_template=False, system="be kind")
    assert "messages of system, user" in str(error.value) and "data.system" in str(error.value)
    assert load(tokenizer, path, chat_template=False, on_bad_row="skip").rows == 1


def test_an_end_token_that_the_data_bring_is_not_doubled(tmp_path):
    tokenizer = bytes_tokenizer()
    assert texts(tokenizer, one(tokenizer, tmp_path, ROW | {"completion": "yes<|im_end|>"}))[1] == "yes<|im_end|>"
    with_end = ROW | {"completion": "yes</s>"}
    assert texts(tokenizer, one(tokenizer, tmp_path, with_end, chat_template=False))[1] == "yes</s>"


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(tmp_path):
    from tokenizers import processors

    tokenizer = bytes_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert texts(tokenizer, one(tokenizer, tmp_path, ROW, chat_template=False)) == ["<s>hi", "  yes </s>"]


def test_the_answer_is_what_the_whole_conversation_holds_behind_the_prompt(tmp_path):
    tokenizer = build_tokenizer()
    rows = [{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                        {"role": "user", "content": "c"}], "completion": "d"}]  # fmt: skip
    group = load(tokenizer, str(write(tmp_path / "a.jsonl", rows))).step(0, 1)[0]
    whole = tokenizer.apply_chat_template([*rows[0]["prompt"], {"role": "assistant", "content": "d"}], return_dict=True)
    assert list(group.prompt.token_ids + group.completions[0].token_ids) == whole["input_ids"]
    assert group.completions[0].token_ids[-1] == EOS_ID
    assert group.prompt.text == "c"


def test_a_system_message_is_put_before_every_prompt(tmp_path):
    tokenizer = bytes_tokenizer()
    prompt, _ = texts(tokenizer, one(tokenizer, tmp_path, ROW, system="be kind"))
    assert prompt.startswith("<s><|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user")
    path = str(write(tmp_path / "a.jsonl", PAIRS))
    with pytest.raises(DataError, match="a.jsonl:1: the model's chat template refuses these messages") as error:
        load(bytes_tokenizer(NO_SYSTEM), path, system="be kind")
    assert "no system role" in str(error.value)


def test_no_template_is_explained(tmp_path):
    with pytest.raises(DataError, match=r"data\.chat_template=false"):
        load(bytes_tokenizer(None), str(write(tmp_path / "a.jsonl", PAIRS)), on_bad_row="error")


def test_cut_at_the_prompts_beginning_and_the_answers_end(tmp_path):
    tokenizer = build_tokenizer()
    rows = [
        {"prompt": "0123456789", "chosen": "abcdefgh", "rejected": "xy"},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
    ]
    loaded = load(tokenizer, str(write(tmp_path / "a.jsonl", rows)), max_tokens=14)
    assert (loaded.counts["truncated"], loaded.rows) == (1, 2)
    group = next(group for group in loaded.step(0, 2) if len(group.prompt.token_ids) > 3)
    # 12 + 9 tokens in a room of 14: the prompt gives way to half of it, then the answer is cut.
    assert texts(tokenizer, group) == ["456789<assistant>", "abcdefg", "xy<eos>"]
    assert [c.finish_reason for c in group.completions] == ["length", "stop"]
    assert "1 cut to" in loaded.describe()


@pytest.mark.parametrize(
    ("prompt", "answers", "room", "expected"),
    [
        (5, (3, 2), 8, (5, 3, 2)),
        (5, (4, 2), 8, (4, 4, 2)),
        (6, (6,), 8, (4, 4)),
        (2, (9,), 8, (2, 6)),
        (7, (1,), 8, (7, 1)),
    ],
)
def test_fit(prompt, answers, room, expected):
    long, short = tuple(range(prompt)), [tuple(range(100, 100 + n)) for n in answers]
    kept, cut = fit(long, short, room)
    assert (len(kept), *map(len, cut)) == expected
    assert kept == long[len(long) - len(kept) :]
    assert all(part == whole[: len(part)] for part, whole in zip(cut, short, strict=True))
    begun, _ = fit(long, short, room, begin=0)
    assert (len(begun), begun[0]) == (len(kept), 0)


def test_a_prompt_that_fills_the_context_is_refused_or_counted(tmp_path):
    tokenizer = build_tokenizer()
    path = str(write(tmp_path / "a.jsonl", [*PAIRS, {"prompt": "z" * 48, "chosen": "a", "rejected": "b"}]))
    with pytest.raises(DataError, match=r"a.jsonl:21: a prompt fills the context") as error:
        load(tokenizer, path, max_tokens=50)
    assert "50 tokens" in str(error.value) and "data.max_tokens=50" in str(error.value)
    loaded = load(tokenizer, path, max_tokens=50, on_bad_row="skip")
    assert (loaded.rows, loaded.counts["skipped"], loaded.counts["skipped: a prompt fills the context"]) == (20, 1, 1)
    assert load(tokenizer, path, max_tokens=51).rows == 21


def test_a_limit_that_is_the_models_context_is_called_so(tmp_path):
    tokenizer = build_tokenizer()
    path = str(write(tmp_path / "a.jsonl", [*PAIRS, {"prompt": "z" * 48, "chosen": "a", "rejected": "b"}]))
    with pytest.raises(DataError, match="a prompt fills the context") as error:
        load(tokenizer, path, max_tokens=4096, context=50)
    assert "the model's context=50" in str(error.value) and "data.max_tokens" not in str(error.value)
    loaded = load(tokenizer, path, max_tokens=4096, context=51)
    assert "1 cut to 51 tokens (the model's context)" in loaded.describe()


def test_the_fingerprint_tells_tokenizers_apart():
    prints = [
        Turns(bytes_tokenizer(), chat_template=True),
        Turns(bytes_tokenizer(MISTRAL), chat_template=True),
        Turns(bytes_tokenizer(), chat_template=False),
        Turns(build_tokenizer(), chat_template=True),
    ]
    assert len({each.fingerprint for each in prints}) == len(prints)
    used = bytes_tokenizer()
    used(["a", "abc"], padding=False, truncation=True, max_length=2)
    assert Turns(used, chat_template=True).fingerprint == prints[0].fingerprint
